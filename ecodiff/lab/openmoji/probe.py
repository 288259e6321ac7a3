"""Does a picture show what its prompt asked for: the object by a linear probe, the background by its colour.

The probe is a multinomial logistic regression on standardised Inception features, fitted on real scenes with one
object. What it reaches on real scenes it has not seen is the ceiling for drawn ones.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.nn.functional import cross_entropy

from ecodiff.errors import EcoDiffError
from ecodiff.metrics.inception import SIZE, check_pictures, inception_features
from ecodiff.storage.files import write_whole


@dataclass(frozen=True)
class ObjectProbe:
    """Names the object of a picture. ``ceiling`` is its accuracy on real pictures held out when it was fitted.

    ``weight`` [classes, features] and ``bias`` [classes] act on ``(features - mean) / scale``; ``num_features`` and
    ``size`` say which Inception features (see ``ecodiff.metrics.inception``).
    """

    names: tuple[str, ...]
    weight: Tensor
    bias: Tensor
    mean: Tensor
    scale: Tensor
    ceiling: float
    num_features: int = 2048
    size: int = SIZE

    @classmethod
    def fit(
        cls,
        images: Tensor,
        labels: Sequence[str],
        *,
        heldout: float = 0.2,
        weight_decay: float = 1e-2,
        num_features: int = 2048,
        size: int = SIZE,
        seed: int = 0,
        **feature_settings,
    ) -> ObjectProbe:
        """Fit on real pictures (uint8 [N, 3, H, W]) with one object each, or on their features (float [N, D]).

        A share ``heldout`` of the pictures, drawn by ``seed``, is kept aside for ``ceiling``. ``weight_decay`` is the
        weight of half the squared norm beside the mean cross entropy. Takes about 20 pictures a class.
        ``feature_settings`` go to ``inception_features`` (``cache_dir``, ``progress``, ``device``, ``batch_size``).
        Raises EcoDiffError for numbers that do not match, fewer than two classes, or a split that leaves a class
        without pictures to fit.
        """
        labels = list(labels)
        if len(images) != len(labels):
            raise EcoDiffError(f"{len(images)} images but {len(labels)} labels: the probe needs one label per image.")
        names = tuple(sorted(set(labels)))
        if len(names) < 2:
            raise EcoDiffError(f"The probe was given {len(names)} different labels: it needs at least two.")
        if not 0 < heldout < 1:
            raise EcoDiffError(f"heldout={heldout} is not a share between 0 and 1.")
        features = _features(images, num_features=num_features, size=size, **feature_settings)
        target = torch.tensor([names.index(label) for label in labels])
        order = torch.randperm(len(target), generator=torch.Generator().manual_seed(seed))
        aside = max(1, round(len(target) * heldout))
        test, train = order[:aside], order[aside:]
        missing = set(range(len(names))) - set(target[train].tolist())
        if missing:
            raise EcoDiffError(
                f"No image of {names[min(missing)]!r} is left to fit the probe: give more images of each object."
            )
        mean, scale = features[train].mean(0), features[train].std(0).clamp_min(1e-6)
        weight, bias = _logistic_regression((features[train] - mean) / scale, target[train], len(names), weight_decay)
        predicted = ((features[test] - mean) / scale @ weight.T + bias).argmax(1)
        ceiling = (predicted == target[test]).double().mean().item()
        return cls(names, weight, bias, mean, scale, ceiling, features.shape[1], size)

    def predict(self, images: Tensor, **feature_settings) -> list[str]:
        """The most probable object of each picture (uint8 [N, 3, H, W], or features [N, D])."""
        features = _features(images, num_features=self.num_features, size=self.size, **feature_settings)
        if features.shape[1] != self.num_features:
            raise EcoDiffError(f"The probe reads {self.num_features} features per image, not {features.shape[1]}.")
        scores = (features - self.mean) / self.scale @ self.weight.T + self.bias
        return [self.names[i] for i in scores.argmax(1)]

    def correct(self, images: Tensor, labels: Sequence[str], **feature_settings) -> Tensor:
        """Whether each picture shows the object it should: bool [N]. EcoDiffError for objects the probe lacks."""
        labels = list(labels)
        if len(images) != len(labels):
            raise EcoDiffError(f"{len(images)} images but {len(labels)} labels: give one label per image.")
        unknown = sorted(set(labels) - set(self.names))
        if unknown:
            raise EcoDiffError(f"The probe was not fitted on {unknown[0]!r}: it knows {len(self.names)} objects.")
        predicted = self.predict(images, **feature_settings)
        return torch.tensor([name == label for name, label in zip(predicted, labels, strict=True)])

    def accuracy(self, images: Tensor, labels: Sequence[str], **feature_settings) -> float:
        """Share of pictures that show the object they should."""
        return self.correct(images, labels, **feature_settings).double().mean().item()

    def save(self, path: str | os.PathLike) -> None:
        """Write as safetensors, whole or not at all."""
        path = Path(path)
        tensors = {name: getattr(self, name).contiguous() for name in _TENSORS}
        metadata = {"names": self.names, "ceiling": self.ceiling, "num_features": self.num_features, "size": self.size}
        try:
            write_whole(path, save(tensors, {"ecodiff_probe": json.dumps(metadata)}))
        except OSError as error:
            raise EcoDiffError(f"{path}: the probe could not be saved ({error}); nothing was written there.") from error

    @classmethod
    def load(cls, path: str | os.PathLike) -> ObjectProbe:
        """Read a probe that ``save`` wrote; raises EcoDiffError for any other file."""
        try:
            with safe_open(path, "pt") as file:
                metadata = json.loads(file.metadata()["ecodiff_probe"])
                tensors = {name: file.get_tensor(name) for name in _TENSORS}
            probe = cls(names=tuple(metadata.pop("names")), **metadata, **tensors)
            fits = probe.weight.shape == (len(probe.names), probe.num_features) and len(probe.bias) == len(probe.names)
        except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:
            raise EcoDiffError(f"{path} is not a readable probe ({error}): fit it again.") from error
        if not fits or probe.mean.shape != probe.scale.shape or len(probe.mean) != probe.num_features:
            raise EcoDiffError(f"{path} is not a whole probe (its shapes do not match): fit it again.")
        return probe


_TENSORS = ("weight", "bias", "mean", "scale")


def _features(images: Tensor, **settings) -> Tensor:
    """Features [N, D] as they are, features of pictures otherwise."""
    if isinstance(images, Tensor) and images.dim() == 2 and images.is_floating_point():
        return images.float()
    return inception_features(images, **settings)


def _logistic_regression(x: Tensor, target: Tensor, classes: int, weight_decay: float) -> tuple[Tensor, Tensor]:
    """Minimum of mean cross entropy + weight_decay / 2 · ‖W‖²: a convex problem, so the start does not matter."""
    weight = torch.zeros(classes, x.shape[1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=200, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

    def loss():
        solver.zero_grad()
        value = cross_entropy(x @ weight.T + bias, target) + weight_decay / 2 * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        solver.step(loss)
    return weight.detach(), bias.detach()


def background_colour(images: Tensor, colours: Mapping[str, tuple[int, int, int]], border: int = 2) -> list[str]:
    """The named colour nearest (in RGB) to the median of each picture's border, ``border`` pixels wide.

    images: uint8 [N, 3, H, W]; colours: name -> (red, green, blue) in 0..255, as ``openmoji.COLOURS``. The median
    ignores objects that touch less than half of the border.
    """
    check_pictures(images)
    if not colours:
        raise EcoDiffError("background_colour needs at least one named colour.")
    rim = torch.ones(images.shape[-2:], dtype=torch.bool)
    rim[border:-border, border:-border] = False
    median = np.median(images[:, :, rim].numpy(), axis=2)  # [N, 3]
    table = np.array(list(colours.values()), dtype=float)
    nearest = np.square(median[:, None] - table[None]).sum(-1).argmin(1)
    return [list(colours)[i] for i in nearest]


def background_correct(images: Tensor, expected: Sequence[str], colours: Mapping[str, tuple[int, int, int]]) -> Tensor:
    """Whether each picture's background has the named colour it should: bool [N]."""
    expected = list(expected)
    if len(images) != len(expected):
        raise EcoDiffError(f"{len(images)} images but {len(expected)} colours: give one colour per image.")
    unknown = sorted(set(expected) - set(colours))
    if unknown:
        raise EcoDiffError(f"{unknown[0]!r} is not among the named colours: {', '.join(colours)}.")
    backgrounds = background_colour(images, colours)
    return torch.tensor([colour == named for colour, named in zip(backgrounds, expected, strict=True)])
