"""Distances between sets of images (App. E.1): FID and KID. The formulas are torchmetrics'."""

from __future__ import annotations

import math
import os
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from ecodiff.errors import EcoDiffError

from .inception import inception_features


@dataclass(frozen=True)
class Statistics:
    """Mean float64 [D] and covariance float64 [D, D] of the features of a set of images: all that FID needs of it."""

    mean: Tensor
    covariance: Tensor

    @classmethod
    def load(cls, path: str | os.PathLike) -> Statistics:
        """Statistics that are stored as pytorch-fid does: an ``.npz`` with ``mu`` [D] and ``sigma`` [D, D].

        Nothing in the file is run. Raises EcoDiffError for any other file.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                mean, covariance = (np.asarray(file[name], dtype=np.float64) for name in ("mu", "sigma"))
        except Exception as error:  # zipfile, zlib and numpy each have errors of their own for damaged files
            raise EcoDiffError(
                f"{path}: holds no statistics (.npz with mu and sigma, as pytorch-fid writes): {error}."
            ) from error
        square = mean.ndim == 1 and mean.size > 0 and covariance.shape == (mean.size, mean.size)
        if not square or not np.isfinite(mean).all() or not np.isfinite(covariance).all():
            raise EcoDiffError(f"{path}: mu must have D finite numbers, and sigma D x D.")
        return cls(torch.from_numpy(mean), torch.from_numpy(covariance))


def fid(real: Tensor | Statistics, fake: Tensor, **feature_settings) -> float:
    """Fréchet Inception distance between two sets of images (uint8 [N, 3, H, W]) or of their features (float [N, D]).

    Give features (``inception_features``) where a set is used more than once. ``feature_settings`` go to
    ``inception_features``. It is computed in float64. FID grows as sets shrink: compare only sets of the same sizes,
    and below some thousands of images prefer ``kid``, which is not biased.

    real: may be stored `Statistics`. They must be of the same network and resizing: pytorch-fid resizes without
    antialiasing, so its numbers differ a little from those here.
    """
    if isinstance(real, Statistics):
        return _fid_to_statistics(real, _features(fake, feature_settings))
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


def _fid_to_statistics(real: Statistics, fake: Tensor) -> float:
    """FID where one of the sets is known by its mean and covariance only."""
    if len(fake) < 2:
        raise EcoDiffError("A distance between sets needs at least two pictures in each.")
    if fake.shape[1] != len(real.mean):
        raise EcoDiffError(
            f"The statistics have {len(real.mean)} features and the pictures {fake.shape[1]}: take the same layer."
        )
    fake = fake.double()
    mean = fake.mean(0)
    # With BᵀB the covariance of the pictures, the eigenvalues of S BᵀB that are not 0 are those of B S Bᵀ, which is
    # symmetric. B has as many rows as there are pictures, or as there are features where those are fewer.
    factor = (fake - mean) / math.sqrt(len(fake) - 1)
    if len(factor) > factor.shape[1]:
        factor = torch.linalg.qr(factor, mode="r").R
    common = torch.linalg.eigvalsh(factor @ real.covariance @ factor.T).clamp(min=0).sqrt().sum()
    spread = real.covariance.trace() + factor.square().sum()
    return ((real.mean - mean).square().sum() + spread - 2 * common).item()


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
    sets = [_features(images, feature_settings) for images in (real, fake)]
    if sets[0].shape[1] != sets[1].shape[1]:
        raise EcoDiffError(
            f"The sets have {sets[0].shape[1]} and {sets[1].shape[1]} features: take them from the same layer."
        )
    if min(map(len, sets)) < 2:
        raise EcoDiffError("A distance between sets needs at least two pictures in each.")
    return sets


def _features(images: Tensor, feature_settings: dict) -> Tensor:
    """The features float [N, D] of images, or those that were given in their place."""
    if isinstance(images, Tensor) and images.dim() == 2 and images.is_floating_point():
        return images
    return inception_features(images, **feature_settings)


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
