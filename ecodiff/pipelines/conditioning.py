"""What a pipeline gives its denoiser besides the latents: encoded prompts, sizes, guidance; and latents of images."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ecodiff.errors import EcoDiffError

from .endings import FAULTS, count_steps, last_latents
from .forward_hooks import replaced_forward
from .parts import one_denoiser, sampling_loop
from .prompts import NotJoined, collate, differ, joined, joining_rule
from .running import private_copy


@torch.no_grad()
def through_vae(vae, images: Tensor) -> Tensor:
    """What a VAE makes of images (uint8 [N, 3, H, W]): encoded to the mean and decoded, in the same form."""
    parts = []
    for part in images.split(32):
        latents = vae.encode(part.float() / 127.5 - 1).latent_dist.mean
        parts.append(vae.decode(latents).sample)
    return ((torch.cat(parts) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


@torch.no_grad()
def encode(pipe, pixels: Tensor) -> Tensor:
    """Mean latents of images (float [N, 3, H, W] in -1 … 1), or of clips [N, 3, F, H, W], as the denoiser sees them.

    They are shifted, scaled and packed as `as_read` says; a VAE of videos takes an image as a clip of one frame.
    """
    if pixels.ndim == 4 and any(isinstance(part, nn.Conv3d) for part in pipe.vae.modules()):
        pixels = pixels.unsqueeze(2)
    return as_read(pipe, pipe.vae.encode(pixels).latent_dist.mean)


def as_read(pipe, latents: Tensor) -> Tensor:
    """A VAE's latents [N, C, h, w] or [N, C, f, h, w] as the pipeline's denoiser reads them.

    Where the VAE's config has a mean and a standard deviation of each channel, these go; else a transformer's latents
    are shifted. Then all are scaled. FLUX and Qwen-Image pack them, [N, tokens, 4 C].
    """
    config = pipe.vae.config
    scale = config.get("scaling_factor") or 1.0
    if config.get("latents_mean") is not None and config.get("latents_std") is not None:
        shape = (1, -1, *[1] * (latents.ndim - 2))
        mean, std = (latents.new_tensor(config[name]).view(shape) for name in ("latents_mean", "latents_std"))
        latents = (latents - mean) * scale / std
    else:
        shift = config.get("shift_factor") or 0.0
        latents = (latents - (shift if hasattr(pipe, "transformer") else 0.0)) * scale
    if hasattr(pipe, "_pack_latents"):
        return pipe._pack_latents(latents, *latents.shape[:2], *latents.shape[-2:])
    return latents


@torch.no_grad()
def reads_as_said(pipe, prompt: str | Mapping, size: Sequence[int], call: Mapping) -> bool:
    """Whether `as_read` turns what the pipeline gives its VAE to decode back into its final latents.

    Two calls of one step each, with the same noise: one ends with latents, the other one decodes them.
    """
    runner, vae, given = private_copy(pipe), pipe.vae, []
    arguments = {**call, **collate([prompt]), **size_of(runner, size, call), "num_inference_steps": 2}
    watch = count_steps(runner.scheduler)
    latents = last_latents(runner, watch, sampling_loop(pipe), {**arguments, "generator": _generator()})
    decode, own = vae.decode, vars(vae).get("decode")

    def noted(z: Tensor, *args, **kwargs):
        given.append(z)
        return decode(z, *args, **kwargs)

    vars(vae)["decode"] = noted
    try:
        sampling_loop(pipe)(runner, generator=_generator(), output_type="pt", **arguments)
    except FAULTS:  # what is decoded is known by then, whatever becomes of it
        if not given:
            raise
    finally:
        del vars(vae)["decode"]
        if own is not None:
            vars(vae)["decode"] = own
    again = as_read(pipe, torch.cat(given).float())
    # Half precision rounds what is decoded by less than a hundredth.
    return again.shape == latents.shape and bool((again - latents.float()).norm() < 0.02 * latents.float().norm())


def size_of(pipe, size: Sequence[int], call: Mapping) -> dict[str, int]:
    """The arguments of a pipeline's call that say what it draws: height and width, of clips also the frames.

    ``size``: (height, width) or (frames, height, width). A number of frames in ``call`` counts for images as well.
    """
    *frames, height, width = size
    arguments = {"height": height, "width": width}
    if "num_frames" in inspect.signature(sampling_loop(pipe)).parameters:
        arguments["num_frames"] = frames[0] if frames else call.get("num_frames", 1)
    return arguments


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@dataclass(frozen=True)
class Condition:
    """What a denoiser's call is told beside latents and time."""

    arguments: dict  # fp32, for one image
    shape: torch.Size  # of the latents, without batch dimension
    full_time: float  # the time that the denoiser is told where all is noise


def conditioning(pipe, prompt: str | Mapping | list, size: Sequence[int], call: Mapping) -> Condition:
    """What the pipeline's own call tells its denoiser for a prompt, or for a list of prompts in one call.

    It is found in the first denoiser call of the sampling loop, which then ends: so text encoders, sizes, ids and
    guidance are those that images are generated with, for any pipeline. ``size``: as in `size_of`.
    ``call`` holds further arguments of the pipeline's call; a guidance_scale among them counts only for a denoiser that
    reads it. Raises EcoDiffError where the call lacks an argument or does not call its denoiser with the prompts by
    themselves.
    """
    network, runner, loop = one_denoiser(pipe, "conditioning"), private_copy(pipe), sampling_loop(pipe)
    prompts = prompt if isinstance(prompt, list) else [prompt]
    arguments = {**call, **collate(prompts)}
    arguments |= {**size_of(pipe, size, call), "num_inference_steps": 2, "output_type": "latent"}
    known = inspect.signature(loop).parameters
    unknown = sorted(arguments.keys() - known.keys())
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        unknown = [name for name in unknown if name in call]  # what every call is given may go to its **kwargs
    if unknown:
        raise EcoDiffError(f"The call of {type(pipe).__name__} has no argument {unknown[0]!r}.")
    if "guidance_scale" in known and not network.config.get("guidance_embeds"):
        arguments["guidance_scale"] = 1.0  # the prompt alone, without the empty one beside it
    generators = [_generator() for _ in prompts]

    def wrap(forward):
        def stop(*args, **kwargs):
            raise _FirstCall(inspect.signature(forward).bind(*args, **kwargs).arguments)

        return stop

    told: dict = {}
    with torch.no_grad(), replaced_forward(network, wrap):
        try:
            loop(runner, generator=generators if len(prompts) > 1 else generators[0], **arguments)
        except _FirstCall as first:
            told = first.args[0]
        except (EcoDiffError, torch.OutOfMemoryError):
            raise
        except FAULTS as error:  # such as what the pipeline's own check of its arguments raises
            raise EcoDiffError(f"{type(pipe).__name__} cannot draw {prompt!r} at {list(size)}: {error}") from error
    latents = told.pop(next(iter(told), ""), ())  # a denoiser's first argument
    if not isinstance(latents, Tensor) or len(latents) != len(prompts):
        raise EcoDiffError(f"{type(pipe).__name__} does not call its denoiser with one prompt by itself.")
    # The first step need not be at full noise. Pipelines tell the time in units of their own (FLUX in 0 … 1), so
    # it is scaled by what the scheduler calls it.
    if not isinstance(told.get("timestep"), Tensor):
        raise EcoDiffError(
            f"{type(pipe).__name__} does not tell its denoiser the time as an argument called timestep, so it cannot "
            "be trained by itself here: leave it as it is pruned, or train it with its own script."
        )
    time, scheduler = told.pop("timestep").flatten()[0].item(), runner.scheduler
    full_time = time / scheduler.timesteps[0].item() * scheduler.config.num_train_timesteps
    kept = {name: value for name, value in told.items() if value is not None and name != "return_dict"}
    return Condition(tree_map(_single_precision, kept), latents.shape[1:], round(full_time, 3))


class _FirstCall(Exception):
    """Ends a sampling loop; carries the arguments of its denoiser call."""


def _single_precision(value):
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.float()
    return value


def rule_of_joining(pipe, prompts: Sequence, conditions: Sequence[Condition], size: Sequence[int], call: Mapping):
    """How the conditions of single prompts make those of a batch, found with two of them; None where they do not."""
    if len(prompts) < 2:
        return None
    others = range(1, len(prompts))
    second = next((number for number in others if differ(prompts[number], prompts[0])), others[-1])
    try:
        own = conditioning(pipe, [prompts[0], prompts[second]], size, call)
        return joining_rule(conditions[0].arguments, conditions[second].arguments, own.arguments)
    except (EcoDiffError, RuntimeError):  # such as mappings whose tensors cannot be put together
        return None


def join(conditions: Sequence[Condition], rule) -> dict:
    """The denoiser's arguments for several prompts as one batch, by ``rule_of_joining``. Raises `NotJoined`."""
    if len(conditions) == 1:
        return conditions[0].arguments
    if rule is None:
        raise NotJoined("the conditions of these prompts do not make a batch")
    return joined([condition.arguments for condition in conditions], rule)
