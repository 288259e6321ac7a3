"""What is counted: a model and the setting it draws in, and what its sampling loop asks of the denoiser.

A full-size preset (``fullsize``), a loaded pipeline, or anything ``ecodiff.load`` takes becomes one ``Subject``, and
``cost`` counts it.
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
from .capture import capture
from .trace import weight_bytes


@dataclass(frozen=True)
class Subject(presets.Setting):
    """A model and the setting it is counted in."""

    network: nn.Module
    vae: nn.Module | None
    text_encoders: Mapping[str, int]  # bytes where they are loaded, else parameters
    pipe: object = None  # where it is loaded


def subject_of(model) -> Subject:
    """The subject of a preset's name, an id or a pipeline; EcoDiffError for anything else."""
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
        value = signature[name].default if name in signature else otherwise
        return otherwise if value in (None, inspect.Parameter.empty) else value

    sample = getattr(denoiser.config, "sample_size", None) or getattr(pipe, "default_sample_size", None) or 64
    sides = sample if isinstance(sample, (tuple, list)) else (sample, sample)
    factor = _vae_factor(vae) if vae is not None else getattr(pipe, "vae_scale_factor", 8)
    tokenizer = getattr(pipe, "tokenizer", None)
    tokens = default("max_sequence_length", 0)
    clip = tokenizer.model_max_length if tokenizer is not None and tokenizer.model_max_length < 10_000 else 77
    if (
        "pooled_projection_dim" in denoiser.config and "caption_projection_dim" in denoiser.config
    ):  # SD3 joins CLIP and T5
        tokens += clip
    name = _class_name(denoiser)
    guided = "embedded" if name.startswith("Flux") else "calls" if name.startswith("Wan") else "batch"
    encoders = {
        key: weight_bytes(part)
        for key, part in pipe.components.items()
        if isinstance(part, nn.Module) and part not in (*experts(denoiser), vae)
    }
    return Subject(
        title=type(pipe).__name__,
        size=(sides[0] * factor, sides[1] * factor),
        frames=default("num_frames", None),
        text_tokens=tokens or clip,
        steps=default("num_inference_steps", 50),
        guidance=default("guidance_scale", 0.0),
        guided=guided,
        dtype=denoiser.dtype,
        network=denoiser,
        vae=vae,
        text_encoders=encoders,
        pipe=pipe,
    )


def overridden(subject: Subject, *, size, frames, steps, guidance, dtype, text_tokens) -> Subject:
    """The subject with what is given, checked; None keeps what it has."""
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
        known = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
        if known not in DTYPES.values():
            raise EcoDiffError(f"cost: dtype is one of bf16, fp16 and fp32, not {dtype!r}.")
        changes["dtype"] = known
    if size is not None:
        sides = (
            (size, size)
            if isinstance(size, int) and not isinstance(size, bool)
            else tuple(size)
            if isinstance(size, (tuple, list))
            else ()
        )
        multiple = (_vae_factor(subject.vae) if subject.vae is not None else 8) * _patch(subject.network)
        if len(sides) != 2 or any(not isinstance(side, int) or side < 1 or side % multiple for side in sides):
            raise EcoDiffError(
                f"cost: size is (height, width) in pixels, multiples of {multiple} for {subject.title}, not {size!r}."
            )
        changes["size"] = sides
    return replace(subject, **changes)


@dataclass(frozen=True)
class Loop:
    """What the sampling loop asks of the denoiser: arguments and name of the latents (see `trace`), samples in a call,
    calls. size: in pixels, where the loop itself showed it. shares: calls of each expert, where there are several."""

    inputs: Mapping
    latents: str
    samples: int
    calls: int
    size: tuple[int, int] | None = None
    shares: tuple[int, ...] = ()


def loop_of(s: Subject, batch: int, call: dict, asked: dict) -> Loop:
    """What the loop asks: known for the denoisers of ``fullsize``, else shown by the pipeline itself."""
    if asked["text_tokens"] is None and isinstance(embedded := call.get("prompt_embeds"), Tensor):
        s = replace(s, text_tokens=embedded.shape[-2])
    if s.pipe is not None and (isinstance(s.network, Experts) or not presets.known(s.network)):
        return _shown(s, batch, call, asked)
    guided = s.guidance > 1 and s.guided != "embedded"
    if guided and getattr(s.network.config, "time_cond_proj_dim", None) is not None:  # distilled: guidance is an input
        guided = False
    samples = batch * (2 if guided and s.guided == "batch" else 1)
    shapes, latents = presets.inputs(s.network, geometry(s, samples))
    return Loop(shapes, latents, samples, s.steps * (2 if guided and s.guided == "calls" else 1))


def _shown(s: Subject, batch: int, call: dict, asked: dict) -> Loop:
    """The loop as the pipeline itself runs it."""
    known = inspect.signature(sampling_loop(s.pipe)).parameters
    options: dict[str, Any] = {"num_inference_steps": s.steps}
    if "guidance_scale" in known:
        options["guidance_scale"] = s.guidance
    if asked["size"] is not None:
        options |= {"height": s.size[0], "width": s.size[1]}
    options |= {"num_frames": asked["frames"], "max_sequence_length": asked["text_tokens"], **call}
    seen = capture(s.pipe, batch=batch, **options)
    factor = _vae_factor(s.vae) if s.vae is not None else 8
    size = None
    if seen.size and asked["size"] is None:
        height, width = seen.size
        size = (height * factor, width * factor)
    return Loop(seen.inputs, seen.latents, seen.samples, seen.calls, size, seen.shares)


def geometry(s: Subject, samples: int) -> presets.Geometry:
    """Latents of the subject's size."""
    factor = _vae_factor(s.vae) if s.vae is not None else 8
    frames = 1 if s.frames is None else (s.frames - 1) // 4 + 1
    return presets.Geometry(samples, s.size[0] // factor, s.size[1] // factor, frames, s.text_tokens)


def _vae_factor(vae: nn.Module) -> int:
    """Pixels a side of one latent."""
    ratio = getattr(vae, "spatial_compression_ratio", None) or getattr(vae.config, "scale_factor_spatial", None)
    return int(ratio) if ratio else 2 ** (len(vae.config.block_out_channels) - 1)


def _class_name(network: nn.Module) -> str:
    """The diffusers class of a denoiser, pruned or not."""
    return type(experts(network)[0]).__name__.removeprefix("Pruned")


def _patch(network: nn.Module) -> int:
    if _class_name(network).startswith("Flux"):
        return 2  # packed by the pipeline
    patch = getattr(network.config, "patch_size", 1)
    return patch[-1] if isinstance(patch, (tuple, list)) else patch or 1
