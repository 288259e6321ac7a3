"""Published architectures at full size, without weights: configurations as JSON files beside this one.

Each file has the denoiser's class and ``config`` as its ``config.json`` on the Hub has it, the parameter counts of the
text encoders, the VAE's configuration, and the pipeline's own defaults of size, steps and guidance. `guided` says what
guidance does: "batch" doubles the batch of each denoiser call, "calls" doubles the calls, "embedded" costs nothing.
`source` names the published configuration that ours was compared with, and what is published of its size: bytes of the
weights, or billions of parameters, which the tests compare with the network built here to the printed digits. Some
of these are copies in other repositories, since the original is behind a licence. No size of Krea 2 is published by its
authors, so there its configuration alone is compared. ``experts`` counts networks of which each step calls one.
Built on the meta device, a network of 12 billion parameters takes a second and no memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ecodiff.errors import EcoDiffError
from ecodiff.pipelines.parts import Experts, experts

from ..trace import Given

FOLDER = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Setting:
    """How a model generates."""

    title: str
    size: tuple[int, int]  # height and width in pixels
    frames: int | None
    text_tokens: int
    steps: int
    guidance: float
    guided: str  # where guidance is, as above
    dtype: torch.dtype


@dataclass(frozen=True)
class Preset(Setting):
    """One published model."""

    name: str
    id: str
    component: str
    denoiser_class: str
    config: Mapping
    parameters: int
    text_encoders: Mapping[str, int]  # {name: parameters}
    vae_class: str
    vae_config: Mapping
    experts: int = 1

    def build(self) -> nn.Module:
        """The denoiser on the meta device; of several experts, all of them."""
        if self.experts == 1:
            return _build(self.denoiser_class, self.config)
        names = [self.component, *(f"{self.component}_{number}" for number in range(2, self.experts + 1))]
        return Experts({name: _build(self.denoiser_class, self.config) for name in names})

    def build_vae(self) -> nn.Module:
        """The autoencoder on the meta device."""
        return _build(self.vae_class, self.vae_config)


def names() -> list[str]:
    """The presets' names, smallest denoiser first."""
    return sorted(_stems(), key=_size_of)


def _stems() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def _size_of(name: str) -> int:
    return preset(name).parameters


@cache
def preset(name: str) -> Preset:
    """A preset by its name or the id of its checkpoint; raises EcoDiffError for any other."""
    path = FOLDER / f"{name}.json"
    if "/" in name:
        for other in FOLDER.glob("*.json"):
            if json.loads(other.read_text(encoding="utf-8"))["id"] == name:
                path = other
    if not name or not path.is_file():
        raise EcoDiffError(f"{name!r} is none of the full-size presets: {', '.join(_stems())}.")
    entry = json.loads(path.read_text(encoding="utf-8"))
    values = {field.name: entry[field.name] for field in fields(Preset) if field.name in entry}
    values |= {
        "name": path.stem,
        "denoiser_class": entry["class"],
        "size": tuple(entry["size"]),
        "frames": entry.get("frames"),  # only of video
        "dtype": getattr(torch, entry["dtype"]),
        "vae_class": entry["vae"]["class"],
        "vae_config": entry["vae"]["config"],
    }
    return Preset(**values)


def _build(class_name: str, config: Mapping) -> nn.Module:
    import diffusers

    with torch.device("meta"):
        return getattr(diffusers, class_name)(**config).eval()


@dataclass(frozen=True)
class Geometry:
    """What shapes a denoiser's inputs."""

    samples: int  # in a call
    height: int  # of the latents, as width and frames
    width: int
    frames: int
    text_tokens: int


def known(denoiser: nn.Module) -> bool:
    """Whether `inputs` knows the arguments of a denoiser of this class."""
    return _class_name(denoiser) in INPUTS


def _class_name(denoiser: nn.Module) -> str:
    """The diffusers class of a denoiser or of its experts, pruned or not."""
    return type(experts(denoiser)[0]).__name__.removeprefix("Pruned")


def inputs(denoiser: nn.Module, geometry: Geometry) -> tuple[dict, str]:
    """Shapes of the arguments of one denoiser call as `trace.trace` takes them, and the name of the latents among them.

    Raises EcoDiffError for a class whose arguments are not known here.
    """
    name = _class_name(denoiser)
    if not known(denoiser):
        raise EcoDiffError(
            f"The arguments of {name} are not known here: pass a loaded pipeline, whose call shows them."
        )
    return INPUTS[name](denoiser.config, geometry)


def _unet(c, g: Geometry):
    shapes: dict[str, Any] = {
        "sample": (g.samples, c.in_channels, g.height, g.width),
        "timestep": ((), torch.float32),
        "encoder_hidden_states": (g.samples, g.text_tokens, c.cross_attention_dim),
    }
    if c.addition_embed_type == "text_time":
        pooled = c.projection_class_embeddings_input_dim - 6 * c.addition_time_embed_dim
        shapes["added_cond_kwargs"] = {"text_embeds": (g.samples, pooled), "time_ids": (g.samples, 6)}
    return shapes, "sample"


def _flux(c, g: Geometry):
    image = (g.height // 2) * (g.width // 2)
    shapes = {
        "hidden_states": (g.samples, image, c.in_channels),
        "encoder_hidden_states": (g.samples, g.text_tokens, c.joint_attention_dim),
        "pooled_projections": (g.samples, c.pooled_projection_dim),
        "timestep": (g.samples,),
        "img_ids": (image, 3),
        "txt_ids": (g.text_tokens, 3),
    }
    if c.guidance_embeds:
        shapes["guidance"] = ((g.samples,), torch.float32)
    return shapes, "hidden_states"


def _sd3(c, g: Geometry):
    return {
        "hidden_states": (g.samples, c.in_channels, g.height, g.width),
        "encoder_hidden_states": (g.samples, g.text_tokens, c.joint_attention_dim),
        "pooled_projections": (g.samples, c.pooled_projection_dim),
        "timestep": ((g.samples,), torch.float32),
    }, "hidden_states"


def _pixart(c, g: Geometry):
    return {
        "hidden_states": (g.samples, c.in_channels, g.height, g.width),
        "encoder_hidden_states": (g.samples, g.text_tokens, c.caption_channels),
        "encoder_attention_mask": ((g.samples, g.text_tokens), torch.int64),
        "timestep": ((g.samples,), torch.int64),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }, "hidden_states"


def _sana(c, g: Geometry):
    return {
        "hidden_states": (g.samples, c.in_channels, g.height, g.width),
        "encoder_hidden_states": (g.samples, g.text_tokens, c.caption_channels),
        "encoder_attention_mask": ((g.samples, g.text_tokens), torch.int64),
        "timestep": ((g.samples,), torch.float32),
    }, "hidden_states"


def _wan(c, g: Geometry):
    return {
        "hidden_states": (g.samples, c.in_channels, g.frames, g.height, g.width),
        "encoder_hidden_states": (g.samples, g.text_tokens, c.text_dim),
        "timestep": ((g.samples,), torch.int64),
    }, "hidden_states"


def _flux2(c, g: Geometry):
    image = (g.height // 2) * (g.width // 2)
    shapes = {
        "hidden_states": (g.samples, image, c.in_channels),
        "encoder_hidden_states": (g.samples, g.text_tokens, c.joint_attention_dim),
        "timestep": (g.samples,),
        "img_ids": (g.samples, image, 4),
        "txt_ids": (g.samples, g.text_tokens, 4),
    }
    if c.guidance_embeds:
        shapes["guidance"] = ((g.samples,), torch.float32)
    return shapes, "hidden_states"


def _qwen_image(c, g: Geometry):
    height, width = g.height // 2, g.width // 2
    return {
        "hidden_states": (g.samples, height * width, c.in_channels),
        "encoder_hidden_states": (g.samples, g.text_tokens, c.joint_attention_dim),
        "timestep": (g.samples,),
        "img_shapes": Given([[(1, height, width)]] * g.samples),
    }, "hidden_states"


def _z_image(c, g: Geometry):
    return {
        "x": [(c.in_channels, 1, g.height, g.width)] * g.samples,
        "t": ((g.samples,), torch.float32),
        "cap_feats": [(g.text_tokens, c.cap_feat_dim)] * g.samples,
    }, "x"


def _krea2(c, g: Geometry):
    image = (g.height // 2) * (g.width // 2)
    return {
        "hidden_states": (g.samples, image, c.in_channels),
        "encoder_hidden_states": (g.samples, g.text_tokens, c.num_text_layers, c.text_hidden_dim),
        "timestep": (g.samples,),
        "position_ids": ((g.text_tokens + image, 3), torch.float32),
    }, "hidden_states"


def _ltx2(c, g: Geometry):
    # A clip has 24 frames a second, and 25 tokens of sound; its autoencoder joins eight frames into one.
    audio = round((8 * (g.frames - 1) + 1) / 24 * 25)
    return {
        "hidden_states": (g.samples, g.frames * g.height * g.width, c.in_channels),
        "audio_hidden_states": (g.samples, audio, c.audio_in_channels),
        "encoder_hidden_states": (g.samples, g.text_tokens, c.caption_channels),
        "audio_encoder_hidden_states": (g.samples, g.text_tokens, c.caption_channels),
        "timestep": (g.samples,),
        "num_frames": g.frames,
        "height": g.height,
        "width": g.width,
        "fps": 24.0,
        "audio_num_frames": audio,
    }, "hidden_states"


INPUTS: dict[str, Callable] = {
    "UNet2DConditionModel": _unet,
    "FluxTransformer2DModel": _flux,
    "SD3Transformer2DModel": _sd3,
    "PixArtTransformer2DModel": _pixart,
    "SanaTransformer2DModel": _sana,
    "WanTransformer3DModel": _wan,
    "Flux2Transformer2DModel": _flux2,
    "QwenImageTransformer2DModel": _qwen_image,
    "ZImageTransformer2DModel": _z_image,
    "Krea2Transformer2DModel": _krea2,
    "LTX2VideoTransformer3DModel": _ltx2,
}
"""Argument shapes by class of the denoiser. Other classes need a loaded pipeline, whose own call shows them."""
