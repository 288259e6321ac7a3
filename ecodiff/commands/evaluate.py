"""Measure how close images of a pruned pipeline are to those of the original one.

Both are pipelines, or folders of images that `generate` wrote for the same prompts and seeds.

example: python -m ecodiff evaluate openmoji-sdxl-20 openmoji-sdxl --prompts prompts.txt --steps 8
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ecodiff.errors import EcoDiffError

from . import options as shared
from .generate import add_sampling, images_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shared.add_model(parser, "first")
    parser.add_argument("second", help="the original: a pipeline or a folder of images")
    shared.add_prompts(parser, required=False)
    add_sampling(parser)
    parser.add_argument("--fid", action="store_true", help="also FID and KID between both sets of images")
    parser.add_argument("--clip", metavar="MODEL", help="also the CLIP score of both, by this CLIP model")
    parser.add_argument("--each", action="store_true", help="also the values of each image (with --json)")


def run(options: argparse.Namespace) -> dict:
    from ecodiff import metrics

    (first, prompts), (second, _) = both(options)
    found: dict = {"images": len(first)}
    for name, measure in (("ssim", metrics.ssim), ("psnr", metrics.psnr)):
        values = measure(first, second)
        finite = values.clamp(max=100)  # the PSNR of equal images is infinite; 100 dB stand for that
        interval = metrics.mean_interval(finite)
        found[name] = {"mean": interval.mean, "low": interval.low, "high": interval.high}
        if options.each:
            found[name]["each"] = finite.tolist()
    found["equal images"] = int((first == second).flatten(1).all(1).sum())
    if options.fid:
        features = [metrics.inception_features(images) for images in (second, first)]
        found["fid"] = metrics.fid(*features)
        found["kid"], found["kid standard deviation"] = metrics.kid(*features)
    if options.clip:
        judge = _judge(options.clip)
        found["clip score of the first"] = metrics.clip_score(first, prompts, judge)
        found["clip score of the second"] = metrics.clip_score(second, prompts, judge)
    return found


def both(options: argparse.Namespace) -> list[tuple]:
    """Images [N, 3, height, width] and prompts of the first and of the second.

    Raises EcoDiffError where they are not of the same prompts and seeds, or not of one size.
    """
    from ecodiff.storage.images import ABOUT, read_about, read_images

    names = [options.first, options.second]
    folders = [name for name in names if (Path(name) / ABOUT).is_file()]
    abouts = [read_about(folder) for folder in folders]
    if abouts:
        prompts, seeds = abouts[0].prompts, abouts[0].seeds
    elif options.prompts is None:
        raise EcoDiffError("evaluate generates images: give --prompts FILE, or two folders of images.")
    else:
        prompts = shared.read(options)
        seeds = list(range(options.seed, options.seed + len(prompts)))
    for folder, about in zip(folders, abouts, strict=True):
        if (about.prompts, about.seeds) != (prompts, seeds):
            raise EcoDiffError(f"{folder}: its images are of other prompts or seeds than those of {folders[0]}.")
    sets = []
    for name in names:
        if name in folders:
            images = read_images(name)[0]
        else:
            images = images_of(shared.load_model(options, name), prompts, seeds, options)
        sets.append((images, prompts))
    if sets[0][0].shape != sets[1][0].shape:
        sizes = [tuple(images.shape[-2:]) for images, _ in sets]
        raise EcoDiffError(f"{names[0]} has images of {sizes[0]} pixels, {names[1]} of {sizes[1]}: give one size.")
    return sets


def _judge(name: str):
    from ecodiff.metrics.clip import Judge

    return Judge.load(name)
