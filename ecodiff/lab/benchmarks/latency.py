"""Seconds of pipelines that take turns, so that a busy machine slows all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence

from ecodiff.method.generate import generate


def latency(models: Mapping[str, object], captions: Sequence[str], *, turns: int = 5, **settings) -> dict[str, dict]:
    """Seconds of generating an image for each caption with each pipeline, and ratios to the first pipeline.

    All are medians over turns; a ratio is taken within a turn, ``low`` and ``high`` are its extremes.
    """
    seconds: dict[str, list[float]] = {label: [] for label in models}
    for turn in range(turns + 1):  # the first turn warms up
        for label, pipe in models.items():
            started = time.perf_counter()
            generate(pipe, captions, range(len(captions)), progress=False, **settings)
            if turn:
                seconds[label].append(time.perf_counter() - started)
    first = seconds[next(iter(models))]
    result = {}
    for label, times in seconds.items():
        ratios = [a / b for a, b in zip(times, first, strict=True)]
        result[label] = {
            "seconds": statistics.median(times),
            "ratio": statistics.median(ratios),
            "low": min(ratios),
            "high": max(ratios),
        }
    return result
