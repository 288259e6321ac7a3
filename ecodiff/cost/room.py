"""Whether a published model fits into this machine's memory, asked before anything is loaded.

Known are the presets: by the id of their checkpoint, or as a folder whose denoiser has the same configuration.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from ecodiff.errors import EcoDiffError
from ecodiff.method.config import LearnConfig
from ecodiff.pipelines.loading import dtype_of
from ecodiff.storage.provenance import memory_bytes

from . import presets
from .counting import Cost, cost
from .trace import parameters
from .units import gb, usable

SAME_NETWORKS = {"stabilityai/sdxl-turbo": "sdxl"}
"""Ids of checkpoints whose networks are those of a preset."""


@dataclass(frozen=True)
class Machine:
    """Bytes of memory: of the device that networks run on (None where that is the CPU), and of the machine."""

    device: int | None
    host: int | None

    @classmethod
    def this(cls) -> Machine:
        device = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
        return cls(device, memory_bytes())


def known(model: str | os.PathLike) -> presets.Preset | None:
    """The preset of a checkpoint's id, or of a folder with a pipeline; None for all others."""
    name = os.fspath(model)
    for preset in map(presets.preset, presets.names()):
        if name == preset.id or SAME_NETWORKS.get(name) == preset.name or _has_network_of(preset, Path(name)):
            return preset
    return None


def _has_network_of(preset: presets.Preset, folder: Path) -> bool:
    try:
        config = json.loads((folder / preset.component / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    if not isinstance(config, Mapping) or config.get("_class_name") != preset.denoiser_class:
        return False
    return all(config.get(name) == value for name, value in preset.config.items())


def check_room(
    model: str | os.PathLike,
    *,
    dtype: str | torch.dtype | None = None,
    offload: bool = False,
    config: LearnConfig | None = None,
    machine: Machine | None = None,
) -> None:
    """Raise EcoDiffError where a known model cannot fit, in one sentence that says what would.

    Without ``config`` the weights alone have to fit, which needs no counting; with it an update of the mask, too.

    Args:
        model: an id or a folder; of what is no preset nothing is known, and nothing is said.
        dtype: that of the weights; None: float32, which is what diffusers loads without one.
        offload: whether components are on the device one at a time.
        config: how a mask is to be learned, if so.
        machine: its memory; None: this one, with ``device=None`` where the networks are only cut, on the CPU.
    """
    given = torch.float32 if dtype is None else dtype_of(dtype)
    preset = known(model)
    if preset is None or not isinstance(given, torch.dtype):
        return
    machine = machine or Machine.this()
    batch = None
    if config is not None:
        batch = config.micro_batch_size or config.batch_size
    asked = _Way(given, offload, batch)
    if asked.fits(preset, config, machine):
        return
    for width in dict.fromkeys((given, torch.bfloat16)):
        for on_turns in dict.fromkeys((offload, True)):
            for samples in dict.fromkeys((batch, 1 if batch else None)):
                way = _Way(width, on_turns, samples)
                if way != asked and way.fits(preset, config, machine):
                    raise EcoDiffError(f"{model} {asked.lack(preset, config, machine)}: {way.advice(asked)} would fit.")
    smaller = "quantise it" if config is None else "take smaller images"
    raise EcoDiffError(
        f"{model} {asked.lack(preset, config, machine)}, and neither bfloat16 nor offload is enough: {smaller}, or "
        "take a larger machine."
    )


@dataclass(frozen=True)
class _Way:
    """A way to run a model: dtype, offload, and samples that an update has at once (None: no update)."""

    dtype: torch.dtype
    offload: bool
    batch: int | None

    def fits(self, preset: presets.Preset, config: LearnConfig | None, machine: Machine) -> bool:
        if machine.host is not None and self.held(preset) > machine.host:
            return False
        return machine.device is None or self.needed(preset, config) <= usable(machine.device)

    def lack(self, preset: presets.Preset, config: LearnConfig | None, machine: Machine) -> str:
        """What is too large for what."""
        in_dtype = f"in {str(self.dtype).removeprefix('torch.')}"
        if machine.host is not None and self.held(preset) > machine.host:
            return (
                f"has {gb(self.held(preset))} of weights {in_dtype}, and this machine has {gb(machine.host)} of memory"
            )
        assert machine.device is not None
        what = "has" if self.batch is None else "needs for an update of the mask"
        of = " of weights" if self.batch is None else ""
        return (
            f"{what} {gb(self.needed(preset, config))}{of} {in_dtype} on the device, and of its {gb(machine.device)} "
            f"{gb(usable(machine.device))} are usable"
        )

    def advice(self, asked: _Way) -> str:
        """What is to be set for this way, beside what was asked for."""
        parts = []
        if self.dtype != asked.dtype:
            parts.append(f"dtype {str(self.dtype).removeprefix('torch.')}")
        if self.offload != asked.offload:
            parts.append("offload")
        if self.batch != asked.batch:
            parts.append(f"{self.batch} sample at once (micro_batch_size)")
        return " with ".join(parts)

    def held(self, preset: presets.Preset) -> int:
        return sum(_parts(preset)) * self.dtype.itemsize

    def needed(self, preset: presets.Preset, config: LearnConfig | None) -> int:
        if config is None or self.batch is None:
            return (max if self.offload else sum)(_parts(preset)) * self.dtype.itemsize
        return _counted(preset.name, self.dtype, self.batch, config).update_peak(
            checkpoint=config.checkpoint, keep_last=config.keep_last, offload=self.offload
        )


def _parts(preset: presets.Preset) -> list[int]:
    """Parameters of the components."""
    return [preset.parameters, _vae_parameters(preset.name), *preset.text_encoders.values()]


@cache
def _vae_parameters(name: str) -> int:
    return parameters(presets.preset(name).build_vae())


def _counted(name: str, dtype: torch.dtype, batch: int, config: LearnConfig) -> Cost:
    size = None
    if {"height", "width"} <= config.call.keys():
        size = (config.call["height"], config.call["width"])
    return cost(
        name,
        batch=batch,
        size=size,
        frames=config.call.get("num_frames"),
        text_tokens=config.call.get("max_sequence_length"),
        steps=config.num_inference_steps,
        guidance=config.guidance_scale,
        dtype=dtype,
        kinds=config.kinds,
        inner=False,
    )
