"""Command line of the embedded family; see ``python -m ecodiff.zoo --help``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..errors import EcoDiffError
from ..paths import data_dir, root


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m ecodiff.zoo", description="Train and check the embedded pipelines."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="ids of the recipes, and which of them have trained weights here")
    train = commands.add_parser("train", help="train a pipeline by its recipe (hours on a CPU; goes on after a kill)")
    train.add_argument("id", help="id of a recipe, such as openmoji-sdxl")
    train.add_argument("--smoke", action="store_true", help="a few steps of everything: shows that the recipe runs")
    train.add_argument("--runs", type=Path, default=root() / ".runs", help="folder of checkpoints (default: .runs)")
    train.add_argument("--out", type=Path, help="folder of the pipeline (default: data/models/ID)")
    evaluate = commands.add_parser("evaluate", help="measure what the model card states, and write the card")
    evaluate.add_argument("id")
    evaluate.add_argument("--prompts", type=int, default=200, help="number of one-object prompts (default: 200)")
    commands.add_parser("judge", help="fit the object probe on real scenes")
    check = commands.add_parser("check", help="verify checksums, load with plain diffusers, redraw one fixed picture")
    check.add_argument("id", nargs="?", help="only this pipeline")
    options = parser.parse_args(arguments)
    try:
        return _run(options)
    except EcoDiffError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    # Imported here so that --help answers at once.
    from . import build, store

    if options.command == "list":
        for name in build.recipe_ids():
            trained = (data_dir() / "models" / name / "model_index.json").exists()
            state = "trained" if trained else "not trained here"
            print(f"{name:24s} {build.load_recipe(name)['stands_for']:16s} {state}")
    elif options.command == "train":
        from .train import train

        recipe = build.load_recipe(options.id, options.smoke)
        pipe, log = train(recipe, options.runs / (options.id + ("-smoke" if options.smoke else "")))
        folder = options.out or (data_dir() / "models" / options.id)
        store.save(pipe, recipe, log, folder)
        print(f"saved to {folder}; next: python -m ecodiff.zoo evaluate {options.id}")
    elif options.command == "judge":
        from .card import fit_probe

        print(f"the probe names {100 * fit_probe():.1f} % of held-out real scenes")
        store.write_checksums()
    elif options.command == "evaluate":
        for name, value in store.evaluate(options.id, options.prompts).items():
            print(f"{name:32s} {value}")
    else:
        names = [options.id] if options.id else store.stored_ids()
        for name in names:
            print(f"{name}: {store.check(name)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
