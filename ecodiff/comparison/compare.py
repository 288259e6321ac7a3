"""The images of two pipelines for the same prompts and noise, compared pair by pair."""

from __future__ import annotations

import os
from collections.abc import Sequence

from torch import Tensor

from ecodiff import metrics
from ecodiff.cost.trace import parameters
from ecodiff.errors import EcoDiffError
from ecodiff.method.generate import generate
from ecodiff.pipelines.parts import denoiser

from .result import PSNR_OF_EQUALS, Comparison


def compare(
    first,
    second,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int] | None = None,
    names: tuple[str, str] = ("first", "second"),
    judge=None,
    progress: bool = True,
    **sampling,
) -> Comparison:
    """Generate with both pipelines from the same prompts and noise, and measure how far the images are apart.

    Args:
        first, second: diffusers pipelines, such as a pruned one and the original.
        prompts: N prompts.
        seeds: N seeds (None: 0 to N - 1).
        names: what the page calls the two.
        judge: a CLIP judge (`ecodiff.metrics.clip.Judge`), or its name or folder, for CLIP scores.
        progress: show bars.
        **sampling: arguments of `ecodiff.generate`: num_inference_steps, guidance_scale, batch_size, height, ...

    Raises EcoDiffError as `generate` does, and where the images of the two differ in size.
    """
    prompts = list(prompts)
    seeds = list(range(len(prompts))) if seeds is None else list(seeds)
    both = [generate(pipe, prompts, seeds, progress=progress, **sampling) for pipe in (first, second)]
    costs = (cost_of(first), cost_of(second))
    return of_images((both[0], both[1]), prompts, seeds, names=names, judge=judge, costs=costs)


def of_images(
    images: tuple[Tensor, Tensor],
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    names: tuple[str, str] = ("first", "second"),
    judge=None,
    costs: tuple[dict, dict] = ({}, {}),
) -> Comparison:
    """The comparison of images that are there already, uint8 [N, 3, height, width] (clips: [N, frames, 3, ...])."""
    a, b = images
    if a.shape != b.shape:
        sizes = " and ".join(f"{len(each)} of {each.shape[-2]}x{each.shape[-1]}" for each in images)
        raise EcoDiffError(f"compare: images of one number and size are compared, not {sizes}.")
    clip = None
    if judge is not None:
        judge = metrics.Judge.load(judge) if isinstance(judge, (str, os.PathLike)) else judge
        clip = (_clip_scores(a, prompts, judge), _clip_scores(b, prompts, judge))
    return Comparison(
        names=names,
        prompts=list(prompts),
        seeds=list(seeds),
        images=images,
        ssim=metrics.ssim(a, b).tolist(),
        psnr=metrics.psnr(a, b).clamp(max=PSNR_OF_EQUALS).tolist(),
        clip=clip,
        costs=costs,
    )


def _clip_scores(images: Tensor, prompts: Sequence[str], judge) -> list[float]:
    """The CLIP score of each image with its prompt; of a clip, that of its frames."""
    scores = []
    for image, prompt in zip(images, prompts, strict=True):
        frames = image.reshape(-1, *image.shape[-3:])
        scores.append(metrics.clip_score(frames, [prompt] * len(frames), judge))
    return scores


def cost_of(pipe) -> dict:
    """Parameters and bytes of the denoiser."""
    network = denoiser(pipe)
    return {
        "parameters of the denoiser": parameters(network),
        "bytes of its weights": sum(part.numel() * part.element_size() for part in network.parameters()),
    }
