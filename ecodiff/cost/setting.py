"""What is counted: a model and the setting it generates in, and how its sampling loop calls the denoiser.

A full-size preset (`ecodiff.cost.presets`), a loaded pipeline, or anything ``ecodiff.load`` takes becomes one
``Subject``, and ``cost`` counts it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import Tensor, nn

from ecodiff.errors import EcoDiffError
from ecodiff.pipelines.loading import DTYPES, load
from ecodiff.pipelines.parts import Experts, experts, sampling_loop
from ecodiff.pipelines.parts import denoiser as denoiser_of

from . import presets
from .capture import Loop, capture
from .trace import weight_bytes


@dataclass(frozen=True)
class Subject(presets.Setting):
    """A model and the setting it is counted in."""

    network: nn.Module
    vae: nn.Module | None
    text_encoders: Mapping[str, int]  # bytes where they are loaded, else parameters
    pipe: object = None  # where it is loaded


def subject_of(model) -> Subject:
    """The subject of a preset's name, an id, a pipeline or a subject; EcoDiffError for anything else."""
    if isinstance(model, Subject):
        return model
    if isinstance(model, str):
        try:
            p = presets.preset(model)
        except EcoDiffError as unknown:
            try:
                return _from_pipeline(load(model))
            except EcoDiffError as error:
                raise EcoDiffError(f"{unknown} It could not be loaded either: {error}") from error
        setting = {field.name: getattr(p, field.name) for field in fields(presets.Setting)}
        return Subject(**setting, network=p.build(), vae=p.build_vae(), text_encoders=p.text_encoders)
    if not hasattr(model, "components"):
        raise EcoDiffError(f"cost: a preset's name, an id or a pipeline is needed, not {type(model).__name__}.")
    return _from_pipeline(model)


def _from_pipeline(pipe) -> Subject:
    denoiser, vae = denoiser_of(pipe), getattr(pipe, "vae", None)
    signature = inspect.signature(sampling_loop(pipe)).parameters

    def default(name, otherwise):
        """The pipeline's own default of an argument of its call."""
        if name not in signature or signature[name].default in (None, inspect.Parameter.empty):
            return otherwise
        return signature[name].default

    # Transformers say their size in the config, some pipelines in an attribute; 64 latents are 512 pixels.
    sides = getattr(denoiser.config, "sample_size", None) or getattr(pipe, "default_sample_size", None) or 64
    if not isinstance(sides, (tuple, list)):
        sides = (sides, sides)
    factor = getattr(pipe, "vae_scale_factor", 8) if vae is None else _vae_factor(vae)
    encoders = {}
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module) and part not in (*experts(denoiser), vae):
            encoders[name] = weight_bytes(part)
    return Subject(
        title=type(pipe).__name__,
        size=(sides[0] * factor, sides[1] * factor),
        frames=default("num_frames", None),
        text_tokens=_text_tokens(pipe, denoiser, default("max_sequence_length", 0)),
        steps=default("num_inference_steps", 50),
        guidance=default("guidance_scale", 0.0),
        guided=_guided(denoiser),
        dtype=denoiser.dtype,
        network=denoiser,
        vae=vae,
        text_encoders=encoders,
        pipe=pipe,
    )


def _text_tokens(pipe, denoiser: nn.Module, longest: int) -> int:
    """Tokens of text that the denoiser sees. ``longest``: max_sequence_length of the pipeline's call, 0 for none."""
    clip = 77
    tokenizer = getattr(pipe, "tokenizer", None)
    # Tokenizers without a limit of their own give 10^30.
    if tokenizer is not None and tokenizer.model_max_length < 10_000:
        clip = tokenizer.model_max_length
    if "pooled_projection_dim" in denoiser.config and "caption_projection_dim" in denoiser.config:
        return longest + clip  # Stable Diffusion 3 joins the tokens of CLIP and T5
    return longest or clip


def _guided(denoiser: nn.Module) -> str:
    """Where the pipelines of this denoiser have guidance: "embedded", in "calls" of its own, or in the "batch"."""
    name = _class_name(denoiser)
    if name.startswith("Flux"):
        return "embedded"
    if name.startswith("Wan"):
        return "calls"
    return "batch"


def overridden(subject: Subject, *, size, frames, steps, guidance, dtype, text_tokens) -> Subject:
    """The subject with the settings that are given, checked; None leaves the subject's own. Raises EcoDiffError."""
    changes: dict = {}
    for name, value in (("frames", frames), ("steps", steps), ("text_tokens", text_tokens)):
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise EcoDiffError(f"cost: {name} must be a whole number of at least 1, not {value!r}.")
        changes[name] = value
    if guidance is not None:
        if isinstance(guidance, bool) or not isinstance(guidance, (int, float)) or not 0 <= guidance < float("inf"):
            raise EcoDiffError(f"cost: guidance must be a number of at least 0, not {guidance!r}.")
        changes["guidance"] = float(guidance)
    if dtype is not None:
        known = dtype
        if isinstance(dtype, str):
            known = DTYPES.get(dtype)
        if known not in DTYPES.values():
            raise EcoDiffError(f"cost: dtype is one of bf16, fp16 and fp32, not {dtype!r}.")
        changes["dtype"] = known
    if size is not None:
        sides: tuple = ()
        if isinstance(size, (tuple, list)):
            sides = tuple(size)
        elif isinstance(size, int) and not isinstance(size, bool):
            sides = (size, size)
        multiple = _vae_factor(subject.vae) * _patch(subject.network)
        if len(sides) != 2 or any(not isinstance(side, int) or side < 1 or side % multiple for side in sides):
            raise EcoDiffError(
                f"cost: size is (height, width) in pixels, multiples of {multiple} for {subject.title}, not {size!r}."
            )
        changes["size"] = sides
    return replace(subject, **changes)


def loop_of(s: Subject, batch: int, call: dict, explicit: dict) -> Loop:
    """The subject's loop for ``batch`` images: known for the denoisers of `presets`, else shown by the pipeline itself.

    Its ``size`` is in pixels, and None where the subject's own holds.

    call: further arguments of the pipeline's call.  explicit: size, frames and text_tokens as they were given, None
    where the subject has its own.
    """
    embedded = call.get("prompt_embeds")
    if explicit["text_tokens"] is None and isinstance(embedded, Tensor):
        s = replace(s, text_tokens=embedded.shape[-2])
    if s.pipe is not None and (isinstance(s.network, Experts) or not presets.known(s.network)):
        return _shown(s, batch, call, explicit)
    samples, calls = batch, s.steps
    # A distilled UNet (time_cond_proj_dim) takes guidance as an input, as FLUX does: it has no unconditional half.
    if s.guidance > 1 and getattr(s.network.config, "time_cond_proj_dim", None) is None:
        if s.guided == "batch":
            samples *= 2
        if s.guided == "calls":
            calls *= 2
    shapes, latents = presets.inputs(s.network, geometry(s, samples))
    # Which expert a step calls depends on the scheduler. Those of a preset are alike, so that it does not matter here.
    networks = len(experts(s.network))
    shares = tuple(calls // networks + (number < calls % networks) for number in range(networks))
    return Loop(shapes, latents, samples, calls, shares=shares)


def _shown(s: Subject, batch: int, call: dict, explicit: dict) -> Loop:
    """The loop as the pipeline itself runs it."""
    known = inspect.signature(sampling_loop(s.pipe)).parameters
    options: dict[str, Any] = {"num_inference_steps": s.steps}
    if "guidance_scale" in known:
        options["guidance_scale"] = s.guidance
    if explicit["size"] is not None:
        options |= {"height": s.size[0], "width": s.size[1]}
    options |= {"num_frames": explicit["frames"], "max_sequence_length": explicit["text_tokens"], **call}
    loop = capture(s.pipe, batch=batch, **options)
    # Without an explicit size the pipeline decides, and the size that the subject has is a guess from the config.
    if explicit["size"] is not None or loop.size is None:
        return replace(loop, size=None)
    height, width = loop.size
    return replace(loop, size=(height * _vae_factor(s.vae), width * _vae_factor(s.vae)))


def geometry(s: Subject, samples: int) -> presets.Geometry:
    """Latents of the subject's size."""
    factor = _vae_factor(s.vae)
    frames = 1
    if s.frames is not None:
        # Video autoencoders keep the first frame and join some of the others, most of them four.
        frames = (s.frames - 1) // (getattr(s.vae, "temporal_compression_ratio", None) or 4) + 1
    return presets.Geometry(samples, s.size[0] // factor, s.size[1] // factor, frames, s.text_tokens)


def _vae_factor(vae: nn.Module | None) -> int:
    """Pixels a side of one latent; 8 where there is no VAE to say it."""
    if vae is None:
        return 8
    ratio = getattr(vae, "spatial_compression_ratio", None) or getattr(vae.config, "scale_factor_spatial", None)
    if ratio:
        return int(ratio)
    return 2 ** (len(vae.config.block_out_channels) - 1)  # each block but the last halves the sides


def _class_name(network: nn.Module) -> str:
    """The diffusers class of a denoiser, pruned or not."""
    return type(experts(network)[0]).__name__.removeprefix("Pruned")


def _patch(network: nn.Module) -> int:
    """Latents a side of one token, which the sides of the latents have to be multiples of."""
    if _class_name(network).startswith("Flux"):
        return 2  # packed by the pipeline; the config says 1
    patch = getattr(network.config, "patch_size", 1)
    if isinstance(patch, (tuple, list)):
        return patch[-1]  # of frames, height, width
    return patch or 1
