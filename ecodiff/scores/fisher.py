"""Fisher information of gates, the criterion of a fast pruning framework for transformers (Kwon et al., 2022).

A model that has been trained is near a minimum of its loss, so the slope of the mean loss in a gate says little (that
is Taylor's score). The framework expands to second order instead and takes the diagonal of the empirical Fisher matrix
for the curvature: gradients are squared example by example, before they can cancel. An example is a prompt and a step:

    score = Σ_examples (∂L / ∂m)²,        L = ‖ε̂(z_t, t) - ε‖² / size      (`taylor.NoisePrediction`).

Only the score is here. Of what follows it there, the last part (the units that stay are tuned layer by layer) is the
idea of ``prune_adapted``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ecodiff.method.hooks import apply_gates
from ecodiff.pipelines.parts import denoiser
from ecodiff.pipelines.running import frozen, not_half, placed
from ecodiff.progress import progress_bar

from .calibration import KINDS, Sampling, gates_of_samples, sites_of
from .taylor import NoisePrediction


@placed
def scores(pipe, prompts: Sequence, *, kinds: tuple[str, ...] = KINDS, **sampling) -> dict[str, Tensor]:
    """``Σ (∂L/∂m)²`` over prompts and steps, for the gate of each unit, {site name: fp32 [units]}.

    Final latents, noise and loss are Taylor's; every step counts. ``sampling``: fields of ``Sampling``. Raises
    EcoDiffError for a denoiser in float16, one whose input has not the shape of the latents, and a scheduler whose
    prediction is of an unknown type.
    """
    model, settings = denoiser(pipe), Sampling(**sampling)
    sites = sites_of(pipe, kinds, exclude=settings.exclude)
    not_half(model, "fisher")
    every = NoisePrediction.prepare(pipe, prompts, settings)
    totals = {name: torch.zeros(site.units) for name, site in sites.items()}
    total = len(every.recorded) * len(every.steps)
    with progress_bar(total=total, desc="fisher: gradients", progress=settings.progress) as bar:
        for batch in every.recorded:
            loss, samples = replace(every, recorded=[batch]), len(batch[1])
            gates = gates_of_samples(model, sites, samples)
            with torch.enable_grad(), frozen(model), apply_gates(model, gates, sites):
                for step in loss.steps:
                    # The loss is a mean over samples: times their number, slopes are those of each sample's own loss.
                    for name, slope in _slopes(loss, step, gates).items():
                        totals[name] += (samples * slope).square().sum(0).cpu()
                    bar.update()
    return totals


def _slopes(loss: NoisePrediction, step: int, gates: dict[str, Tensor]) -> dict[str, Tensor]:
    """∂L_t/∂m, {site name: [samples, units]}."""
    slopes = {name: torch.zeros_like(gate) for name, gate in gates.items()}

    def add(part: Tensor) -> None:
        gradients = torch.autograd.grad(part, gates.values(), allow_unused=True)
        for slope, gradient in zip(slopes.values(), gradients, strict=True):
            if gradient is not None:
                slope += gradient

    loss(step, add)
    return slopes
