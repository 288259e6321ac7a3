"""Write one page that shows two pipelines side by side: images with a slider, paired measures, cost.

Both are pipelines, or folders of images that `generate` wrote for the same prompts and seeds.

example: python -m ecodiff compare openmoji-sdxl-20 openmoji-sdxl --prompts prompts.txt --out compare.html
"""

from __future__ import annotations

import argparse

from . import options as shared
from .evaluate import add_both, both, measures


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_both(parser)
    parser.add_argument("--clip", metavar="MODEL", help="also CLIP scores, by this CLIP model")
    parser.add_argument("--out", required=True, metavar="FILE", help="the page, an HTML file")


def run(options: argparse.Namespace) -> dict:
    from ecodiff.comparison.compare import of_images

    out = shared.check_target(options.out)
    sets = both(options)
    comparison = of_images(
        (sets.first, sets.second),
        sets.prompts,
        sets.seeds,
        names=(options.first, options.second),
        judge=options.clip,
        costs=sets.costs,
    )
    comparison.write(out)
    return {"page": str(out), "images": len(sets.prompts), **measures(comparison)}
