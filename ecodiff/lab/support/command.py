"""Try every denoiser and every pipeline class of the installed diffusers on tiny random instances.

    python -m ecodiff support                       what has no row of this code yet; stop it and go on as you like
    python -m ecodiff support FluxPipeline          one class, anew
    python -m ecodiff support --list                what is recorded, and how long the rest would take
    python -m ecodiff support --compare             try all again, print what differs, exit with 1 if anything does

Rows are kept in data/results/support.json, from which the page of the book is made.
"""

from __future__ import annotations

import argparse

SAME, DIFFERENT = 0, 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("classes", nargs="*", metavar="CLASS", help="names of classes (default: all that are left)")
    parser.add_argument("--list", action="store_true", help="only say what is recorded and what the rest would take")
    parser.add_argument("--compare", action="store_true", help="record nothing; compare with what is recorded")
    parser.add_argument("--seconds", type=float, default=600, help="time limit of a class (default: %(default)s)")


def run(options: argparse.Namespace) -> int:
    # Imported here so that --help answers at once.
    from . import run as trial
    from .page import sentence, totals

    names = options.classes or list(trial.classes())
    if not options.compare and not options.classes:
        names = trial.left(names)
    minutes = trial.estimate(names) / 60
    print(f"{len(names)} classes to try, about {minutes:.0f} minutes.", flush=True)
    if options.list:
        print(totals(trial.read()))
        return SAME
    recorded = trial.read()["rows"]
    different = 0
    for number, (name, row) in enumerate(trial.measure(names, options.seconds), 1):
        if options.compare:
            lines = trial.differences(recorded[name], row) if name in recorded else ["it is new"]
            for line in lines:
                print(f"{name}: {line}", flush=True)
            different += bool(lines)
            continue
        trial.record(name, row)
        print(f"{number}/{len(names)} {name}: {_summary(row)}", flush=True)
    if options.compare:
        gone = [] if options.classes else sorted(set(recorded) - set(names))
        for name in gone:
            print(f"{name}: diffusers has it no more")
        print(f"{different + len(gone)} of {len(names)} classes differ from what is recorded.")
        return DIFFERENT if different or gone else SAME
    print(totals(trial.read()))
    print(f"README and book/how-to-use.md have to say: {sentence(trial.read())}")
    return SAME


def _summary(row: dict) -> str:
    if "broken" in row:
        return row["broken"]
    failed = [f"{stage}: {reason}" for stage, reason in row["stages"].items() if reason is not True]
    return "; ".join(failed) or "all stages hold"
