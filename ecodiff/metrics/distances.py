"""Distances between sets of images (App. E.1): FID and KID. The formulas are torchmetrics'."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from ecodiff.errors import EcoDiffError

from .inception import inception_features


def fid(real: Tensor, fake: Tensor, **feature_settings) -> float:
    """Fréchet Inception distance between two sets of images (uint8 [N, 3, H, W]) or of their features (float [N, D]).

    Give features (``inception_features``) where a set is used more than once. ``feature_settings`` go to
    ``inception_features``. It is computed in float64. FID grows as sets shrink: compare only sets of the same sizes,
    and below some thousands of images prefer ``kid``, which is not biased.
    """
    sets = _feature_sets(real, fake, feature_settings)
    # Few images take milliseconds this way; torchmetrics takes some ten seconds on a CPU with 2048 features.
    if max(map(len, sets)) <= sets[0].shape[1]:
        return fid_of_few(*(features.double() for features in sets))
    return distance(FrechetInceptionDistance, *sets).compute().item()


def fid_of_few(a: Tensor, b: Tensor) -> float:
    """The same distance without a covariance matrix, which takes long where there are more features than images."""
    # With A and B the centred features over sqrt(n - 1), one row an image, AᵀA and BᵀB are the covariances, and
    # tr((AᵀA BᵀB)^1/2) is the sum of the singular values of A Bᵀ, which is small where images are few.
    mean_a, mean_b = a.mean(0), b.mean(0)
    centred_a = (a - mean_a) / math.sqrt(len(a) - 1)
    centred_b = (b - mean_b) / math.sqrt(len(b) - 1)
    spread = centred_a.square().sum() + centred_b.square().sum()  # the traces of the covariances
    common = torch.linalg.svdvals(centred_a @ centred_b.T).sum()
    return ((mean_a - mean_b).square().sum() + spread - 2 * common).item()


def kid(
    real: Tensor, fake: Tensor, *, subsets: int = 100, subset_size: int | None = None, seed: int = 0, **feature_settings
) -> tuple[float, float]:
    """Kernel Inception distance: mean and standard deviation over random subsets, drawn by ``seed``.

    The sets are as for ``fid``. ``subset_size`` is by default half of the smaller set, at most 1000. The standard
    deviation is that of overlapping subsets, not an interval of the mean. Raises EcoDiffError for sets smaller than a
    subset.
    """
    smaller = min(len(real), len(fake))
    size = subset_size
    if size is None:
        size = min(1000, max(2, smaller // 2))
    if not 2 <= size <= smaller:
        raise EcoDiffError(
            f"KID with subsets of {size} needs at least two and at most as many pictures as the sets have ({smaller})."
        )
    sets = _feature_sets(real, fake, feature_settings)
    metric = distance(KernelInceptionDistance, *sets, subsets=subsets, subset_size=size)
    with torch.random.fork_rng([]):  # torchmetrics draws from the global generator
        torch.manual_seed(seed)
        mean, deviation = metric.compute()
    return mean.item(), deviation.item()


class _Given(nn.Module):
    """torchmetrics' feature network where the features are computed already: it gives back what it gets."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def _feature_sets(real: Tensor, fake: Tensor, feature_settings: dict) -> list[Tensor]:
    """Features of both sets, checked: float [N, D] with the same D. Raises EcoDiffError."""
    sets = []
    for images in (real, fake):
        if images.dim() == 2 and images.is_floating_point():
            sets.append(images)  # features already
        else:
            sets.append(inception_features(images, **feature_settings))
    if sets[0].shape[1] != sets[1].shape[1]:
        raise EcoDiffError(
            f"The sets have {sets[0].shape[1]} and {sets[1].shape[1]} features: take them from the same layer."
        )
    if min(map(len, sets)) < 2:
        raise EcoDiffError("A distance between sets needs at least two pictures in each.")
    return sets


def distance(metric, real: Tensor, fake: Tensor, **settings):
    """A metric of torchmetrics that has seen both sets of features.

    The sets are whole in this process, so nothing is added of other processes that a launcher started.
    """
    # The warning is about the memory that features take; here they are in memory already.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*will save all extracted features in buffer", category=UserWarning)
        metric = metric(feature=_Given(real.shape[1]), sync_on_compute=False, **settings)
    metric.update(real.double(), real=True)
    metric.update(fake.double(), real=False)
    return metric
