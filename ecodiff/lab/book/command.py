"""Pair notebooks with their sources, or draw what no chapter draws: the image at the top of README, and schematics.

    python -m ecodiff book pair             rewrite notebooks/*.ipynb from notebooks/*.md
    python -m ecodiff book before-after     draw book/_static/before-after.png
    python -m ecodiff book schematics       draw book/_static/schematics/*.svg

All of them write into the repository from which they run.
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=["pair", "before-after", "schematics"])


def run(options: argparse.Namespace) -> int:
    # Imported here so that --help answers at once.
    if options.action == "pair":
        from .build import pair

        for written in pair():
            print(f"wrote notebooks/{written.name}")
    elif options.action == "schematics":
        from . import schematics

        for path in schematics.write():
            print(f"wrote book/_static/schematics/{path.name}")
    else:
        from .before_after import draw_before_after

        draw_before_after()
    return 0
