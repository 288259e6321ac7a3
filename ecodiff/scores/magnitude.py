"""Magnitude (Han et al., 2015) at the granularity of units: how large the weights are that would go with the unit."""

from __future__ import annotations

import torch
from torch import Tensor

from ecodiff.method.layers import weight_matrix
from ecodiff.pipelines.parts import denoiser

from .calibration import sites_of


@torch.no_grad()
def scores(pipe, prompts=(), *, kinds=("attention", "feed_forward"), **sampling) -> dict[str, Tensor]:
    """Mean absolute weight over the rows that write a unit and the columns that read it, {site name: fp32 [units]}.

    A mean, not a norm, so that heads of different widths compare. Biases are left out, prompts and
    sampling not used.
    """
    model = denoiser(pipe)
    result = {}
    for name, site in sites_of(pipe, kinds, exclude=sampling.get("exclude", ())).items():
        total, entries = torch.zeros(site.units), 0
        # A unit's weights are rows of the layers that write it, columns of those that read it.
        for dimension, spans in enumerate((site.writers, site.readers)):
            for span in spans:
                weight = weight_matrix(model.get_submodule(span.layer)).float().abs()
                per_channel = weight.sum(1 - dimension)[span.offset : span.offset + site.units * span.size]
                total += per_channel.view(site.units, span.size).sum(1).cpu()
                entries += span.size * weight.shape[1 - dimension]
        result[name] = total / entries
    return result
