"""Retrain a pruned pipeline on images that the original one generated.

The images are a folder that `generate` wrote with the original pipeline.

example: python -m ecodiff retrain openmoji-sdxl-20 --images images --steps 200 --lr 1e-4 --out openmoji-sdxl-20-lora
"""

from __future__ import annotations

import argparse

from . import options as shared


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from ecodiff.retraining.config import RetrainConfig

    shared.add_model(parser)
    parser.add_argument("--images", required=True, metavar="FOLDER", help="what `generate` wrote")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="folder of the retrained pipeline")
    shared.add_fields(parser, RetrainConfig)


def run(options: argparse.Namespace) -> dict:
    from ecodiff.hub.made import carry_made
    from ecodiff.retraining.config import RetrainConfig
    from ecodiff.retraining.retrain import retrain
    from ecodiff.storage.images import read_images

    out = shared.check_target(options.out, folder=True)
    config = shared.settings_from(options, RetrainConfig)
    images, about = read_images(options.images)
    history: list[dict] = []
    better = retrain(shared.load_model(options), images, about.prompts, config, history=history)
    better.save_pretrained(out)
    carry_made(
        options.model, out, better, f"retrained for {len(history)} steps on {len(images)} images of the original"
    )
    found: dict = {"folder": str(out), "steps": len(history), "images": len(images)}
    if history:
        found |= {"loss of the first step": history[0]["loss"], "loss of the last step": history[-1]["loss"]}
    return found
