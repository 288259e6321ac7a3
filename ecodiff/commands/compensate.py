"""Prune a pipeline and adapt the weights that stay to the units that went, without gradients.

example: python -m ecodiff compensate openmoji-sdxl --scores gates.safetensors --ratio 0.2 --prompts list.txt --out s20
"""

from __future__ import annotations

import argparse

from . import options as shared
from .prune import removed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from ecodiff.scores.calibration import Sampling

    shared.add_model(parser)
    shared.add_mask(parser)
    shared.add_prompts(parser)
    parser.add_argument("--out", required=True, metavar="FOLDER", help="folder of the smaller pipeline")
    shared.add_fields(parser, Sampling, leave_out=["progress", "exclude"])


def run(options: argparse.Namespace) -> dict:
    from ecodiff.hub.made import write_made
    from ecodiff.scores.calibration import Sampling
    from ecodiff.scores.compensation import prune_adapted

    out = shared.check_target(options.out, folder=True)
    settings = shared.given_fields(options, Sampling)
    Sampling(**settings)  # complains before anything is loaded
    prompts = shared.read(options)
    pipe = shared.load_model(options)
    mask = shared.read_mask(options, pipe)
    small = prune_adapted(pipe, mask, prompts, **settings)
    small.save_pretrained(out)
    adapted = f"the weights that stay were adapted to those that went, with {len(prompts)} prompts"
    write_made(out, small, **shared.made_by(options, then=[adapted]))
    return {"folder": str(out), **removed(pipe, small, mask)}
