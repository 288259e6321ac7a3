"""Measure how close images of a pruned pipeline are to those of the original one.

Both are pipelines, or folders of images that `generate` wrote for the same prompts and seeds.

example: python -m ecodiff evaluate openmoji-sdxl-20 openmoji-sdxl --prompts prompts.txt --steps 8
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ecodiff.errors import EcoDiffError

from . import options as shared
from .generate import add_sampling, images_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_both(parser)
    parser.add_argument("--fid", action="store_true", help="also FID and KID between both sets of images")
    parser.add_argument(
        "--real",
        metavar="PATH",
        help="also FID and KID of both to real images: a folder of any image files, or an .npz with mu and sigma",
    )
    parser.add_argument("--clip", metavar="MODEL", help="also the CLIP score of both, by this CLIP model")
    parser.add_argument("--each", action="store_true", help="also the values of each image (with --json)")


def add_both(parser: argparse.ArgumentParser) -> None:
    """Two pipelines or folders of images, and how images are generated."""
    shared.add_model(parser, "first")
    parser.add_argument("second", help="the original: a pipeline or a folder of images")
    shared.add_prompts(parser, required=False)
    add_sampling(parser)


def run(options: argparse.Namespace) -> dict:
    from ecodiff import metrics
    from ecodiff.comparison.compare import of_images

    real = None if options.real is None else _real(options.real)
    sets = both(options)
    comparison = of_images((sets.first, sets.second), sets.prompts, sets.seeds, judge=options.clip)
    found: dict = {"images": len(sets.prompts)}
    for name, interval in comparison.intervals().items():
        found[name] = {"mean": interval.mean, "low": interval.low, "high": interval.high}
    found["equal images"] = int((sets.first == sets.second).flatten(1).all(1).sum())
    if options.fid or real is not None:
        second, first = (metrics.inception_features(images) for images in (sets.second, sets.first))
    if options.fid:
        found["FID"] = metrics.fid(second, first)
        found["KID"], found["KID, standard deviation"] = metrics.kid(second, first)
    if real is not None:
        found |= _to_real(real, first, second)
    if options.each:
        found["each"] = {"SSIM": comparison.ssim, "PSNR in dB": comparison.psnr}
    return found


def _real(path: str):
    """Stored statistics, or the features of the images of a folder. Raises EcoDiffError for anything else."""
    from ecodiff import metrics

    if Path(path).is_dir():
        return metrics.real_images(path)
    return metrics.Statistics.load(path)


def _to_real(real, first, second) -> dict:
    """How far both sets of features are from the real images."""
    from ecodiff import metrics

    found: dict = {}
    if isinstance(real, metrics.RealImages):
        found |= {"real images": len(real.features), "real images, unreadable": len(real.unreadable)}
    for name, features in (("first", first), ("second", second)):
        if isinstance(real, metrics.Statistics):
            found[f"FID to real images, {name}"] = metrics.fid(real, features)
        else:
            found[f"FID to real images, {name}"] = metrics.fid(real.features, features)
            found[f"KID to real images, {name}"] = metrics.kid(real.features, features)[0]
    return found


@dataclass(frozen=True)
class Sets:
    """Images of the first and of the second, uint8 [N, 3, height, width], with what they show."""

    first: Any
    second: Any
    prompts: list[str]
    seeds: list[int]
    costs: tuple[dict, dict]


def both(options: argparse.Namespace) -> Sets:
    """The images of both; they are generated where a pipeline is given.

    Raises EcoDiffError where they are not of the same prompts and seeds.
    """
    from ecodiff.comparison.compare import cost_of
    from ecodiff.storage.images import ABOUT, read_about, read_images

    names = [options.first, options.second]
    folders = [name for name in names if (Path(name) / ABOUT).is_file()]
    abouts = [read_about(folder) for folder in folders]
    if abouts:
        prompts, seeds = abouts[0].prompts, abouts[0].seeds
    elif options.prompts is None:
        raise EcoDiffError("Images are generated from prompts: give --prompts FILE, or two folders of images.")
    else:
        prompts = shared.read(options)
        seeds = list(range(options.seed, options.seed + len(prompts)))
    for folder, about in zip(folders, abouts, strict=True):
        if (about.prompts, about.seeds) != (prompts, seeds):
            raise EcoDiffError(f"{folder}: its images are of other prompts or seeds than those of {folders[0]}.")
    sets, costs = [], []
    for name in names:
        if name in folders:
            sets.append(read_images(name)[0])
        else:
            pipe = shared.load_model(options, name)
            sets.append(images_of(pipe, prompts, seeds, options))
            costs.append(cost_of(pipe))
    both_costs = (costs[0], costs[1]) if len(costs) == 2 else ({}, {})
    return Sets(sets[0], sets[1], prompts, seeds, both_costs)
