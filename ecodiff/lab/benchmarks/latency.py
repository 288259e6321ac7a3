"""Seconds of pipelines that take turns, so that a busy machine slows all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence

from ecodiff.method.generate import generate


def latency(models: Mapping[str, object], captions: Sequence[str], *, turns: int = 5, **settings) -> dict[str, dict]:
    """Seconds of drawing the captions with each pipeline, in turns; ratios to the first pipeline, pair by pair."""
    seconds: dict[str, list[float]] = {label: [] for label in models}
    for turn in range(turns + 1):  # the first turn warms up
        for label, pipe in models.items():
            started = time.perf_counter()
            generate(pipe, captions, range(len(captions)), progress=False, **settings)
            if turn:
                seconds[label].append(time.perf_counter() - started)
    base = seconds[next(iter(models))]
    result = {}
    for label, times in seconds.items():
        ratios = [a / b for a, b in zip(times, base, strict=True)]
        low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
        result[label] = {"seconds": statistics.median(times), "ratio": middle, "low": low, "high": high}
    return result
