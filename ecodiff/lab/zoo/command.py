"""Train, measure and check the embedded models.

python -m ecodiff zoo list
python -m ecodiff zoo train openmoji-sdxl
python -m ecodiff zoo check
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from ecodiff.errors import EcoDiffError
from ecodiff.storage.paths import data_dir, root

SHORT = {"distill": "openmoji-flux-schnell", "judge": "openmoji-clip"}  # commands that train one model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="action", required=True)
    commands.add_parser("list", help="ids of the recipes, and which of them have trained weights here")
    train = commands.add_parser("train", help="train a model by its recipe (goes on after a kill)")
    train.add_argument("id", help="id of a recipe, such as openmoji-sdxl; or all, each after those it starts from")
    distil = commands.add_parser("distill", help=f"train {SHORT['distill']}, from its teacher")
    judge = commands.add_parser("judge", help=f"train {SHORT['judge']}, then fit the object probe, on real scenes")
    for command in (train, distil, judge):
        command.add_argument("--smoke", action="store_true", help="a few steps of everything: shows that it runs")
        command.add_argument("--go-on", action="store_true", help="train a stored model by its new stages")
        command.add_argument("--runs", type=Path, default=root() / ".runs", help="checkpoints (default: .runs)")
        command.add_argument("--models", type=Path, help="trained models to start from (default: data/models)")
        command.add_argument("--out", type=Path, help="folder of the result (default: ID in the folder of the models)")
    evaluate = commands.add_parser("evaluate", help="measure what the model card states, and write the card")
    evaluate.add_argument("id")
    evaluate.add_argument("--prompts", type=int, default=500, help="captions an evaluation set (default: 500)")
    evaluate.add_argument(
        "--seeds", type=int, default=3, help="noises per prompt; clips: so many times the prompts (default: 3)"
    )
    check = commands.add_parser("check", help="verify checksums, load plainly, generate one fixed image each")
    check.add_argument("id", nargs="?", help="only this model")


def run(options: argparse.Namespace) -> int:
    # Imported here so that --help answers at once.
    from . import recipes, store

    if options.action == "list":
        stored = store.stored_ids()
        for name in recipes.recipe_ids():
            state = "trained" if name in stored else "not trained here"
            print(f"{name:24s} {recipes.load_recipe(name)['stands_for']:20s} {state}")
    elif options.action in ("train", *SHORT):
        names = [SHORT.get(options.action) or options.id]
        if names == ["all"]:
            if options.out:
                raise EcoDiffError("--out names one folder, but several models are trained: give --models.")
            names = recipes.training_order()
        for name in names:
            _train(name, options)
        if options.action == "judge" and not options.smoke:
            from .card import fit_probe

            print(f"the probe names {100 * fit_probe():.1f} % of held-out real scenes")
            store.write_checksums()
    elif options.action == "evaluate":
        for name, value in store.evaluate(options.id, options.prompts, options.seeds).items():
            print(f"{name:56s} {value}")
    else:
        names = store.stored_ids()
        if options.id:
            names = [options.id]
        for name in names:
            print(f"{name}: {store.check(name)}")
    return 0


def _train(name: str, options: argparse.Namespace) -> None:
    from . import recipes, store
    from .train import plan, train

    recipe = recipes.load_recipe(name, options.smoke)
    if options.smoke:  # it starts afresh, from smoke models, and never writes where trained models are kept
        checkpoints, models = options.runs / f"{name}-smoke", options.runs / "smoke"
        shutil.rmtree(checkpoints, ignore_errors=True)
    else:
        checkpoints, models = options.runs / name, data_dir() / "models"
    if options.models:
        models = options.models
    print(plan(recipe), flush=True)
    model, log = train(recipe, checkpoints, models, options.go_on)
    folder = options.out or models / name
    store.save(model, recipe, log, folder)
    saved = f"saved to {folder}"
    if not options.smoke:
        saved += f"; next: python -m ecodiff zoo evaluate {name}"
    print(saved, flush=True)
