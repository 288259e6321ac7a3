"""Pair notebooks with their sources, make slides or a PDF of the book, write what is made from other files.

    python -m ecodiff book pair             rewrite notebooks/*.ipynb from notebooks/*.md
    python -m ecodiff book slides           write _build/slides/*.html from the pages that have been run
    python -m ecodiff book pdf              print _build/html, all pages, to _build/book.pdf (needs Chromium)
    python -m ecodiff book codecheck        write codecheck.yml from the map of the paper's items
    python -m ecodiff book zenodo           write .zenodo.json from CITATION.cff
    python -m ecodiff book sentences        list sentences of more than 35 words; a report
    python -m ecodiff book before-after     draw book/_static/before-after.png, the image at the top of README
    python -m ecodiff book ratio-slider     generate data/results/ratio_slider.png, the images of the ratio slider
    python -m ecodiff book schematics       draw book/_static/schematics/*.svg

All but the report write into the repository from which they run.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "action",
        choices=[
            "pair",
            "slides",
            "pdf",
            "codecheck",
            "zenodo",
            "sentences",
            "before-after",
            "ratio-slider",
            "schematics",
        ],
    )
    parser.add_argument("--out", default="_build", help="folder of the built book (default: %(default)s)")


def run(options: argparse.Namespace) -> int:
    # Imported here so that --help answers at once.
    if options.action == "pair":
        from .build import pair

        for written in pair():
            print(f"wrote notebooks/{written.name}")
    elif options.action == "slides":
        from .slides import build_slides

        for written in build_slides(Path(options.out)):
            print(f"wrote {written}")
    elif options.action == "pdf":
        from .pdf import build_pdf

        print(f"wrote {build_pdf(Path(options.out))}")
    elif options.action in ("codecheck", "zenodo"):
        from . import citable

        print(f"wrote {citable.write(options.action).name}")
    elif options.action == "sentences":
        from .sentences import report

        print("\n".join(report()))
    elif options.action == "schematics":
        from . import schematics

        for path in schematics.write():
            print(f"wrote book/_static/schematics/{path.name}")
    elif options.action == "ratio-slider":
        from .slider import draw_sprite

        print(f"wrote data/results/{draw_sprite().name}")
    else:
        from .before_after import draw_before_after

        draw_before_after()
    return 0
