"""How a model is judged: which prompts, and which noise (§3.1, App. E.1). `images` generates and judges by it.

One protocol for all methods: the same captions, and for each caption and seed the same initial noise.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from ecodiff.lab import openmoji
from ecodiff.storage.paths import data_dir


@dataclass(frozen=True)
class Protocol:
    """How a model is judged: prompts of one split, a noise of its own for each prompt and seed.

    Of a model that generates clips, prompts and ``pictures`` are those of clips.

    ``count`` is the number of objects a prompt names. ``features`` also runs Inception (about ten pictures a second on
    two cores), for the object probe (one object), FID and KID. What the judge finds is there once it is trained.
    """

    model: str = "openmoji-sdxl"
    split: str = "seen"
    count: int = 1
    pictures: int = 200
    num_inference_steps: int | None = 12
    guidance_scale: float | None = 2.0
    call: Mapping = field(default_factory=dict)
    """Further arguments of the pipeline's call (height, width, ...)."""
    features: bool = True
    version: int = 2

    @classmethod
    def of(cls, model: str, **changes) -> Protocol:
        """The protocol of an embedded model, drawn as its recipe says; of any other model with the pipeline's own
        settings."""
        sampling = recommended(model)
        given = {name: sampling.pop(name, None) for name in ("num_inference_steps", "guidance_scale")}
        return cls(**{"model": model, **given, "call": sampling, **changes})

    @property
    def sampling(self) -> dict:
        """Arguments of ``generate``, those that are given."""
        given = {"num_inference_steps": self.num_inference_steps, "guidance_scale": self.guidance_scale}
        return {**{name: value for name, value in given.items() if value is not None}, **self.call}

    @property
    def of_clips(self) -> bool:
        """Whether what is generated and judged are clips."""
        return "num_frames" in self.call

    def scenes(self) -> list[openmoji.Scene] | list[openmoji.Clip]:
        """The scenes whose captions are drawn, or the clips."""
        if self.of_clips:
            return list(openmoji.clips(self.split, self.pictures))
        return list(openmoji.scenes(self.split, self.pictures, count=self.count))


def recommended(model: str) -> dict:
    """Arguments of the call that the recipe of an embedded model recommends; none for any other model."""
    path = data_dir() / "models" / model / "recipe.json"
    if not path.is_file():
        return {}
    return dict(sampling_of(path, path.stat().st_mtime_ns))


@lru_cache(maxsize=16)
def sampling_of(recipe: Path, changed: int) -> dict:
    """What a recipe, last changed at this time, says of drawing: read once, since studies ask for it in every row."""
    return json.loads(recipe.read_text())["recipe"]["sampling"]
