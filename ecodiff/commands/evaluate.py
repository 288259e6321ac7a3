"""Measure how close images of a pruned pipeline are to those of the original one.

Both are pipelines, or folders of images that `generate` wrote for the same prompts and seeds. Processes that a launcher
starts (accelerate launch -m ecodiff evaluate ...) share the images.

example: python -m ecodiff evaluate openmoji-sdxl-20 openmoji-sdxl --prompts prompts.txt --steps 8
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from ecodiff import processes
from ecodiff.errors import EcoDiffError

from . import options as shared
from .generate import add_sampling, sampling_of, settings_of

if TYPE_CHECKING:
    from torch import Tensor

    from ecodiff.comparison.result import Comparison


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

    real = None if options.real is None else processes.of_first(partial(_real, options.real))
    # Each process measures its own images; what it found is gathered in the order of all images.
    sets = both(options)
    own = None
    equal: list[bool] = []
    if sets.prompts:
        own = of_images((sets.first, sets.second), sets.prompts, sets.seeds, judge=options.clip)
        equal = (sets.first == sets.second).flatten(1).all(1).tolist()
    comparison = gathered(own)
    found: dict = {"images": len(comparison.prompts), **measures(comparison)}
    found["equal images"] = sum(processes.gathered(equal))
    if options.fid or real is not None:
        second, first = (features_of(images) for images in (sets.second, sets.first))
    if options.fid:
        found["FID"] = processes.of_first(partial(metrics.fid, second, first))
        found["KID"], found["KID, standard deviation"] = processes.of_first(partial(metrics.kid, second, first))
    if real is not None:
        found |= processes.of_first(partial(_to_real, real, first, second))
    if options.each:
        found["each"] = {"SSIM": comparison.ssim, "PSNR in dB": comparison.psnr}
    return found


def measures(comparison: Comparison) -> dict[str, dict[str, float]]:
    """The means of a comparison and the ends of their intervals, as a command returns them."""
    found = {}
    for name, interval in comparison.intervals().items():
        found[name] = {"mean": interval.mean, "low": interval.low, "high": interval.high}
    return found


def gathered(own: Comparison | None) -> Comparison:
    """The measures of the images of all processes, from those of this process's own (None where it has none)."""
    if own is not None and processes.count() == 1:
        return own
    import torch

    from ecodiff.comparison.result import Comparison

    values: dict[str, Any] = {}
    for name in ("prompts", "seeds", "ssim", "psnr"):
        values[name] = processes.gathered(getattr(own, name) if own else [])
    scores = processes.gathered(list(zip(*own.clip, strict=True)) if own and own.clip else [])
    if scores:
        values["clip"] = tuple(list(each) for each in zip(*scores, strict=True))
    nothing = torch.empty(0)
    return Comparison(names=("first", "second"), images=(nothing, nothing), **values)


def features_of(images) -> Tensor:
    """Inception features of the images of all processes; ``images`` are this process's own (None where it has none).

    The frames of clips count as images.
    """
    import torch

    from ecodiff import metrics

    own = [] if images is None else [row.clone() for row in metrics.inception_features(images.flatten(0, -4))]
    return torch.stack(processes.gathered(own))


def _real(path: str):
    """Stored statistics, or the features of the images of a folder. Raises EcoDiffError for anything else."""
    from ecodiff import metrics

    if os.path.isdir(path):
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
    """This process's images of the first and of the second, uint8 [N, 3, height, width], with what they show.

    They are None in a process that has none, because there are more processes than images.
    """

    first: Any
    second: Any
    prompts: list[str]
    seeds: list[int]
    costs: tuple[dict, dict]


def both(options: argparse.Namespace) -> Sets:
    """The images of both, of many processes each its own; they are generated where a pipeline is given.

    Raises EcoDiffError where they are not of the same prompts and seeds.
    """
    from ecodiff.comparison.compare import cost_of
    from ecodiff.method.generate import generate
    from ecodiff.pipelines.running import on_device
    from ecodiff.storage.images import ABOUT, read_about, read_images

    names = [options.first, options.second]
    folders = [name for name in names if os.path.isfile(os.path.join(name, ABOUT))]
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
    settings = settings_of(options)
    if len(folders) == 1 and abouts[0].settings != settings:
        raise EcoDiffError(
            f"{folders[0]}: its images were generated with {_in_words(abouts[0].settings)}, and the others would be "
            f"with {_in_words(settings)}: give the same --steps, --guidance and --call."
        )
    sets: list[Any] = []
    costs: list[dict] = []
    numbers = processes.own(range(len(prompts)))
    prompts, seeds = list(processes.own(prompts)), list(processes.own(seeds))
    for name in names:
        if not prompts:
            sets.append(None)
        elif name in folders:
            sets.append(read_images(name, numbers)[0])
        else:
            pipe = shared.load_model(options, name)
            with on_device(pipe, "evaluate", many=True):
                sets.append(generate(pipe, prompts, seeds, **sampling_of(options)))
            costs.append(cost_of(pipe))
    both_costs = (costs[0], costs[1]) if len(costs) == 2 else ({}, {})
    return Sets(sets[0], sets[1], prompts, seeds, both_costs)


def _in_words(settings: dict) -> str:
    return ", ".join(f"{name}={value}" for name, value in settings.items()) or "the pipeline's own settings"
