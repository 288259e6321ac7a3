"""Generate one image, or clip, for each prompt, into a folder.

A clip is kept as an animated PNG. Image i comes from prompt i and the noise of seed SEED + i. An interrupted run goes
on where it was. Processes that a launcher starts (accelerate launch -m ecodiff generate ...) share the prompts.

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
    from ecodiff.method.generate import generate_each
    from ecodiff.pipelines.running import on_device
    from ecodiff.storage.images import ImageFolder

    out = shared.check_target(options.out, folder=True)
    prompts = shared.read(options)
    sampling = sampling_of(options)  # complains before anything is loaded
    pipe = shared.load_model(options)
    seeds = list(range(options.seed, options.seed + len(prompts)))
    about = processes.of_first(partial(_about, pipe, prompts, seeds, options))
    folder = ImageFolder(out, about)
    with ExitStack() as stack:
        stack.enter_context(on_device(pipe, "generate", many=True))
        processes.of_first(partial(_enter, stack, folder))
        missing = processes.of_first(folder.missing)
        mine = processes.own(missing)

        def write(numbers: list[int], images) -> None:
            for number, image in zip(numbers, images, strict=True):
                folder.write(mine[number], image)

        if mine:
            generate_each(pipe, [prompts[n] for n in mine], [seeds[n] for n in mine], write, **sampling)
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
    from ecodiff.storage.fingerprint import key
    from ecodiff.storage.images import About

    try:
        weights = key(describe(of_pipeline(pipe)))[:16]
    except Undescribed:
        weights = None
    return About(prompts, seeds, settings_of(options), options.model, weights)


def settings_of(options: argparse.Namespace) -> dict:
    """The arguments of the pipeline's call. Raises EcoDiffError for one that has an option of its own."""
    doubled = {"num_inference_steps", "guidance_scale"} & options.call.keys()
    if doubled:
        raise EcoDiffError(f"--call {min(doubled)}=...: give it as --steps or --guidance.")
    settings = dict(options.call)
    if options.steps is not None:
        settings["num_inference_steps"] = options.steps
    if options.guidance is not None:
        settings["guidance_scale"] = options.guidance
    return settings


def sampling_of(options: argparse.Namespace) -> dict:
    """The arguments of `ecodiff.generate` beside the pipeline, the prompts and the seeds."""
    return {"batch_size": options.batch_size, **settings_of(options)}
