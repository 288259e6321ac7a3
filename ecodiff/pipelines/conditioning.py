"""What a pipeline gives its denoiser besides the latents: encoded prompts, sizes, guidance; and latents of images."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ecodiff.errors import EcoDiffError

from .forward_hooks import replaced_forward
from .parts import one_denoiser, sampling_loop
from .prompts import NotJoined, collate, joined, joining_rule
from .running import private_copy


@torch.no_grad()
def through_vae(vae, pictures: Tensor) -> Tensor:
    """What the pipeline's VAE makes of pictures: encoded (mean) and decoded, uint8 as they came."""
    parts = [vae.decode(vae.encode(x.float() / 127.5 - 1).latent_dist.mean).sample for x in pictures.split(32)]
    return ((torch.cat(parts) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


@torch.no_grad()
def encode(pipe, pixels: Tensor) -> Tensor:
    """Mean latents of pictures (float [N, 3, H, W] in -1 … 1) as the denoiser sees them.

    Scaled for U-Nets, [N, C, h, w]; shifted and scaled for transformers; for FLUX also packed, [N, tokens, 4 C].
    """
    latents = pipe.vae.encode(pixels).latent_dist.mean
    if not hasattr(pipe, "transformer"):
        return latents * pipe.vae.config.scaling_factor
    latents = (latents - (pipe.vae.config.shift_factor or 0.0)) * pipe.vae.config.scaling_factor
    return pipe._pack_latents(latents, *latents.shape) if hasattr(pipe, "_pack_latents") else latents


@dataclass(frozen=True)
class Condition:
    """``arguments`` of a denoiser's call beside latents and time (fp32, for one picture), the ``shape`` of the latents
    without batch dimension, and ``full_time``, the time the denoiser is told where all is noise."""

    arguments: dict
    shape: torch.Size
    full_time: float


def conditioning(pipe, caption: str | Mapping | list, size: Sequence[int], call: Mapping) -> Condition:
    """What the pipeline's own call tells its denoiser for one caption (or for a list of some, together) and pictures of
    this size (height, width).

    Found in the first denoiser call of its sampling loop, which then ends: so text encoders, sizes, ids and guidance
    are those that pictures are drawn with, for any pipeline. ``call`` holds further arguments of the pipeline's call; a
    guidance_scale among them counts only for a denoiser that reads it. Raises EcoDiffError where the call lacks an
    argument or does not call its denoiser with the captions by themselves.
    """
    network, runner, loop = one_denoiser(pipe, "conditioning"), private_copy(pipe), sampling_loop(pipe)
    captions = caption if isinstance(caption, list) else [caption]
    arguments = {**call, **collate(captions)}
    arguments |= {"height": size[0], "width": size[1], "num_inference_steps": 2, "output_type": "latent"}
    known = inspect.signature(loop).parameters
    unknown = sorted(arguments.keys() - known.keys())
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        unknown = [name for name in unknown if name in call]  # what every call is given may go to its **kwargs
    if unknown:
        raise EcoDiffError(f"The call of {type(pipe).__name__} has no argument {unknown[0]!r}.")
    if "guidance_scale" in known and not network.config.get("guidance_embeds"):
        arguments["guidance_scale"] = 1.0  # the caption alone, without the empty one beside it

    def wrap(forward):
        def tell(*args, **kwargs):
            raise _FirstCall(inspect.signature(forward).bind(*args, **kwargs).arguments)

        return tell

    found: dict = {}
    with torch.no_grad(), replaced_forward(network, wrap):
        try:
            generators = [torch.Generator().manual_seed(0) for _ in captions]
            loop(runner, generator=generators if len(captions) > 1 else generators[0], **arguments)
        except _FirstCall as first:
            found = first.args[0]
        except ValueError as error:  # what the pipeline's own check of its arguments raises
            raise EcoDiffError(f"{type(pipe).__name__} cannot draw {caption!r} at {list(size)}: {error}") from error
    if len(sample := found.pop(next(iter(found), ""), ())) != len(captions):
        raise EcoDiffError(f"{type(pipe).__name__} does not call its denoiser with one caption by itself.")
    time, scheduler = found.pop("timestep").flatten()[0].item(), runner.scheduler
    full_time = time / scheduler.timesteps[0].item() * scheduler.config.num_train_timesteps
    given = {name: value for name, value in found.items() if value is not None and name != "return_dict"}
    return Condition(tree_map(_single_precision, given), sample.shape[1:], round(full_time, 3))


class _FirstCall(Exception):
    """Ends a sampling loop; carries the arguments of its denoiser call."""


def _single_precision(value):
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def rule_of_joining(pipe, captions: Sequence, conditions: Sequence[Condition], size: Sequence[int], call: Mapping):
    """How the conditions of single captions make those of a batch, found with two captions; None where they do not."""
    second = next((i for i in range(1, len(captions)) if _name(captions[i]) != _name(captions[0])), len(captions) - 1)
    if second == 0:
        return None
    try:
        own = conditioning(pipe, [captions[0], captions[second]], size, call)
        return joining_rule(conditions[0].arguments, conditions[second].arguments, own.arguments)
    except (EcoDiffError, RuntimeError):  # such as mappings whose tensors cannot be put together
        return None


def join(conditions: Sequence[Condition], rule) -> dict:
    """The denoiser's arguments for several captions as one batch, by ``rule_of_joining``. Raises `NotJoined`."""
    if len(conditions) == 1:
        return conditions[0].arguments
    if rule is None:
        raise NotJoined("the conditions of these captions do not make a batch")
    return joined([condition.arguments for condition in conditions], rule)


def _name(caption: str | Mapping):
    return caption if isinstance(caption, str) else id(caption)
