"""How good pictures are (§3.1, App. E.1): SSIM and PSNR against a reference, FID and KID between sets, and intervals.

The formulas are torchmetrics', SSIM in a form that is faster in double precision; the network behind FID and KID is in
``ecodiff.metrics.inception``.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics.functional.image import peak_signal_noise_ratio
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from ecodiff.errors import EcoDiffError
from ecodiff.lab.openmoji.probe import ObjectProbe, background_colour, background_correct

from .inception import inception_features

__all__ = [
    "Interval",
    "ObjectProbe",
    "background_colour",
    "background_correct",
    "bootstrap_interval",
    "difference_interval",
    "fid",
    "inception_features",
    "kid",
    "mean_interval",
    "nested_interval",
    "psnr",
    "share_interval",
    "ssim",
    "ssim_map",
]


_WINDOW = torch.exp(-((torch.arange(-5.0, 6.0, dtype=torch.float64) / 1.5) ** 2) / 2)  # 11 pixels, sigma 1.5
_WINDOW /= _WINDOW.sum()


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of each pair of pictures, float [N]; ``.mean()`` is the figure the paper reports.

    Pictures are uint8, or float in [0, 1], [N, C, H, W] of at least 11x11 pixels. Compared as they are, not resized:
    Gaussian window of 11 pixels (sigma 1.5), data range 1; in double precision, because in single precision equal
    pictures of even colour fall some ten-thousandths short of 1. Raises EcoDiffError for pictures that do not match.
    """
    a, b = _pair(a, b)
    if min(a.shape[-2:]) < len(_WINDOW):
        raise EcoDiffError(
            f"SSIM compares windows of 11x11 pixels: pictures of {a.shape[-2]}x{a.shape[-1]} are too small."
        )
    return _similarity(a, b).mean((1, 2, 3)).float()


def ssim_map(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of the window around each pixel, mean over channels: float [N, H, W].

    Input as for ``ssim``, which is the mean over the pixels. At the border the pictures are mirrored, as torchmetrics
    does.
    """
    return _similarity(*_pair(a, b)).mean(1).float()


def _similarity(a: Tensor, b: Tensor) -> Tensor:
    """SSIM (Wang et al. 2004, eq. 13) of the window around each pixel: float64 [N, C, H, W].

    torchmetrics convolves with the window as a square, which takes ten times as long in double precision.
    """
    a, b = (nn.functional.pad(x, (len(_WINDOW) // 2,) * 4, mode="reflect") for x in (a, b))
    mean_a, mean_b = _smooth(a), _smooth(b)
    var_a, var_b = (_smooth(x * x) - mean**2 for x, mean in ((a, mean_a), (b, mean_b)))
    covariance = _smooth(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    alike = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    return alike / ((mean_a**2 + mean_b**2 + c1) * (var_a.clamp(min=0) + var_b.clamp(min=0) + c2))


def _smooth(x: Tensor) -> Tensor:
    """Weighted means of the windows that are in the pictures, along one axis and then the other."""
    for dim in (-1, -2):
        size = x.shape[dim] - len(_WINDOW) + 1
        x = sum(weight * x.narrow(dim, at, size) for at, weight in enumerate(_WINDOW.tolist()))
    return x


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each pair in dB, float [N]; infinite for equal ones. Input as for ``ssim``."""
    a, b = _pair(a, b)
    return peak_signal_noise_ratio(a, b, data_range=1.0, reduction="none", dim=(1, 2, 3)).float()


def fid(real: Tensor, fake: Tensor, **feature_settings) -> float:
    """Fréchet Inception distance between two sets of pictures (uint8 [N, 3, H, W]) or of their features (float [N, D]).

    Give features (``inception_features``) where a set is used more than once. ``feature_settings`` go to
    ``inception_features``. Computed in float64. FID grows as sets shrink: compare only sets of the same sizes, and
    below some thousands of pictures prefer ``kid``, which is not biased. Sets with more pictures than features are
    left to torchmetrics (some ten seconds on a CPU with 2048 features); smaller ones take milliseconds.
    """
    sets = _feature_sets(real, fake, feature_settings)
    if max(map(len, sets)) <= sets[0].shape[1]:
        return _fid_of_few(*(features.double() for features in sets))
    return _distance(FrechetInceptionDistance, *sets).compute().item()


def _fid_of_few(a: Tensor, b: Tensor) -> float:
    """The same distance without a covariance matrix: with A and B the centred features over sqrt(n - 1), one row a
    picture, tr((AᵀA BᵀB)^1/2) is the sum of the singular values of A Bᵀ, which is small where pictures are few."""
    means, centred = [], []
    for features in (a, b):
        means.append(features.mean(0))
        centred.append((features - means[-1]) / math.sqrt(len(features) - 1))
    spread = sum(part.square().sum() for part in centred)
    common = torch.linalg.svdvals(centred[0] @ centred[1].T).sum()
    return ((means[0] - means[1]).square().sum() + spread - 2 * common).item()


def kid(
    real: Tensor, fake: Tensor, *, subsets: int = 100, subset_size: int | None = None, seed: int = 0, **feature_settings
) -> tuple[float, float]:
    """Kernel Inception distance: mean and standard deviation over random subsets, drawn by ``seed``.

    Sets as for ``fid``. ``subset_size``: left out, half of the smaller set, at most 1000. The standard deviation is
    that of overlapping subsets, not an interval of the mean. Raises EcoDiffError for sets smaller than a subset.
    """
    smaller = min(len(real), len(fake))
    size = min(1000, max(2, smaller // 2)) if subset_size is None else subset_size
    if not 2 <= size <= smaller:
        raise EcoDiffError(
            f"KID with subsets of {size} needs at least two and at most as many pictures as the sets have ({smaller})."
        )
    sets = _feature_sets(real, fake, feature_settings)
    metric = _distance(KernelInceptionDistance, *sets, subsets=subsets, subset_size=size)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        mean, deviation = metric.compute()
    return mean.item(), deviation.item()


class _Given(nn.Module):
    """torchmetrics' feature network where the features are computed already."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def _feature_sets(real: Tensor, fake: Tensor, feature_settings: dict) -> list[Tensor]:
    sets = [
        x if x.dim() == 2 and x.is_floating_point() else inception_features(x, **feature_settings) for x in (real, fake)
    ]
    if sets[0].shape[1] != sets[1].shape[1]:
        raise EcoDiffError(
            f"The sets have {sets[0].shape[1]} and {sets[1].shape[1]} features: take them from the same layer."
        )
    if min(map(len, sets)) < 2:
        raise EcoDiffError("A distance between sets needs at least two pictures in each.")
    return sets


def _distance(metric, real: Tensor, fake: Tensor, **settings):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*will save all extracted features in buffer", category=UserWarning)
        metric = metric(feature=_Given(real.shape[1]), **settings)
    metric.update(real.double(), real=True)
    metric.update(fake.double(), real=False)
    return metric


def _pair(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    if a.shape != b.shape or a.dim() != 4 or not len(a):
        raise EcoDiffError(
            f"Two sets of pictures of the same shape [N, C, H, W] are compared, not {list(a.shape)} and "
            f"{list(b.shape)}."
        )
    if a.dtype != b.dtype or not (a.dtype == torch.uint8 or a.is_floating_point()):
        raise EcoDiffError(f"Pictures are both uint8 or both float in [0, 1], not {a.dtype} and {b.dtype}.")
    return (a.double() / 255, b.double() / 255) if a.dtype == torch.uint8 else (a.double(), b.double())


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
        """Of a difference: 1 where all of the interval is above zero, -1 where all is below, 0 where zero is in it."""
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
    """Percentile bootstrap interval of the mean, for many values (pictures) of any distribution; fixed by ``seed``."""
    values = _numbers(values, level)
    means = _resampled_means(values, np.random.default_rng(seed), resamples)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(values.mean()), float(low), float(high), level)


def nested_interval(
    groups: Sequence[Sequence[float]], level: float = 0.95, seed: int = 0, resamples: int = 10_000
) -> Interval:
    """Percentile bootstrap interval of the mean over groups of values, such as one group of pictures a seed.

    All pictures of a seed share its mask, so they are not independent: groups are drawn, one less than there are, which
    makes the variance right (Rao & Wu 1988), and then pictures, the same ones in each group, since entry i of all
    belongs to the same caption. Percentiles of three groups are still no exact ones. With one group it is
    ``bootstrap_interval``, about that group alone. Raises EcoDiffError for groups of unequal length.
    """
    values = [_numbers(group, level) for group in groups]
    if len({len(group) for group in values}) != 1:
        raise EcoDiffError(f"Groups of {[len(group) for group in values]} values: give at least one, all as long.")
    if len(values) == 1:
        return bootstrap_interval(values[0], level, seed, resamples)
    values, rng = np.stack(values), np.random.default_rng(seed)
    number, length = values.shape
    means = []
    for done in range(0, resamples, chunk := max(1, 4_000_000 // length)):
        many = min(chunk, resamples - done)
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

    ``paired``: entry i of both belongs to the same picture (caption and noise), so pictures are drawn, each with its
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
    chunk = max(1, 4_000_000 // len(values))  # resamples at once, to bound memory
    means = [
        values[rng.integers(len(values), size=(min(chunk, resamples - done), len(values)))].mean(1)
        for done in range(0, resamples, chunk)
    ]
    return np.concatenate(means)


def share_interval(hits: Sequence[float] | Tensor, level: float = 0.95) -> Interval:
    """Wilson's interval of a share, from one 0 or 1 a picture.

    Says something where the bootstrap cannot: when all pictures are right, or none is. Raises EcoDiffError for other
    values.
    """
    hits = _numbers(hits, level)
    if not np.isin(hits, (0, 1)).all():
        raise EcoDiffError("A share is counted from zeros and ones.")
    n, share, z = len(hits), float(hits.mean()), NormalDist().inv_cdf((1 + level) / 2)
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return Interval(share, max(0.0, centre - half), min(1.0, centre + half), level)


def mean_interval(values: Sequence[float] | Tensor, level: float = 0.95) -> Interval:
    """Student's t interval of the mean, for a few about normal values, such as one a seed. Infinite for one value."""
    values = _numbers(values, level)
    mean = float(values.mean())
    if len(values) == 1:
        return Interval(mean, -math.inf, math.inf, level)
    half = _t_quantile(level, len(values) - 1) * float(values.std(ddof=1)) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half, level)


def _numbers(values, level: float) -> np.ndarray:
    values = np.asarray(values.cpu() if isinstance(values, Tensor) else values, dtype=float).ravel()
    if not len(values) or not np.isfinite(values).all():
        raise EcoDiffError("An interval needs at least one value, and all of them finite.")
    if not 0 < level < 1:
        raise EcoDiffError(f"level={level} is not a probability between 0 and 1.")
    return values


def _t_quantile(level: float, freedom: int) -> float:
    """t with P(|T| <= t) = level, by bisection; the series for whole degrees of freedom is Abramowitz & Stegun 26.7."""

    def inside(angle: float) -> float:
        odd, cosine = freedom % 2, math.cos(angle)
        term = total = 0.0 if freedom == 1 else cosine if odd else 1.0
        for k in range(3 if odd else 2, freedom - 1, 2):
            term *= cosine**2 * (k - 1) / k
            total += term
        return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total

    low, high = 0.0, math.pi / 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle) < level else (low, middle)
    return math.sqrt(freedom) * math.tan((low + high) / 2)
