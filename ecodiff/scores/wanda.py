"""WANDA (Sun et al., 2023) at the granularity of units: weights times the size of what they are given to read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ecodiff.errors import EcoDiffError
from ecodiff.method.layers import weight_matrix
from ecodiff.pipelines.parts import denoiser
from ecodiff.pipelines.running import placed

from .calibration import KINDS, Sampling, columns, draw, reading, sites_of


def scores(pipe, prompts, *, kinds: tuple[str, ...] = KINDS, **sampling) -> dict[str, Tensor]:
    """Mean of ``|W_ij| ‖X_j‖`` over the weights that read a unit, {site name: fp32 [units]}.

    W is the layer that reads the units ([out, in]; several in joint attention), X_j its input channel j over all
    prompts, tokens and steps of the sampling loop. ‖X_j‖ is taken as a root mean square: the 2-norm over the square
    root of its length, so that layers with more tokens compare with those with fewer (within a layer the order is
    WANDA's). ``sampling``: fields of ``Sampling``. Raises EcoDiffError for kinds that no layer reads.
    """
    exclude = Sampling(**sampling).exclude
    return from_norms(pipe, norms(pipe, prompts, kinds=kinds, **sampling), kinds, exclude)


@placed
def norms(pipe, prompts, *, kinds: tuple[str, ...] = KINDS, **sampling) -> dict[str, Tensor]:
    """Root mean square of every input channel of the layers that read units, {layer name: fp32 [channels]}."""
    squares: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def see(layer: str, x: Tensor) -> None:
        total = x.float().square().sum(0)
        if layer in squares:
            total = squares[layer] + total
        squares[layer] = total
        counts[layer] = counts.get(layer, 0) + len(x)

    settings = Sampling(**sampling)
    with reading(denoiser(pipe), sites_of(pipe, kinds, readers=True, exclude=settings.exclude), see):
        draw(pipe, prompts, settings, label="wanda")
    return {layer: (square / counts[layer]).sqrt().cpu() for layer, square in squares.items()}


@torch.no_grad()
def from_norms(
    pipe, norms: dict[str, Tensor], kinds: tuple[str, ...] = KINDS, exclude: Sequence[str] = ()
) -> dict[str, Tensor]:
    """The scores for input norms that are already known; raises EcoDiffError where those of a layer are missing."""
    model, result = denoiser(pipe), {}
    for name, site in sites_of(pipe, kinds, readers=True, exclude=exclude).items():
        total, entries = torch.zeros(site.units), 0
        for span in site.readers:
            if span.layer not in norms:
                raise EcoDiffError(f"wanda: no norms of {span.layer!r}; compute them for this pipeline and kinds.")
            weight, own = weight_matrix(model.get_submodule(span.layer)), columns(span, site.units)
            # Inputs differ by column only, so a column's weights can be summed before they are multiplied.
            each = weight[:, own].float().abs().sum(0).cpu() * norms[span.layer][own]
            total += each.view(site.units, span.size).sum(1)
            entries += span.size * len(weight)
        result[name] = total / entries
    return result
