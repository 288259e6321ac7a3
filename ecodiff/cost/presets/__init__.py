"""Published architectures at full size, without weights: configurations as JSON files beside this one.

Each file has the denoiser's class and ``config`` as its ``config.json`` on the Hub has it, the parameter counts of the
text encoders, the VAE's configuration, and the pipeline's own defaults of size, steps and guidance. `guided` says what
guidance does: "batch" doubles the batch of each denoiser call, "calls" doubles the calls, "embedded" costs nothing.
`source` in five of them names the published configuration that ours was compared with, and the size of the published
weights, which the tests compare with the network built here: to the byte for PixArt and Sana, to the printed digits
for SD3, SD3.5 and Wan. Some of these are copies in other repositories, since the original is behind a licence.
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

    def build(self) -> nn.Module:
        """The denoiser on the meta device."""
        return _build(self.denoiser_class, self.config)

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
    return type(denoiser).__name__.removeprefix("Pruned") in INPUTS


def inputs(denoiser: nn.Module, geometry: Geometry) -> tuple[dict, str]:
    """Shapes of the arguments of one denoiser call as `trace.trace` takes them, and the name of the latents among them.

    Raises EcoDiffError for a class whose arguments are not known here.
    """
    name = type(denoiser).__name__.removeprefix("Pruned")
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


INPUTS: dict[str, Callable] = {
    "UNet2DConditionModel": _unet,
    "FluxTransformer2DModel": _flux,
    "SD3Transformer2DModel": _sd3,
    "PixArtTransformer2DModel": _pixart,
    "SanaTransformer2DModel": _sana,
    "WanTransformer3DModel": _wan,
}
"""Argument shapes by class of the denoiser. Other classes need a loaded pipeline, whose own call shows them."""
