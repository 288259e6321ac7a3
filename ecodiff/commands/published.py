"""List the masks that the authors of EcoDiff have published, and write their λ as scores that `prune` takes.

`prune --scores published:sdxl` takes them directly.

example: python -m ecodiff published sdxl --ratio 0.2 --out sdxl.safetensors
"""

from __future__ import annotations

import argparse

from ecodiff.errors import EcoDiffError

from . import options as shared


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", help="one of the names that are listed without it")
    parser.add_argument("--ratio", type=float, help="also say how many units this share would leave")
    parser.add_argument("--out", metavar="FILE", help="write λ here, a safetensors file for --scores")
    shared.add_round_to(parser)


def run(options: argparse.Namespace) -> dict:
    from ecodiff.method.published import NAMES, published
    from ecodiff.scores.files import save_scores

    if options.model is None:
        if options.ratio is not None or options.out is not None:
            raise EcoDiffError(f"published: --ratio and --out need a name: {', '.join(NAMES)}.")
        return {name: _in_short(published(name)) for name in NAMES}
    out = None if options.out is None else shared.check_target(options.out)
    found = published(options.model)
    answer: dict = {"model": found.name, "units": _in_short(found), "source": found.origin}
    if options.ratio is not None:
        mask = found.mask(options.ratio, round_to=options.round_to)
        for kind in _kinds(found):
            sites = [name for name, site in found.sites.items() if site.kind == kind]
            kept = sum(int(mask[name].sum()) for name in sites)
            answer[f"{kind} units kept"] = f"{kept} of {sum(found.sites[name].units for name in sites)}"
    if out is not None:
        save_scores(out, found.scores(), method="learned by the authors of EcoDiff", source=found.origin)
        answer["scores"] = str(out)
    return answer


def _in_short(found) -> str:
    """Sites and units of each kind, in words."""
    parts = []
    for kind in _kinds(found):
        sites = [site for site in found.sites.values() if site.kind == kind]
        parts.append(f"{sum(site.units for site in sites)} {kind} units in {len(sites)} sites")
    return ", ".join(parts)


def _kinds(found) -> list[str]:
    return sorted({site.kind for site in found.sites.values()})
