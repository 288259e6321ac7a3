"""Intervals of means, shares and paired differences, and the smallest effect that a reader should care about."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import ndtri, stdtrit

from ecodiff.errors import EcoDiffError

if TYPE_CHECKING:  # recorded rows are lists: whoever compares them waits for no torch
    from torch import Tensor


def difference(first: Sequence[Sequence[float]], second: Sequence[Sequence[float]]) -> Interval:
    """Mean difference first - second with its 95 % interval over seeds and images, paired by both.

    Where no image differs at all in a measure that is 0 or 1, the interval is that of the rule of three.
    """
    pairs = []
    for first_group, second_group in zip(first, second, strict=True):
        pairs.append([a - b for a, b in zip(first_group, second_group, strict=True)])
    interval = nested_interval(pairs)
    values: set[float] = set().union(*first, *second)
    if interval.low == interval.high == 0 and values <= {0, 1}:
        # Resampling can only give an interval of no width here. But with n images of which none differs, up to a share
        # of 1 - 0.05^(1/n), about 3/n, could differ with a chance of 5 % (Hanley & Lippman-Hand 1983).
        unseen = 1 - 0.05 ** (1 / len(pairs[0]))
        return replace(interval, low=-unseen, high=unseen)
    return interval


SMALLEST_EFFECT = 0.05
"""Smallest effect of interest, for every comparison of this book: 0.05 of SSIM, or 5 of 100 images.

What is smaller counts as no difference, whichever way it goes."""

EFFECTS = ("more", "less", "no difference that matters", "undecided")
"""What ``Interval.word`` can say."""


@dataclass(frozen=True)
class Interval:
    """A mean and the interval that covers it at ``level``."""

    mean: float
    low: float
    high: float
    level: float

    @property
    def sign(self) -> int:
        """Of a difference, 1 where all of the interval is above zero, -1 where all is below, 0 where zero is in it."""
        return (self.low > 0) - (self.high < 0)

    @property
    def word(self) -> str:
        """What the interval of a difference says about effects of at least ``SMALLEST_EFFECT``, as tables have it.

        "more" or "less": the whole interval lies beyond the smallest effect. "no difference that matters": all of it
        lies within. "undecided": it allows both.
        """
        if self.low > SMALLEST_EFFECT:
            return "more"
        if self.high < -SMALLEST_EFFECT:
            return "less"
        if self.low > -SMALLEST_EFFECT and self.high < SMALLEST_EFFECT:
            return "no difference that matters"
        return "undecided"

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap_interval(
    values: Sequence[float] | Tensor, level: float = 0.95, seed: int = 0, resamples: int = 10_000
) -> Interval:
    """Percentile bootstrap interval of the mean, for many values (images) of any distribution; fixed by ``seed``."""
    values = _numbers(values, level)
    means = _resampled_means(values, np.random.default_rng(seed), resamples)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(values.mean()), float(low), float(high), level)


def nested_interval(
    groups: Sequence[Sequence[float]], level: float = 0.95, seed: int = 0, resamples: int = 10_000
) -> Interval:
    """Percentile bootstrap interval of the mean over groups of values, such as one group of images a seed.

    Groups are drawn, and then images: all images of a seed share its mask, so they are not independent. Percentiles of
    three groups are still no exact ones. With one group it is ``bootstrap_interval``, about that group alone. Raises
    EcoDiffError for groups of unequal length.
    """
    numbers = [_numbers(group, level) for group in groups]
    lengths = [len(group) for group in numbers]
    if len(set(lengths)) != 1:
        raise EcoDiffError(f"Groups of {lengths} values: give at least one, all as long.")
    if len(numbers) == 1:
        return bootstrap_interval(numbers[0], level, seed, resamples)
    values, rng = np.stack(numbers), np.random.default_rng(seed)
    number, length = values.shape
    means = []
    for many in _chunks(resamples, length):
        # One group less than there are makes the variance right (Rao & Wu 1988). Of all groups that are drawn the same
        # images are taken, since entry i of each belongs to the same caption: their means go first.
        drawn = values[rng.integers(number, size=(many, number - 1))].mean(1)
        means.append(np.take_along_axis(drawn, rng.integers(length, size=(many, length)), axis=1).mean(1))
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(values.mean()), float(low), float(high), level)


def difference_interval(
    first: Sequence[float] | Tensor,
    second: Sequence[float] | Tensor,
    *,
    paired: bool = True,
    level: float = 0.95,
    seed: int = 0,
    resamples: int = 10_000,
) -> Interval:
    """Percentile bootstrap interval of the mean of ``first`` minus that of ``second``.

    ``paired``: entry i of both belongs to the same image (caption and noise), so images are drawn, each with its
    difference. Otherwise each list is drawn on its own. Raises EcoDiffError for pairs that do not match.
    """
    first, second = _numbers(first, level), _numbers(second, level)
    if paired:
        if len(first) != len(second):
            raise EcoDiffError(f"{len(first)} and {len(second)} values are no pairs: give paired=False.")
        return bootstrap_interval(first - second, level, seed, resamples)
    rng = np.random.default_rng(seed)
    differences = _resampled_means(first, rng, resamples) - _resampled_means(second, rng, resamples)
    low, high = np.quantile(differences, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(first.mean() - second.mean()), float(low), float(high), level)


def _resampled_means(values: np.ndarray, rng: np.random.Generator, resamples: int) -> np.ndarray:
    """The mean of each of so many resamples, as long as the values, drawn with replacement."""
    means = []
    for many in _chunks(resamples, len(values)):
        means.append(values[rng.integers(len(values), size=(many, len(values)))].mean(1))
    return np.concatenate(means)


def _chunks(resamples: int, length: int) -> list[int]:
    """How many resamples to draw at a time. Recorded intervals depend on it: the draws of a chunk come in one call."""
    chunk = max(1, 4_000_000 // length)  # 32 MB of indices
    return [min(chunk, resamples - done) for done in range(0, resamples, chunk)]


def share_interval(hits: Sequence[float] | Tensor, level: float = 0.95) -> Interval:
    """Wilson's interval of a share, from one 0 or 1 an image.

    It says something where the bootstrap cannot: when all images are right, or none is. Raises EcoDiffError for other
    values.
    """
    hits = _numbers(hits, level)
    if not np.isin(hits, (0, 1)).all():
        raise EcoDiffError("A share is counted from zeros and ones.")
    n, share = len(hits), float(hits.mean())
    z = float(ndtri((1 + level) / 2))  # the normal quantile, 1.96 for 95 %
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return Interval(share, max(0.0, centre - half), min(1.0, centre + half), level)


def mean_interval(values: Sequence[float] | Tensor, level: float = 0.95) -> Interval:
    """Student's t interval of the mean, for a few about normal values, such as one a seed; infinite for one value."""
    values = _numbers(values, level)
    mean = float(values.mean())
    if len(values) == 1:
        return Interval(mean, -math.inf, math.inf, level)
    quantile = float(stdtrit(len(values) - 1, (1 + level) / 2))
    half = quantile * float(values.std(ddof=1)) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half, level)


def _numbers(values, level: float) -> np.ndarray:
    """The values as one float64 array, checked together with the level. Raises EcoDiffError."""
    if hasattr(values, "cpu"):  # a tensor; torch need not be imported to know
        values = values.cpu()
    values = np.asarray(values, dtype=float).ravel()
    if not len(values) or not np.isfinite(values).all():
        raise EcoDiffError("An interval needs at least one value, and all of them finite.")
    if not 0 < level < 1:
        raise EcoDiffError(f"level={level} is not a probability between 0 and 1.")
    return values
