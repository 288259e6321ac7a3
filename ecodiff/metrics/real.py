"""Features of the real images in a folder, whatever their sizes, to measure distances to them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ecodiff.errors import EcoDiffError
from ecodiff.progress import say
from ecodiff.storage.images import read_image

from .inception import inception_features

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")

_BATCH = 64


@dataclass(frozen=True)
class RealImages:
    """Features float32 [N, D] of the images of a folder that could be read, and the files that could not."""

    features: Tensor
    unreadable: list[Path]


def real_images(folder: str | os.PathLike, **feature_settings) -> RealImages:
    """The features of all image files in a folder and the folders below it, in the order of their names.

    Each image is resized from its own size, as `inception_features` does it. Files that cannot be read as images are
    left out, and one line on standard error says so. ``feature_settings`` go to `inception_features`. Raises
    EcoDiffError for fewer than two images that can be read.
    """
    files = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    parts: list[Tensor] = []
    unreadable: list[Path] = []
    batch: list[Tensor] = []

    def finish_batch() -> None:
        if batch:
            parts.append(inception_features(torch.stack(batch), progress=False, **feature_settings))
            batch.clear()

    for file in files:
        try:
            image = read_image(file)
        except EcoDiffError:
            unreadable.append(file)
            continue
        # A batch holds images of one size, and follows the order of the files.
        if batch and (batch[0].shape != image.shape or len(batch) == _BATCH):
            finish_batch()
        batch.append(image)
    finish_batch()
    count = sum(map(len, parts))
    if count < 2:
        raise EcoDiffError(
            f"{folder}: {count} of its {len(files)} image files can be read, and a distance needs two or more."
        )
    if unreadable:
        say(
            f"{folder}: {len(unreadable)} of {len(files)} image files cannot be read and are left out, such as "
            f"{unreadable[0].name}"
        )
    return RealImages(torch.cat(parts), unreadable)
