"""What stays makes up for what went: weights adapted to the units that are left (OBS-Diff, Zhu et al., 2026)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ecodiff.errors import EcoDiffError
from ecodiff.method.layers import columns_of, weight_matrix
from ecodiff.method.sites import Site, find_sites
from ecodiff.method.surgery import prune
from ecodiff.pipelines.parts import denoiser
from ecodiff.pipelines.running import placed
from ecodiff.progress import say

from .calibration import KINDS, Clock, Sampling, columns, draw, reading, sites_of

DAMPING = 0.01  # added to H's diagonal, relative to its mean


@placed
def second_moments(
    pipe,
    prompts: Sequence,
    *,
    kinds: tuple[str, ...] = KINDS,
    time_weights: str = "log",
    memory_gb: float = 8.0,
    **sampling,
) -> dict[str, Tensor]:
    """H of every layer that reads units, a weighted mean over rows, {layer name: fp32 [in, in]} on the CPU.

    Args:
        time_weights: "log": step k of T counts 1 - ln(1 + k) / (2 ln T), from 1 at the noisiest to one half, as early
            errors are carried on; "uniform": all count alike.
        memory_gb: most that is summed up at once; more layers than that take further trajectories. (SDXL: 7.4 GB.)
        sampling: fields of ``Sampling``.

    Raises EcoDiffError for unknown time weights, or kinds that no layer reads.
    """
    if time_weights not in ("log", "uniform"):
        raise EcoDiffError(f"obs: time_weights={time_weights!r} is not one of log, uniform.")
    model, settings = denoiser(pipe), Sampling(**sampling)
    result: dict[str, Tensor] = {}
    sites = sites_of(pipe, kinds, readers=True, exclude=settings.exclude)
    packages = _packages(model, sites, memory_gb * 1e9)
    if settings.progress and len(packages) > 1:
        say(f"obs: {len(packages)} passes over {len(prompts)} prompts, {memory_gb:g} GB of second moments each")
    for package in packages:
        result |= _moments_of(pipe, prompts, package, settings, logarithmic=time_weights == "log")
    return result


def _moments_of(
    pipe, prompts: Sequence, sites: dict[str, Site], settings: Sampling, logarithmic: bool
) -> dict[str, Tensor]:
    """`second_moments` of the layers that read these sites, from one trajectory of each prompt."""
    clock = Clock()
    sums: dict[str, Tensor] = {}
    totals: dict[str, float] = {}

    def see(layer: str, x: Tensor) -> None:
        weight = time_weight(clock.step, clock.steps) if logarithmic else 1.0
        x = x.float()
        if layer not in sums:
            sums[layer] = torch.zeros(x.shape[1], x.shape[1], device=x.device)
        sums[layer].addmm_(x.T, x, alpha=weight)
        totals[layer] = totals.get(layer, 0.0) + weight * len(x)

    with reading(denoiser(pipe), sites, see):
        draw(pipe, prompts, settings, label="obs", clock=clock)
    return {layer: (total / totals[layer]).cpu() for layer, total in sums.items()}


def time_weight(step: int, steps: int) -> float:
    """1 for the first of ``steps`` (the noisiest), one half for the last, falling with the logarithm between."""
    if steps <= 1:
        return 1.0
    return 1.0 - 0.5 * math.log(1 + min(step, steps - 1)) / math.log(steps)


def prune_compensated(pipe, mask: Mapping[str, Tensor], moments: Mapping[str, Tensor], *, damping: float = DAMPING):
    """`prune`, with the weights that stay adapted to what has gone; returns the smaller pipeline.

    For each layer that reads masked units ``W'_K = W H_:K (H_KK)⁻¹``, the least error on the inputs that made
    ``moments`` (`second_moments` of the same pipeline). Biases stay. The mask may come from any method. Raises
    EcoDiffError where ``moments`` lack a layer or are those of another model.
    """
    small, model = prune(pipe, mask), denoiser(pipe)
    for layer, keep in _kept_columns(model, mask).items():
        if keep.all() or not keep.any():  # nothing has gone, or nothing is left to make up for it
            continue
        weight = weight_matrix(model.get_submodule(layer))
        if layer not in moments or len(moments[layer]) != weight.shape[1]:
            raise EcoDiffError(f"prune_compensated: no second moments of {layer!r}; compute them for this pipeline.")
        target = denoiser(small).get_submodule(layer).weight
        with torch.no_grad():
            target.copy_(compensated(weight, moments[layer], keep, damping).view_as(target))
    return small


def prune_adapted(pipe, mask: Mapping[str, Tensor], prompts: Sequence, *, kinds: tuple[str, ...] = KINDS, **sampling):
    """`prune`, with the weights that stay adapted to what these prompts put through the model: no gradients, no labels.

    `second_moments` of the prompts, then `prune_compensated`. A few dozen prompts do. The mask may be learned: what it
    chose stays chosen, and the layers that read the units make up for the others. ``sampling``: fields of ``Sampling``.
    """
    return prune_compensated(pipe, mask, second_moments(pipe, prompts, kinds=kinds, **sampling))


def compensated(weight: Tensor, moments: Tensor, keep: Tensor, damping: float = DAMPING) -> Tensor:
    """The weights of the kept columns, fp32 [out, kept], that come closest to the whole layer's output.

    weight [out, in]; moments [in, in]; keep bool [in].
    """
    # The normal equations of least squares, H_KK W'ᵀ = H_K: Wᵀ, in fp64, since H is often close to singular.
    h = damped(moments, damping)
    whole = weight.detach().double().cpu()
    return torch.linalg.solve(h[keep][:, keep], h[keep] @ whole.T).T.float()


def damped(moments: Tensor, damping: float) -> Tensor:
    """Moments in fp64 with a ridge, so that inputs that are always zero leave it invertible."""
    if not damping > 0:
        raise EcoDiffError(f"obs: damping={damping} must be positive.")
    moments = moments.double().cpu()
    ridge = damping * moments.diagonal().mean().clamp_min(1e-12)
    return moments + ridge * torch.eye(len(moments), dtype=moments.dtype)


def _kept_columns(model: nn.Module, mask: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Which input channels of each reading layer stay, over all masked sites that share the layer."""
    sites = find_sites(model)
    kept: dict[str, Tensor] = {}
    for name, keep in mask.items():
        if name not in sites:  # a modulation, which no layer reads
            continue
        for span in sites[name].readers:
            if span.layer not in kept:
                kept[span.layer] = torch.ones(columns_of(model.get_submodule(span.layer)), dtype=torch.bool)
            kept[span.layer][columns(span, len(keep))] = keep.cpu().repeat_interleave(span.size)
    return kept


def _packages(model: nn.Module, sites: dict[str, Site], limit: float) -> list[dict[str, Site]]:
    """Sites in parts whose second moments together fit into ``limit`` bytes (at least one layer a part).

    Sites that one layer reads, such as the two of FLUX's single blocks, are in one part.
    """
    by_layers: dict[tuple[str, ...], dict[str, Site]] = {}
    for name, site in sites.items():
        layers = tuple(span.layer for span in site.readers)
        by_layers.setdefault(layers, {})[name] = site
    packages: list[dict[str, Site]] = [{}]
    used = 0
    for layers, members in by_layers.items():
        size = sum(4 * columns_of(model.get_submodule(layer)) ** 2 for layer in layers)  # fp32
        if packages[-1] and used + size > limit:
            packages.append({})
            used = 0
        packages[-1] |= members
        used += size
    return packages
