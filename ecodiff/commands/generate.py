"""Generate one image for each prompt, into a folder.

Image i comes from prompt i and the noise of seed SEED + i. An interrupted run goes on where it was. Processes that a
launcher starts (accelerate launch -m ecodiff generate ...) share the prompts.

example: python -m ecodiff generate openmoji-sdxl --prompts prompts.txt --steps 8 --out images
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from functools import partial

from ecodiff import processes
from ecodiff.errors import EcoDiffError

from . import options as shared


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shared.add_model(parser)
    shared.add_prompts(parser)
    parser.add_argument("--out", required=True, metavar="FOLDER", help="folder of the images")
    add_sampling(parser)


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """How images are generated."""
    parser.add_argument("--seed", type=int, default=0, help="seed of the first image (default: 0)")
    parser.add_argument("--steps", type=shared.whole_number, help="denoising steps (default: the pipeline's own)")
    parser.add_argument("--guidance", type=float, help="guidance scale (default: the pipeline's own)")
    parser.add_argument("--batch-size", type=shared.whole_number, default=8, help="images in one call (default: 8)")
    parser.add_argument("--call", nargs="+", action=shared.Pairs, metavar="NAME=VALUE", default={}, help=shared.CALL)


def run(options: argparse.Namespace) -> dict:
    from ecodiff.pipelines.running import on_device
    from ecodiff.storage.images import ImageFolder

    out = shared.check_target(options.out, folder=True)
    prompts = shared.read(options)
    pipe = shared.load_model(options)
    seeds = list(range(options.seed, options.seed + len(prompts)))
    about = processes.of_first(partial(_about, pipe, prompts, seeds, options))
    folder = ImageFolder(out, about)
    with ExitStack() as stack:
        stack.enter_context(on_device(pipe, "generate", many=True))
        processes.of_first(partial(_enter, stack, folder))
        missing = processes.of_first(folder.missing)
        mine = processes.own(missing)
        for start in range(0, len(mine), options.batch_size):
            numbers = mine[start : start + options.batch_size]
            images = images_of(pipe, [prompts[n] for n in numbers], [seeds[n] for n in numbers], options)
            for number, image in zip(numbers, images, strict=True):
                folder.write(number, image)
        processes.wait()
    lost = processes.of_first(folder.missing)
    if lost:
        raise EcoDiffError(f"{out}: {len(lost)} images are not there: give a folder that all machines see.")
    return {"folder": str(out), "images": len(prompts), "generated now": len(missing)}


def _enter(stack: ExitStack, folder) -> None:
    """Have the folder for this run until the end."""
    stack.enter_context(folder)


def _about(pipe, prompts: list[str], seeds: list[int], options: argparse.Namespace):
    """What the images show, and how they are made."""
    from ecodiff.pipelines.contents import Undescribed, describe, of_pipeline
    from ecodiff.storage.fingerprint import canonical
    from ecodiff.storage.images import About, digest

    try:
        weights = digest(canonical(describe(of_pipeline(pipe))))
    except Undescribed:
        weights = None
    return About(prompts, seeds, settings_of(options), options.model, weights)


def settings_of(options: argparse.Namespace) -> dict:
    """The arguments of the pipeline's call."""
    settings = dict(options.call)
    if options.steps is not None:
        settings["num_inference_steps"] = options.steps
    if options.guidance is not None:
        settings["guidance_scale"] = options.guidance
    return settings


def images_of(pipe, prompts: list[str], seeds: list[int], options: argparse.Namespace):
    """Images of the prompts and seeds, uint8 [N, 3, height, width]."""
    from ecodiff.method.generate import generate

    settings = settings_of(options)
    doubled = {"num_inference_steps", "guidance_scale"} & options.call.keys()
    if doubled:
        raise EcoDiffError(f"--call {min(doubled)}=...: give it as --steps or --guidance.")
    return generate(pipe, prompts, seeds, batch_size=options.batch_size, **settings)
