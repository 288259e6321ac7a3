"""From scores to a mask: which units go (App. K.2).

One function for every method, ratio and scope. The paper's ratio is the share of *units* removed within each kind: with
the authors' published SDXL λ, 10 % and 20 % so counted leave 2.343 B and 2.114 B parameters, Table 1's 2.3 B and 2.1 B.
Scores are compared as they are. (The authors' loader clamps negative FFN λ to 0; with the published λ that changes no
module's count at 10 % and 20 %. Clamping heads as well would, at 10 %.)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction

import torch
from torch import Tensor

from ecodiff.errors import EcoDiffError

from .multiples import units_multiple
from .sites import KINDS, Site

_SCOPES = ("global", "kind", "local")
_COUNTS = ("units", "parameters", "flops")


def make_mask(
    scores: Mapping[str, Tensor],
    sites: Mapping[str, Site],
    ratio: float | Mapping[str, float],
    scope: str = "kind",
    count: str = "units",
    round_to: int | str | Mapping[str, int | str] = 1,
) -> dict[str, Tensor]:
    """Return `{site name: bool tensor [units]}`, True = keep, on the CPU, for the sites that have scores.

    Args:
        scores: {site name: tensor [units]}; the lowest go first.
        sites: what `find_sites` returns.
        ratio: share to remove, in [0, 1), one number or one a kind.
        scope: units compete with all others ("global"), with those of their kind ("kind", the paper's), or within
            their site ("local"); the ratio holds within each such group.
        count: what the ratio is a share of: "units" (the paper's), "parameters" of the units, or "flops" (sites from
            `with_flops`). The lowest scores go first while the budget ratio * total is not exceeded.
        round_to: kept units of a site are rounded up to a multiple of this, giving the best removed ones back; one
            number or one a kind. A name stands for the channels that kernels need: "tensor-cores", "int8", "fp8" or
            "2:4" (`ecodiff.method.multiples`). A site with none left stays empty, and none gets more than it has.

    A site keeps its best unit where it is not known what its module returns without any (``Site.min_units``).

    Equal scores: the unit that comes last goes first, in the order of site names (numbers in them by value), which is
    how the published masks were cut. Raises EcoDiffError for anything that does not fit.
    """
    ratios = {kind: _ratio(_per_kind(ratio, kind, 0.0)) for kind in KINDS}
    if scope not in _SCOPES or count not in _COUNTS:
        raise EcoDiffError(
            f"make_mask: scope is one of {list(_SCOPES)}, count one of {list(_COUNTS)}; not {scope!r}, {count!r}."
        )
    if isinstance(ratio, Mapping) and scope == "global":
        raise EcoDiffError("make_mask: scope 'global' compares all kinds, so it takes one ratio; use scope 'kind'.")
    _check_scores(scores, sites)

    names = sorted(scores, key=_natural)
    groups: dict[str, dict[str, Site]] = {}
    for name in names:
        site = sites[name]
        group = {"global": "all units", "kind": site.kind, "local": site.name}[scope]
        groups.setdefault(group, {})[name] = site

    mask: dict[str, Tensor] = {}
    for members in groups.values():
        kind = next(iter(members.values())).kind  # with scope "global" kinds are mixed, but have one ratio
        mask |= _cut(scores, members, ratios[kind], count)
    for name in names:
        multiple = units_multiple(_per_kind(round_to, sites[name].kind, 1), sites[name].unit_size)
        if multiple > 1:
            _round_up(mask[name], scores[name], multiple)
    return {name: mask[name] for name in scores}


def _cut(scores, members: Mapping[str, Site], ratio: Fraction, count: str) -> dict[str, Tensor]:
    """The mask of one group: the lowest scores are removed while the removed cost stays within ratio * total."""
    costs = {name: _cost_of_unit(site, count) for name, site in members.items()}
    flat = torch.cat([scores[name].detach().double().cpu() for name in members])
    each = torch.cat([torch.full((site.units,), costs[name], dtype=torch.int64) for name, site in members.items()])
    # Sorted back to front: the sort is stable, so that among equals the last comes first.
    last = flat.numel() - 1
    order = last - torch.sort(flat.flip(0), stable=True).indices
    budget = int(ratio * int(each.sum()))  # exact: 0.29 of 100 units is 29, which floats would make 28
    order = order[~_must_stay(scores, members)[order]]
    removed = order[each[order].cumsum(0) <= budget]
    keep = torch.ones_like(flat, dtype=torch.bool)
    keep[removed] = False
    parts = keep.split([site.units for site in members.values()])
    return {name: part.clone() for name, part in zip(members, parts, strict=True)}


def _must_stay(scores, members: Mapping[str, Site]) -> Tensor:
    """The best units of the sites that cannot be without any, bool [units of all members]."""
    parts = []
    for name, site in members.items():
        stay = torch.zeros(site.units, dtype=torch.bool)
        best = torch.sort(scores[name].detach().cpu(), stable=True, descending=True).indices[: site.min_units]
        stay[best] = True
        parts.append(stay)
    return torch.cat(parts)


def _cost_of_unit(site: Site, count: str) -> int:
    """What one unit of the site takes from the budget; raises EcoDiffError where its FLOPs were not measured."""
    if count == "units":
        return 1
    if count == "parameters":
        return site.params_per_unit
    if site.flops_per_unit is None:
        raise EcoDiffError("make_mask: count='flops' needs sites measured by with_flops(denoiser, sites, run).")
    return site.flops_per_unit


def _round_up(keep: Tensor, scores: Tensor, multiple: int) -> None:
    """Give the best removed units back, in place, until the number kept is a multiple (or all are kept)."""
    missing = -int(keep.sum()) % multiple
    if keep.any() and missing:
        removed = (~keep).nonzero().flatten()
        best = torch.sort(scores.detach().cpu()[removed], stable=True, descending=True).indices[:missing]
        keep[removed[best]] = True


def _ratio(value) -> Fraction:
    """The ratio as the decimal fraction that the user wrote; raises EcoDiffError for a number outside [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise EcoDiffError(f"make_mask: ratio is the share of units to remove, in [0, 1), not {value!r}.")
    return Fraction(repr(float(value)))


def _per_kind(value, kind: str, default):
    """The value of a kind, where ``value`` is one for all or one a kind; ``default`` for a kind without one."""
    if not isinstance(value, Mapping):
        return value
    if set(value) - set(KINDS):
        raise EcoDiffError(
            f"make_mask: unknown kind {sorted(set(value) - set(KINDS))[0]!r}; kinds are {', '.join(KINDS)}."
        )
    return value.get(kind, default)


def _check_scores(scores: Mapping[str, Tensor], sites: Mapping[str, Site]) -> None:
    if not scores:
        raise EcoDiffError(
            "make_mask: there are no scores; find_sites found nothing to prune, or the method returned nothing."
        )
    for name, value in scores.items():
        if name not in sites:
            raise EcoDiffError(f"make_mask: {name!r} is not among the sites; scores of another model?")
        if tuple(value.shape) != (sites[name].units,):
            raise EcoDiffError(f"make_mask: {name!r} has {sites[name].units} units, not {list(value.shape)} scores.")
        if torch.isnan(value).any():
            raise EcoDiffError(f"make_mask: {name!r} has a score that is not a number.")


def _natural(name: str) -> list:
    """Sort key by which numbers in names are compared by value: blocks.2 comes before blocks.10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
