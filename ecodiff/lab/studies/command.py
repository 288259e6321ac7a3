"""Measure the cells behind the tables: what is recorded, what is left, how long that takes.

python -m ecodiff study --list          what there is, what is recorded, what the rest would take
python -m ecodiff study                 the plan: stop it and go on as you like
python -m ecodiff study beta --minutes 20
python -m ecodiff study --verify 2      measure two recorded cells again and compare
python -m ecodiff study --part 2/8      the second of eight jobs that share the cells

Processes that a launcher starts (accelerate launch -m ecodiff study) share the cells, too.
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("studies", nargs="*", help="names of studies (default: the plan; --list names all)")
    parser.add_argument("--model", default="openmoji-sdxl", help="an id; all: every embedded pipeline that is trained")
    parser.add_argument("--seeds", type=int, help="seeds of a study (default: those of the plan, else 1)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no cell after so long")
    parser.add_argument(
        "--part", type=part, default=(1, 1), metavar="K/N", help="measure part K of N, for jobs that share the cells"
    )
    parser.add_argument("--list", action="store_true", help="only say what is recorded and what the rest would take")
    parser.add_argument("--verify", type=int, metavar="N", help="measure N recorded cells again and compare")
    parser.add_argument("--report", metavar="FILE", help="where --verify writes what it found, as JSON")
    parser.add_argument("--draw", type=int, default=0, help="seed that draws the cells of --verify")


def part(text: str) -> tuple[int, int]:
    """The part K of N that "K/N" names, for argparse."""
    number, slash, parts = text.partition("/")
    if not (slash and number.isdecimal() and parts.isdecimal() and 1 <= int(number) <= int(parts)):
        raise argparse.ArgumentTypeError(f"{text!r} is no part: write 2/8 for the second of eight")
    return int(number), int(parts)


def run(options: argparse.Namespace) -> int:
    # Imported here so that --help answers at once.
    from .run import run as measure

    return measure(options)
