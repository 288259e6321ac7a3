"""Folders of generated images or clips: a PNG file each, and one file that says what they show and how they were made.

The PNG of a clip is animated (APNG): its frames are kept without loss, and a browser plays them.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from ecodiff.errors import EcoDiffError

from .files import alone_in, tidy_up, write_whole
from .paths import checked_path

ABOUT = "images.json"
FORMAT = "ecodiff.images.1"


@dataclass(frozen=True)
class About:
    """What the images of a folder show: image i is that of prompt i and seed i."""

    prompts: list[str]
    seeds: list[int]
    settings: dict
    """Of the pipeline's call."""
    model: str
    """The name, folder or id that the pipeline was loaded by."""
    weights: str | None = None
    """A digest of all that the images depend on; None where the pipeline has no description by value."""

    def as_json(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self), "sha256": self.checksum()}, indent=1) + "\n"

    def checksum(self) -> str:
        """SHA-256 of what is said here."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


class ImageFolder:
    """A folder that gets images one after the other, and knows which it has: an interrupted run goes on."""

    def __init__(self, path: str | os.PathLike, about: About):
        self.path, self.about = checked_path(path, "images"), about
        try:
            self.path.mkdir(exist_ok=True)
        except OSError as error:
            raise EcoDiffError(f"{path}: images cannot be written there ({error}).") from error
        self._lock = alone_in(self.path)

    def __enter__(self) -> ImageFolder:
        """Begin to write; EcoDiffError where another process does, and for a folder that holds something else."""
        self._lock.__enter__()
        try:
            self._begin()
        except BaseException:
            self._lock.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, *error) -> None:
        self._lock.__exit__(*error)

    def _begin(self) -> None:
        earlier = self.path / ABOUT
        try:
            tidy_up(self.path)
            if earlier.exists():
                if self.about.weights is None or read_about(self.path).checksum() != self.about.checksum():
                    raise EcoDiffError(
                        f"{self.path}: this folder holds images of another run (see its {ABOUT}); give another folder."
                    )
            elif any(not left.name.endswith(".tmp") for left in self.path.iterdir()):  # of a run that was killed
                raise EcoDiffError(f"{self.path}: this folder is not empty; give another one.")
            else:
                write_whole(earlier, self.about.as_json().encode())
        except OSError as error:
            raise EcoDiffError(f"{self.path}: images cannot be written there ({error}).") from error

    def missing(self) -> list[int]:
        """Numbers of the images that are not there yet."""
        return [number for number in range(len(self.about.prompts)) if not _file(self.path, number).is_file()]

    def write(self, number: int, image: Tensor) -> None:
        """Write one image, uint8 [3, height, width], or clip [frames, 3, height, width], whole or not at all."""
        # Frames have no duration here: those that are alike would be put together then.
        try:
            write_whole(_file(self.path, number), encoded(image, "PNG"), tidy=False)
        except OSError as error:
            raise EcoDiffError(f"{self.path}: image {number} cannot be written ({error}).") from error


def encoded(image: Tensor, kind: str, **options) -> bytes:
    """The file of an image, uint8 [3, height, width], or of a clip [frames, 3, height, width]; options are Pillow's.

    Raises EcoDiffError for anything else, such as sound or a map of depths.
    """
    from PIL import Image

    if image.ndim not in (3, 4) or image.shape[-3] != 3:
        raise EcoDiffError(f"Images and clips of three colours are kept, not {list(image.shape)}.")

    frames = image.reshape(-1, *image.shape[-3:]).permute(0, 2, 3, 1).cpu().numpy()
    first, *others = (Image.fromarray(frame) for frame in frames)
    content = io.BytesIO()
    first.save(content, kind, save_all=bool(others), append_images=others, **options)
    return content.getvalue()


def read_about(path: str | os.PathLike) -> About:
    """What a folder of images says of itself. Raises EcoDiffError for a folder that no run wrote."""
    file = checked_path(path, "images") / ABOUT
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content.pop("format") != FORMAT:
            raise ValueError("another format")
        signed = content.pop("sha256", None)  # folders of earlier versions have none
        about = About(**content)
        if len(about.prompts) != len(about.seeds):
            raise ValueError("it has not one seed a prompt")
        if signed not in (None, about.checksum()):
            raise ValueError("its contents do not fit their checksum")
    except OSError as error:
        raise EcoDiffError(f"{path}: no folder of images that `generate` wrote ({error}).") from error
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise EcoDiffError(f"{file}: this file is damaged ({error}): generate the images again.") from error
    return about


def read_images(path: str | os.PathLike, numbers: Sequence[int] | None = None) -> tuple[Tensor, About]:
    """The images of a folder, uint8 [N, 3, height, width], all or those of some numbers; and what all of them show.

    Clips come as [N, frames, 3, height, width]. Raises EcoDiffError where an image is missing or damaged, or the images
    differ in size.
    """
    about = read_about(path)
    images = []
    for number in range(len(about.prompts)) if numbers is None else numbers:
        file = _file(Path(path), number)
        if not file.is_file():
            raise EcoDiffError(f"{path}: image {file.name} is missing: give the command that generates them again.")
        images.append(_frames(file))
    if len({image.shape for image in images}) > 1:
        raise EcoDiffError(f"{path}: its images are not all of one size.")
    together = torch.stack(images)
    return (together[:, 0] if together.shape[1] == 1 else together), about


def read_image(path: str | os.PathLike) -> Tensor:
    """One image file as uint8 [3, height, width], the first frame of an animated one.

    Raises EcoDiffError where it cannot be read.
    """
    return _frames(path, most=1)[0]


def _frames(path: str | os.PathLike, most: int | None = None) -> Tensor:
    """The frames of an image file, all or so many, as uint8 [frames, 3, height, width]."""
    import numpy as np
    from PIL import Image, ImageSequence

    try:
        with Image.open(path) as image:
            image.verify()  # checksums, which reading leaves out; it has to be opened anew after that
        with Image.open(path) as image:
            frames = [np.asarray(frame.convert("RGB")) for frame in islice(ImageSequence.Iterator(image), most)]
    # What PIL raises for damaged files, and for those that are larger than it finds safe to unpack.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise EcoDiffError(f"{path}: this image cannot be read ({error}).") from error
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)


def _file(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.png"
