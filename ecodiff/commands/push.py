"""Upload a pruned pipeline to the Hub, with a model card of what is known about it.

The card says what was removed and by which method, what was measured, how to load the model, what it costs, and the
licence of the original. A README.md that you wrote stays.

example: python -m ecodiff push openmoji-sdxl-20 me/openmoji-sdxl-20 --private --evaluation evaluated.json
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="FOLDER", help="a folder that a pruned pipeline was saved to")
    parser.add_argument("repository", metavar="OWNER/NAME", help="where it goes; made where it does not exist")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument(
        "--evaluation", nargs="+", default=[], metavar="FILE", help="what `evaluate --json` printed, for the card"
    )
    parser.add_argument("--base", metavar="ID", help="Hub id of the original (default: what `prune` wrote down)")
    parser.add_argument("--licence", metavar="NAME", help="the original's licence (default: what its own card says)")


def run(options: argparse.Namespace) -> dict:
    from ecodiff.hub.push import push

    pushed = push(
        options.model,
        options.repository,
        private=options.private,
        evaluation=options.evaluation,
        base=options.base,
        licence=options.licence,
    )
    return {"url": pushed.url, "card": "written" if pushed.wrote_card else "yours, which stays"}
