"""Cut the units with the lowest scores out of a pipeline, and save the smaller pipeline.

example: python -m ecodiff prune openmoji-sdxl --scores gates.safetensors --ratio 0.2 --out openmoji-sdxl-20
"""

from __future__ import annotations

import argparse

from . import options as shared


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shared.add_model(parser)
    shared.add_mask(parser)
    parser.add_argument("--out", required=True, metavar="FOLDER", help="folder of the smaller pipeline")


def run(options: argparse.Namespace) -> dict:
    from ecodiff.hub.made import write_made
    from ecodiff.method.surgery import prune

    out = shared.check_target(options.out, folder=True)
    pipe = shared.load_model(options, runs=False)
    mask = shared.read_mask(options, pipe)
    small = prune(pipe, mask)
    small.save_pretrained(out)
    write_made(out, small, **shared.made_by(options))
    return {"folder": str(out), **removed(pipe, small, mask)}


def removed(pipe, small, mask) -> dict:
    """How much smaller a pipeline is: units removed of each kind, and the denoiser's parameters before and after."""
    from ecodiff.cost.trace import parameters
    from ecodiff.method.sites import KINDS, find_sites
    from ecodiff.pipelines.parts import denoiser

    kinds: dict[str, list[int]] = {}
    for name, site in find_sites(denoiser(pipe), KINDS).items():
        if name in mask:
            counts = kinds.setdefault(site.kind, [0, 0])
            counts[0] += site.units - int(mask[name].sum())
            counts[1] += site.units
    before, after = (parameters(denoiser(each)) for each in (pipe, small))
    found = {f"{kind} units removed": f"{gone} of {of}" for kind, (gone, of) in kinds.items()}
    return found | {"parameters before": before, "parameters after": after}
