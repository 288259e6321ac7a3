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
def encode(pipe, pixels: Tensor, shape: torch.Size | None = None) -> Tensor:
    """Mean latents of images (float [N, 3, H, W] in -1 … 1), or of clips [N, 3, F, H, W], as the denoiser sees them.

    They are shifted, scaled and packed as `as_read` says; a VAE of videos takes an image as a clip of one frame.
    ``shape``: of one sample, as the denoiser reads it, where that is known.
    """
    if pixels.ndim == 4 and any(isinstance(part, nn.Conv3d) for part in pipe.vae.modules()):
        pixels = pixels.unsqueeze(2)
    encoded = pipe.vae.encode(pixels)
    return as_read(pipe, encoded.latent_dist.mean if hasattr(encoded, "latent_dist") else encoded.latent, shape)


def as_read(pipe, latents: Tensor, shape: torch.Size | None = None) -> Tensor:
    """A VAE's latents [N, C, h, w] or [N, C, f, h, w] as the pipeline's denoiser reads them.

    Where the VAE knows a mean and a standard deviation of each channel, these go; else a transformer's latents are
    shifted. Then all are scaled. FLUX, Qwen-Image and LTX pack them, [N, tokens, channels]; FLUX.2 makes patches first.
    Frames come before channels where ``shape`` says so, as in CogVideoX.
    """
    if hasattr(pipe, "_patchify_latents"):
        latents = pipe._patchify_latents(latents)
    config, (mean, std) = pipe.vae.config, _statistics(pipe.vae)
    scale = config.get("scaling_factor") or 1.0
    if mean is not None:
        per_channel = (1, -1, *[1] * (latents.ndim - 2))
        mean, std = (torch.as_tensor(value).to(latents).view(per_channel) for value in (mean, std))
        latents = (latents - mean) * scale / std
    else:
        shift = config.get("shift_factor") or 0.0
        latents = (latents - (shift if hasattr(pipe, "transformer") else 0.0)) * scale
    if hasattr(pipe, "_pack_latents"):
        return _packed(pipe, latents)
    if shape is not None and latents.ndim == 5 and shape != latents.shape[1:]:
        frames_first = latents.transpose(1, 2)
        return frames_first if frames_first.shape[1:] == shape else latents
    return latents


def _packed(pipe, latents: Tensor) -> Tensor:
    """Latents packed by the pipeline's own function, whose arguments differ."""
    taken = inspect.signature(pipe._pack_latents).parameters
    if "patch_size" in taken:
        config = one_denoiser(pipe, "retrain").config
        return pipe._pack_latents(latents, config["patch_size"], config["patch_size_t"])
    if len(taken) == 1:
        return pipe._pack_latents(latents)
    return pipe._pack_latents(latents, *latents.shape[:2], *latents.shape[-2:])


def _statistics(vae: nn.Module) -> tuple:
    """Mean and standard deviation of each channel of a VAE's latents, where it knows them: else (None, None)."""
    norm = getattr(vae, "bn", None)
    if isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None and norm.running_var is not None:
        return norm.running_mean, (norm.running_var + vae.config.get("batch_norm_eps", norm.eps)).sqrt()
    buffers = dict(vae.named_buffers(recurse=False))  # LTX has them in the place of entries of the config
    given = [vae.config.get(name, buffers.get(name)) for name in ("latents_mean", "latents_std")]
    return (None, None) if any(value is None for value in given) else tuple(given)


@torch.no_grad()
def reads_as_said(pipe, prompt: str | Mapping, size: Sequence[int], call: Mapping) -> bool:
    """Whether `as_read` turns what the pipeline gives its VAE to decode back into its final latents.

    Two calls of two steps each, with the same noise: one ends with latents, the other one decodes them. Torch's random
    state is afterwards another one.
    """
    runner, vae, given = private_copy(pipe), pipe.vae, []
    arguments = _alone(pipe, one_denoiser(pipe, "retrain"), [prompt], size, call)
    del arguments["output_type"]
    watch = count_steps(runner.scheduler)
    torch.manual_seed(0)  # for what a loop draws without a generator
    latents = last_latents(runner, watch, sampling_loop(pipe), {**arguments, "generator": _generator()})
    decode, own = vae.decode, vars(vae).get("decode")

    def noted(z: Tensor, *args, **kwargs):
        given.append(z)
        return decode(z, *args, **kwargs)

    vars(vae)["decode"] = noted
    torch.manual_seed(0)
    try:
        sampling_loop(pipe)(runner, output_type="pt", **{**arguments, "generator": _generator()})
    except FAULTS:  # what is decoded is known by then, whatever becomes of it
        if not given:
            raise
    finally:
        del vars(vae)["decode"]
        if own is not None:
            vars(vae)["decode"] = own
    # What a call returns as latents may be scaled already, as by FLUX.2; what its scheduler made last is not.
    for final in (latents, *watch.last.values()):
        again = as_read(pipe, torch.cat(given).float(), final.shape[1:])
        if again.shape == final.shape and _close(again, final):
            return True
    return False


def size_of(pipe, size: Sequence[int]) -> dict[str, int]:
    """The arguments of a pipeline's call that say what it draws: height and width, of clips also the frames.

    ``size``: (height, width), or (frames, height, width) of clips. An image is a clip of one frame.
    """
    *frames, height, width = size
    known = inspect.signature(sampling_loop(pipe)).parameters
    wanted = {"height": height, "width": width, "num_frames": frames[0] if frames else 1}
    return {name: value for name, value in wanted.items() if name in known}  # a class-conditional one has one size


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@dataclass(frozen=True)
class Condition:
    """What a denoiser's call is told beside latents and time."""

    arguments: dict  # fp32, for one image
    shape: torch.Size  # of the latents, without batch dimension
    full_time: float  # the time that the denoiser is told where all is noise
    time_dtype: torch.dtype = torch.float32  # of the time: whole numbers, or fp32


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
    arguments = _alone(pipe, network, prompts, size, call)

    def wrap(forward):
        def stop(*args, **kwargs):
            raise _FirstCall(inspect.signature(forward).bind(*args, **kwargs).arguments)

        return stop

    told: dict = {}
    with torch.no_grad(), replaced_forward(network, wrap):
        try:
            loop(runner, **arguments)
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
    given = _single_precision(told.pop("timestep"))
    time, scheduler = given.flatten()[0].item(), runner.scheduler
    full_time = time / scheduler.timesteps[0].item() * scheduler.config.num_train_timesteps
    kept = {name: value for name, value in told.items() if value is not None and name != "return_dict"}
    return Condition(tree_map(_single_precision, kept), latents.shape[1:], round(full_time, 3), given.dtype)


def _alone(pipe, network: nn.Module, prompts: list, size: Sequence[int], call: Mapping) -> dict:
    """Arguments of a call of two steps that gives the denoiser these prompts by themselves, without the empty one."""
    known = inspect.signature(sampling_loop(pipe)).parameters
    arguments = {**call, **collate(prompts)}
    arguments |= {**size_of(pipe, size), "num_inference_steps": 2, "output_type": "latent"}
    unknown = sorted(arguments.keys() - known.keys())
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        unknown = [name for name in unknown if name in call]  # what every call is given may go to its **kwargs
    if unknown:
        raise EcoDiffError(f"The call of {type(pipe).__name__} has no argument {unknown[0]!r}.")
    if "guidance_scale" in known and not network.config.get("guidance_embeds"):
        arguments["guidance_scale"] = _no_guidance(pipe)  # the prompt alone, without the empty one beside it
    generators = [_generator() for _ in prompts]
    return {**arguments, "generator": generators if len(prompts) > 1 else generators[0]}


def _no_guidance(pipe) -> float:
    """The guidance scale with which a pipeline does not guide: 1, or 0 where 1 already does, as in Krea 2."""
    runner = private_copy(pipe)
    for scale in (1.0, 0.0):
        vars(runner)["_guidance_scale"] = scale  # where a pipeline's call keeps it
        try:
            if not getattr(runner, "do_classifier_free_guidance", False):
                return scale
        except FAULTS:  # it depends on more than the scale
            return 1.0
    return 1.0


@torch.no_grad()
def otherwise_trained(pipe, prompt: str | Mapping, size: Sequence[int], call: Mapping) -> str | None:
    """What in a pipeline's loop does not fit the loss that its scheduler names (`retraining.losses`), in words.

    The loss supposes that the scheduler gets the denoiser's prediction as it is, and that the denoiser is told the
    scheduler's time, in any unit. Both are looked at in a call of two steps. None where they hold.
    """
    network, runner = one_denoiser(pipe, "retrain"), private_copy(pipe)
    predicted: list[tuple[float, Tensor]] = []
    stepped: list[tuple[float, Tensor]] = []

    def wrap(forward):
        def noted(*args, **kwargs):
            result = forward(*args, **kwargs)
            time = inspect.signature(forward).bind(*args, **kwargs).arguments["timestep"]
            predicted.append((float(time.flatten()[0]), result[0] if isinstance(result, tuple) else result.sample))
            return result

        return noted

    count_steps(runner.scheduler, lambda prediction, time: stepped.append((time, prediction)))
    with replaced_forward(network, wrap):
        sampling_loop(pipe)(runner, **_alone(pipe, network, [prompt], size, call))
    if len(predicted) != len(stepped) or not stepped:
        return f"it calls its denoiser {len(predicted)} times for {len(stepped)} steps of its scheduler"
    (first_time, _), (first_step, _) = predicted[0], stepped[0]
    for (told, prediction), (time, used) in zip(predicted, stepped, strict=True):
        prediction = without_variance(prediction, used)
        if prediction.shape != used.shape or not _close(used, prediction):
            return "it changes what its denoiser predicts before its scheduler sees it"
        if abs(told * first_step - time * first_time) > 0.01 * abs(time * first_time) or not first_time:
            return f"it tells its denoiser the time {told:g} where its scheduler says {time:g}"
    return None


def without_variance(prediction: Tensor, latents: Tensor) -> Tensor:
    """What a denoiser predicts of the latents, without the variance that some (DiT, PixArt) predict as well."""
    if prediction.ndim == latents.ndim > 1 and prediction.shape[1] == 2 * latents.shape[1]:
        return prediction[:, : latents.shape[1]]
    return prediction


def _close(value: Tensor, expected: Tensor) -> bool:
    """Whether two tensors differ by no more than half precision rounds."""
    return bool((value.float() - expected.float()).norm() <= 0.02 * expected.float().norm())


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
