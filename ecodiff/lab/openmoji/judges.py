"""The judge, the object probe and the features of real scenes, each loaded once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from ecodiff import metrics
from ecodiff.errors import EcoDiffError
from ecodiff.lab import openmoji
from ecodiff.metrics.clip import Judge
from ecodiff.storage.paths import data_file


def real_features(scenes: Sequence[openmoji.Scene]) -> Tensor:
    """Inception features [N, 2048] of the scenes themselves, each computed once in a process."""
    new = [scene for scene in scenes if scene not in _known_features]
    if new:
        seen = metrics.inception_features(openmoji.images(new), progress=False)
        _known_features.update(zip(new, seen, strict=True))
    return torch.stack([_known_features[scene] for scene in scenes])


_known_features: dict[openmoji.Scene, Tensor] = {}


@lru_cache(maxsize=1)
def judge() -> Judge | None:
    """The embedded judge, or None where it is not trained. It keeps its captions: the questions of a set of scenes are
    some twenty thousand, the same for every model."""
    try:
        return replace(Judge.load(), texts={})
    except EcoDiffError:
        return None


@lru_cache(maxsize=1)
def probe() -> openmoji.ObjectProbe:
    """The object probe kept under ``data/models/openmoji-probe``."""
    return openmoji.ObjectProbe.load(data_file("models/openmoji-probe/probe.safetensors"))
