"""Occlusion, LD-Pruner's criterion (Castells et al., 2024): remove a part, and see how far the final latents move.

Their distance compares the average and the spread of the final latents with and without the part,

    score = ‖mean(z_0) - mean(ẑ_0)‖₂ + ‖std(z_0) - std(ẑ_0)‖₂        (over prompts, entry by entry),

so that it needs no pairing. As all prompts start from the same noise here, ‖z_0 - ẑ_0‖ itself is offered, too.
The published method removes layers; one trajectory of all prompts a part is what it costs.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from ecodiff.errors import EcoDiffError
from ecodiff.method.hooks import apply_gates
from ecodiff.method.sites import Site
from ecodiff.pipelines.parts import denoiser
from ecodiff.pipelines.prompts import encoding_once
from ecodiff.pipelines.running import placed
from ecodiff.progress import progress_bar, say

from .calibration import KINDS, Sampling, draw, sites_of
from .wanda import from_norms, norms


@placed
def scores(
    pipe,
    prompts: Sequence,
    *,
    kinds: tuple[str, ...] = KINDS,
    groups: int | None = 8,
    distance: str = "moments",
    **sampling,
) -> dict[str, Tensor]:
    """Distance of the final latents without a unit, {site name: fp32 [units]}.

    Heads are removed one by one: exact. A feed-forward has too many neurons for that; they are sorted by WANDA into
    ``groups`` equal groups, each group is removed as a whole, and its distance is shared among its neurons in
    proportion to their WANDA scores. This approximation is exact where a group is one neuron (``groups=None``).
    It says before it starts how many trajectories it needs, and how long they take by the time of the first.

    Args:
        distance: "moments" (LD-Pruner's, above) or "paired": mean over prompts of ‖z_0 - ẑ_0‖² / size.
        sampling: fields of ``Sampling``; a few prompts are enough to rank parts, and cost is proportional to them.

    Raises EcoDiffError for an unknown distance or fewer than one group.
    """
    if distance not in _DISTANCES:
        raise EcoDiffError(f"occlusion: distance={distance!r} is not one of {', '.join(_DISTANCES)}.")
    if groups is not None and groups < 1:
        raise EcoDiffError(f"occlusion: groups={groups} must be at least 1, or None for every neuron by itself.")
    model, settings = denoiser(pipe), Sampling(**sampling)
    sites = sites_of(pipe, kinds, exclude=settings.exclude)
    pipe = encoding_once(pipe)  # one memory for all trajectories
    quiet = {**sampling, "progress": False}
    wanda = _wanda_of_grouped(pipe, prompts, sites, groups, quiet)
    parts = []
    for name, site in sites.items():
        parts += [(name, units) for units in _parts(site, groups, wanda.get(name))]
    started = time.perf_counter()
    whole = draw(pipe, prompts, Sampling(**quiet))
    if settings.progress:
        minutes = (time.perf_counter() - started) * len(parts) / 60
        say(f"occlusion: {len(parts)} trajectories of {len(prompts)} prompts, about {minutes:.1f} min")
    result = {name: torch.zeros(site.units) for name, site in sites.items()}
    for name, units in progress_bar(parts, desc="occlusion", progress=settings.progress):
        gate = torch.ones(sites[name].units)
        gate[units] = 0
        with apply_gates(model, {name: gate}, sites):
            moved = _DISTANCES[distance](whole, draw(pipe, prompts, Sampling(**quiet))).item()
        weight = wanda[name][units] if name in wanda else torch.ones(len(units))
        total = weight.sum()
        # WANDA's scores of a whole group can be zero, as its inputs can: then its units share the distance equally.
        if total > 0:
            result[name][units] = moved * (weight / total)
        else:
            result[name][units] = moved * torch.full((len(units),), 1 / len(units))
    return result


def _moments(z: Tensor, other: Tensor) -> Tensor:
    distance = torch.linalg.vector_norm(z.mean(0) - other.mean(0)).cpu()
    if len(z) > 1:  # a single image has no spread
        distance = distance + torch.linalg.vector_norm(z.std(0) - other.std(0)).cpu()
    return distance


def _paired(z: Tensor, other: Tensor) -> Tensor:
    return (z - other).square().mean()


_DISTANCES = {"moments": _moments, "paired": _paired}


def _wanda_of_grouped(pipe, prompts, sites: dict[str, Site], groups: int | None, quiet: dict) -> dict[str, Tensor]:
    """WANDA scores of the sites whose units are removed in groups."""
    kinds = tuple(dict.fromkeys(site.kind for site in sites.values() if _grouped(site, groups)))
    if not kinds:
        return {}
    scores = from_norms(pipe, norms(pipe, prompts, kinds=kinds, **quiet), kinds, quiet.get("exclude", ()))
    return {name: score for name, score in scores.items() if _grouped(sites[name], groups)}


def _grouped(site: Site, groups: int | None) -> bool:
    return site.kind != "attention" and groups is not None and groups < site.units and bool(site.readers)


def _parts(site: Site, groups: int | None, wanda: Tensor | None) -> list[Tensor]:
    """Unit numbers that are removed together: each by itself without WANDA scores, else groups of similar scores."""
    if wanda is None:
        return [torch.tensor([i]) for i in range(site.units)]
    return list(wanda.sort(stable=True).indices.tensor_split(groups))
