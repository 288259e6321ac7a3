"""Second order (Hassibi & Stork, 1993), as OBS-Diff (Zhu et al., 2026) applies it to heads and feed-forward neurons.

A layer W [out, in] reads the units. Its error on the inputs of the whole trajectory, E = Σ_t w_t ‖(W - W') x_t‖², has
the second moments H = Σ_t w_t x_t x_tᵀ as its Hessian (up to a factor, for each row of W). Removing the columns S of a
unit, with the best change of all others, costs

    score = tr( W_S ([H⁻¹]_SS)⁻¹ W_Sᵀ ),              W'_K = W_K - W_S ([H⁻¹]_SS)⁻¹ [H⁻¹]_SK;

for one neuron the score is ‖W_j‖² / [H⁻¹]_jj. The change of the others is optional and works with any mask: it is the
least-squares solution W'_K = W H_:K (H_KK)⁻¹, which `prune_compensated` writes into the smaller model.

Unlike OBS-Diff, all layers are taken at once from the whole model's activations, and not in packages one after the
other, each seeing what was removed before. Time weights fall with the logarithm of the step as theirs; the end value
is ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ecodiff.errors import EcoDiffError
from ecodiff.method.layers import weight_matrix
from ecodiff.pipelines.parts import denoiser

from .calibration import KINDS, columns, sites_of
from .compensation import DAMPING, damped, second_moments


def scores(
    pipe,
    prompts: Sequence,
    *,
    kinds: tuple[str, ...] = KINDS,
    time_weights: str = "log",
    damping: float = DAMPING,
    **sampling,
) -> dict[str, Tensor]:
    """The least error of the reading layers without a unit, the others adapted, {site name: fp32 [units]}.

    Summed over the layers that read the site (two in joint attention). See `second_moments` for the arguments.
    """
    moments = second_moments(pipe, prompts, kinds=kinds, time_weights=time_weights, **sampling)
    exclude = sampling.get("exclude", ())
    return from_moments(pipe, moments, kinds=kinds, damping=damping, exclude=exclude)


@torch.no_grad()
def from_moments(
    pipe,
    moments: Mapping[str, Tensor],
    *,
    kinds: tuple[str, ...] = KINDS,
    damping: float = DAMPING,
    exclude: Sequence[str] = (),
) -> dict[str, Tensor]:
    """The scores for second moments that are already known; raises EcoDiffError where those of a layer are missing."""
    model, sites = denoiser(pipe), sites_of(pipe, kinds, readers=True, exclude=exclude)
    result = {name: torch.zeros(site.units) for name, site in sites.items()}
    readers: dict[str, list] = {}  # by layer, so that each H is inverted once
    for name, site in sites.items():
        for span in site.readers:
            readers.setdefault(span.layer, []).append((name, span))
    for layer, spans in readers.items():
        if layer not in moments:
            raise EcoDiffError(f"obs: no second moments of {layer!r}; compute them for this pipeline and these kinds.")
        weight = weight_matrix(model.get_submodule(layer)).double().cpu()
        inverse = torch.linalg.inv(damped(moments[layer], damping))
        for name, span in spans:
            units = sites[name].units
            own = columns(span, units)
            starts = range(own.start, own.stop, span.size)
            blocks = torch.stack([inverse[i : i + span.size, i : i + span.size] for i in starts])  # [H⁻¹]_SS
            parts = weight[:, own].view(len(weight), units, span.size).permute(1, 2, 0)  # W_Sᵀ, [units, size, out]
            result[name] += (parts * torch.linalg.solve(blocks, parts)).sum((1, 2)).float()  # the trace
    return result
