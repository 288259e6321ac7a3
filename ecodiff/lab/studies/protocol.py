"""How a model is judged: which prompts, which noise, and what is measured on the pictures (§3.1, App. E.1).

One protocol for all methods: the same captions, and for each caption and seed the same initial noise.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from torch import Tensor

from ecodiff import metrics
from ecodiff.lab import openmoji
from ecodiff.lab.openmoji.facts import verdicts
from ecodiff.lab.openmoji.judges import judge, probe, real_features
from ecodiff.method.generate import generate
from ecodiff.storage.cache import cache_folder
from ecodiff.storage.paths import data_dir


@dataclass(frozen=True)
class Protocol:
    """How a model is judged: prompts of one split, a noise of its own for each prompt and seed.

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

    def scenes(self) -> list[openmoji.Scene]:
        """The scenes whose captions are drawn."""
        return list(openmoji.scenes(self.split, self.pictures, count=self.count))


def recommended(model: str) -> dict:
    """How the recipe of an embedded model says it is drawn: arguments of its call; nothing for any other model."""
    path = data_dir() / "models" / model / "recipe.json"
    return dict(sampling_of(path, path.stat().st_mtime_ns)) if path.is_file() else {}


@lru_cache(maxsize=16)
def sampling_of(recipe: Path, changed: int) -> dict:
    """What a recipe, last changed at this time, says of drawing: read once, since studies ask for it in every row."""
    return json.loads(recipe.read_text())["recipe"]["sampling"]


def judge_pictures(drawn: Tensor, scenes: Sequence[openmoji.Scene], features: bool = True) -> dict[str, list | float]:
    """What ``compare`` returns about pictures uint8 [N, 3, 64, 64] of scenes, without a reference."""
    found = {"colour": openmoji.background_correct(drawn, [scene.colour for scene in scenes], openmoji.COLOURS)}
    sets = {}
    if features:
        seen = metrics.inception_features(drawn, progress=False)
        real = real_features(scenes)
        sets = {"fid": metrics.fid(real, seen), "kid": metrics.kid(real, seen)[0]}
        if all(len(scene.objects) == 1 for scene in scenes):
            found["object"] = probe().correct(seen, [scene.objects[0] for scene in scenes], progress=False)
    if judge():
        shown = verdicts(judge(), drawn, scenes)
        found |= {"found": shown["objects"], "facts": shown["all"]}
        likeness = judge().image_features(drawn) * judge().text_features([scene.caption for scene in scenes])
        sets["clip"] = [round(100 * value, 2) for value in likeness.sum(-1).tolist()]
    return {**{name: [int(hit) for hit in hits] for name, hits in found.items()}, **sets}


def draw(pipe, scenes: Sequence[openmoji.Scene], seed: int, protocol: Protocol, keep: bool = True) -> Tensor:
    """Pictures uint8 [N, 3, 64, 64] of the scenes' captions; the noise of each is fixed by ``seed`` and its scene.

    ``keep``: look for them in ``data/.cache`` first, and leave them there.
    """
    return generate(
        pipe,
        [scene.caption for scene in scenes],
        [1_000_000 * (seed + 1) + scene.index for scene in scenes],
        cache_dir=cache_folder("pictures") if keep else None,
        progress=False,
        **protocol.sampling,
    )
