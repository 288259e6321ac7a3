"""Score units by a method that learns nothing, and save the scores.

example: python -m ecodiff score gauss-newton openmoji-sdxl --prompts prompts.txt --out scores.safetensors
"""

from __future__ import annotations

import argparse

from ecodiff.errors import EcoDiffError

from . import options as shared

METHODS = (
    "random", "magnitude", "wanda", "taylor", "diff-pruning", "fisher", "gauss-newton", "occlusion", "obs",
)  # fmt: skip
"""The keys of `ecodiff.scores.METHODS`, which a test compares: they are here so that --help waits for no torch."""

NEED_NO_PROMPTS = ("random", "magnitude")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from ecodiff.scores.calibration import Sampling

    parser.add_argument("method", choices=METHODS, help="the higher a score of a unit, the later the unit goes")
    shared.add_model(parser)
    shared.add_prompts(parser, required=False)
    parser.add_argument("--out", required=True, metavar="FILE", help="the scores, a safetensors file")
    shared.add_fields(parser, Sampling, leave_out=["progress"])


def run(options: argparse.Namespace) -> dict:
    from ecodiff.scores import METHODS
    from ecodiff.scores.calibration import Sampling
    from ecodiff.scores.files import save_scores

    out = shared.check_target(options.out)
    if options.prompts is None and options.method not in NEED_NO_PROMPTS:
        raise EcoDiffError(f"score {options.method} runs the model: give --prompts FILE.")
    settings = shared.given_fields(options, Sampling)
    Sampling(**settings)  # complains before anything is loaded
    prompts = shared.read(options) if options.prompts else []
    scores = METHODS[options.method](shared.load_model(options), prompts, **settings)
    save_scores(out, scores, method=options.method, prompts=len(prompts), **settings)
    units = sum(len(values) for values in scores.values())
    return {"scores": str(out), "method": options.method, "sites": len(scores), "units": units}
