"""Images of any diffusers pipeline, each a function of its own prompt and seed.

An image's noise comes from a generator of its own, and each prompt is encoded alone, so neither the batch size nor the
order nor the other prompts change the image. What remains is float rounding: libraries sum in another order for another
batch shape. In fp32 the tests hold that to 1/255 on tiny pipelines; half precision can give more. Images of the same
set in another order are equal bit for bit, because they are generated in one fixed order.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ecodiff.errors import EcoDiffError
from ecodiff.pipelines.batches import form_of_samples, in_batches, say_one_by_one
from ecodiff.pipelines.checks import checked_call, checked_guidance, checked_seed
from ecodiff.pipelines.contents import Undescribed, describe, of_pipeline
from ecodiff.pipelines.endings import FAULTS, failed
from ecodiff.pipelines.prompts import NotJoined, checked_prompts, encoding_once
from ecodiff.pipelines.running import frozen, private_copy
from ecodiff.progress import progress_bar
from ecodiff.storage.cache import cached
from ecodiff.storage.fingerprint import canonical

_OURS = ("prompt", "generator", "latents", "output_type", "return_dict", "num_images_per_prompt")


def generate(
    pipe,
    prompts: Sequence[str | Mapping],
    seeds: Sequence[int],
    *,
    batch_size: int = 32,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    cache_dir: str | os.PathLike | None = None,
    progress: bool = True,
    **call_kwargs,
) -> Tensor:
    """One image for each prompt and its seed, uint8 [N, 3, height, width]; ``pipe`` is left as it was.

    A pipeline of clips gives [N, frames, 3, height, width].

    Args:
        pipe: a diffusers pipeline of images or clips; it runs on the device it is on.
        prompts: N prompts; or, for pipelines without text encoders, N mappings with the call's arguments for one image
            (tensors with a leading dimension of 1, ``{"prompt_embeds": ...}``).
        seeds: N whole numbers, one a prompt. The noise is drawn on the CPU, the same for every device.
        batch_size: images in one call of the pipeline; changes time and memory, not the images (see above). Where the
            pipeline does not treat the images of a batch as it does single ones, they are generated one by one.
        num_inference_steps, guidance_scale: left out, the pipeline's own defaults.
        cache_dir: folder for finished images, filed under all that they depend on: prompts, seeds, settings, versions
            and, of the pipeline and its components, classes, configurations, weights and all that is set on their
            modules (adapters and their scales, FreeU, attention processors). Code of one's own (a hook, a processor, a
            callback) shows in none of these: then nothing is cached, and a warning says what it is.
        progress: show a bar, counted in images; the pipeline's own bar is silent either way.
        **call_kwargs: further arguments of the pipeline's call, the same for all images (``height``,
            ``negative_prompt``).

    Raises:
        EcoDiffError: no prompts, an empty prompt, numbers of prompts and seeds that differ, an argument that is set
            here, a call of the pipeline that fails, images with values that are not finite, or a damaged cache file.
    """
    prompts, seeds = _checked(prompts, seeds)
    settings = _settings(batch_size, num_inference_steps, guidance_scale, call_kwargs)

    # One fixed order, each different image once: a permutation of the arguments cannot change a bit.
    try:
        names = [(canonical(describe(prompt, "a prompt")), seed) for prompt, seed in zip(prompts, seeds, strict=True)]
        undescribed = None
    except Undescribed as error:  # then each is another one, in the order that was given
        names = [(f"{number:09d}", seed) for number, seed in enumerate(seeds)]
        undescribed = error
    by_name = dict(zip(names, prompts, strict=True))
    order = sorted(by_name)
    request = {}
    if cache_dir is not None:
        try:
            if undescribed:
                raise undescribed
            request = {"pictures": order, "settings": describe(settings, "call"), "pipeline": of_pipeline(pipe)}
        except Undescribed as error:
            warnings.warn(f"The images of this {type(pipe).__name__} are not cached: {error}.", stacklevel=2)
            cache_dir = None

    def compute() -> Tensor:
        parts: list[Tensor] = []
        pairs = [(by_name[name], name[1]) for name in order]
        _run(pipe, pairs, lambda numbers, images: parts.append(images), batch_size, settings, progress)
        return torch.cat(parts)

    images = cached(cache_dir, "pictures", request, compute)
    position = {name: i for i, name in enumerate(order)}
    return images[[position[name] for name in names]]


def generate_each(
    pipe,
    prompts: Sequence[str | Mapping],
    seeds: Sequence[int],
    each: Callable[[list[int], Tensor], None],
    *,
    batch_size: int = 32,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    progress: bool = True,
    **call_kwargs,
) -> None:
    """Generate as `generate` does, in the order given, and hand over each batch as soon as it is there.

    each: gets the numbers of some prompts, and their images, uint8 [numbers, 3, height, width].
    """
    prompts, seeds = _checked(prompts, seeds)
    settings = _settings(batch_size, num_inference_steps, guidance_scale, call_kwargs)
    _run(pipe, list(zip(prompts, seeds, strict=True)), each, batch_size, settings, progress)


def _run(pipe, pairs: list, each: Callable, batch_size: int, settings: dict, progress: bool) -> None:
    """Hand over the numbers and images of pairs (prompt, seed), batch by batch."""
    runner = encoding_once(private_copy(pipe))  # silent, with a scheduler of its own
    modules = [part for part in pipe.components.values() if isinstance(part, nn.Module)]

    alone: list[str] = []  # why images are generated one by one

    def run(numbers: list[int]) -> None:
        batch = [pairs[number] for number in numbers]
        if alone and len(batch) > 1:
            raise NotJoined(alone[0])
        generators = [torch.Generator().manual_seed(seed) for _, seed in batch]
        arguments = form.arguments([prompt for prompt, _ in batch], generators)
        try:
            images = runner(output_type="pt", return_dict=False, **arguments, **settings)[0]
        except (EcoDiffError, torch.OutOfMemoryError):
            raise
        except FAULTS as error:
            if len(batch) == 1:
                raise failed(pipe, error) from error
            alone.append(f"a call with {len(batch)} prompts fails ({type(error).__name__}: {error})")
            say_one_by_one(pipe, alone[0])
            raise NotJoined(alone[0]) from error
        if not torch.isfinite(images).all():
            raise EcoDiffError(
                f"{type(pipe).__name__} drew values that are not finite: check its weights, or give its VAE a wider "
                "dtype."
            )
        each(numbers, (images.float().clamp(0, 1) * 255).round().to(torch.uint8).cpu())
        bar.update(len(batch))

    with frozen(*modules), progress_bar(total=len(pairs), desc="pictures", progress=progress) as bar:
        form = form_of_samples(batch_size, runner, [prompt for prompt, _ in pairs], output_type="pt", **settings)
        in_batches(range(len(pairs)), form.size, run)


def _settings(batch_size: int, steps: int | None, guidance_scale: float | None, call_kwargs: Mapping) -> dict:
    """The arguments of the pipeline's call that all images share; raises EcoDiffError for those that are none."""
    if batch_size < 1:
        raise EcoDiffError(f"batch_size={batch_size}: a call of the pipeline needs at least one picture.")
    doubled = sorted(set(_OURS) & call_kwargs.keys())
    if doubled:
        raise EcoDiffError(f"generate sets {doubled[0]!r} itself: leave it out of the arguments.")
    checked_guidance(guidance_scale, "generate")
    checked_call(call_kwargs, "generate")
    settings = dict(call_kwargs)
    if steps is not None:
        settings["num_inference_steps"] = steps
    if guidance_scale is not None:
        settings["guidance_scale"] = guidance_scale
    return settings


def _checked(prompts, seeds) -> tuple[list, list[int]]:
    prompts = checked_prompts(prompts, "generate")
    try:
        seeds = [checked_seed(seed, "generate") for seed in seeds]
    except TypeError as error:
        raise EcoDiffError("generate needs a list of seeds, one whole number per prompt.") from error
    if len(seeds) != len(prompts):
        raise EcoDiffError(f"{len(prompts)} prompts but {len(seeds)} seeds: generate needs one seed per prompt.")
    return prompts, seeds
