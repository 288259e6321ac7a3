"""OpenMoji clips: the captioned videos that ``openmoji-wan`` is trained on and judged by, drawn here without end.

A clip shows one of sixteen OpenMoji objects on one of the ten named background colours. The object moves left, right,
up or down, or it grows or shrinks: nine frames of 32x32 pixels, with a caption such as "a cat that moves left on a
green background". Clip ``i`` of a split is always the same. A tenth of all pairs of object and motion never occurs in
``train``; these are the split ``heldout``. Turns are left out, since no judge here could tell that of a round object.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from PIL import Image

from ecodiff.errors import EcoDiffError

from .drawing import COLOURS, SPLITS, background_phrase, is_heldout, noun, sprite

CLIP_SIZE = 32
FRAMES = 9  # 4 n + 1: the VAE of Wan encodes the first frame alone and then four at a time
MOTIONS = {
    "left": "moves left",
    "right": "moves right",
    "up": "moves up",
    "down": "moves down",
    "grow": "grows",
    "shrink": "shrinks",
}
JUDGE_VERSION = 1
"""Of ``openmoji.motion``; changes whenever a verdict could, since it is in the keys of recorded rows."""
CLIP_OBJECTS = (
    *("apple", "banana", "car", "cat", "dog", "fish", "frog", "ghost"),
    *("heart", "panda", "penguin", "pig", "pizza", "rocket", "star", "tree"),
)
FINE = 4  # places and sizes are whole numbers of a quarter of a pixel
TRAVEL = (10 * FINE, 15 * FINE)  # how far an object moves: least and most
SMALL, LARGE = (8 * FINE, 10 * FINE), (18 * FINE, 22 * FINE)  # sizes between which one grows or shrinks


@dataclass(frozen=True)
class Clip:
    """One captioned video; ``boxes`` are (left, top, size) of the object in quarters of a pixel, one a frame."""

    index: int
    split: str
    caption: str
    object: str
    colour: str
    motion: str
    boxes: tuple[tuple[int, int, int], ...]

    @cached_property
    def frames(self) -> np.ndarray:
        """uint8 [9, 32, 32, 3], drawn when first asked for."""
        return np.stack([render_frame(self.object, COLOURS[self.colour], box) for box in self.boxes])


def render_frame(name: str, background: tuple[int, int, int], box: tuple[int, int, int]) -> np.ndarray:
    """Draw one object at a box (left, top, size; quarters of a pixel) on a background (RGB): uint8 [32, 32, 3]."""
    left, top, size = box
    art = _art(name, size)
    # Drawn four times as large and then reduced, so that a slow object does not jump from pixel to pixel.
    picture = Image.new("RGB", (CLIP_SIZE * FINE, CLIP_SIZE * FINE), background)
    picture.paste(art, (left, top), art)
    return np.asarray(picture.reduce(FINE))


@lru_cache(maxsize=2048)
def _art(name: str, size: int) -> Image.Image:
    return sprite(name).resize((size, size), Image.Resampling.BOX, reducing_gap=None).convert("RGBA")


def clip_caption(name: str, colour: str, motion: str, wording: int = 0) -> str:
    """The caption of a clip; ``wording`` 0, 1 or 2 chooses how it names the background.

    Raises EcoDiffError for an unknown object, colour or motion.
    """
    for value, known in ((name, CLIP_OBJECTS), (colour, COLOURS), (motion, MOTIONS)):
        if value not in known:
            raise EcoDiffError(f"{value!r} is no word of the OpenMoji clips: take one of {', '.join(known)}.")
    return f"{noun(name)} that {MOTIONS[motion]} {background_phrase(colour, wording)}"


def clip(index: int, split: str = "train") -> Clip:
    """Clip ``index`` of a split: always the same frames and caption.

    Raises EcoDiffError for an unknown split or a negative index.
    """
    if split not in SPLITS:
        raise EcoDiffError(f"Unknown split {split!r} of the OpenMoji clips: take one of {', '.join(SPLITS)}.")
    if index < 0:
        raise EcoDiffError(f"Clip index {index} is negative: clips are numbered from 0.")
    # A clip is what this generator gives in this order: another order of the draws would make other data.
    rng = np.random.default_rng([SPLITS[split], FRAMES, CLIP_SIZE, index])
    while True:
        name, motion = CLIP_OBJECTS[rng.integers(len(CLIP_OBJECTS))], tuple(MOTIONS)[rng.integers(len(MOTIONS))]
        if is_heldout(name, motion) == (split == "heldout"):
            break
    colour = tuple(COLOURS)[rng.integers(len(COLOURS))]
    boxes = _boxes(rng, motion)
    return Clip(index, split, clip_caption(name, colour, motion, int(rng.integers(3))), name, colour, motion, boxes)


def _boxes(rng: np.random.Generator, motion: str) -> tuple[tuple[int, int, int], ...]:
    """Where the object is in each frame: at constant speed along one axis, or growing at its place."""
    side, steps = CLIP_SIZE * FINE, np.linspace(0.0, 1.0, FRAMES)
    if motion in ("grow", "shrink"):
        small, large = rng.integers(SMALL[0], SMALL[1] + 1), rng.integers(LARGE[0], LARGE[1] + 1)
        sizes = small + (large - small) * steps
        x, y = side / 2 + rng.integers(-2 * FINE, 2 * FINE + 1, 2)
        across, down = np.full(FRAMES, x), np.full(FRAMES, y)
    else:
        size, travel = rng.integers(14 * FINE, 16 * FINE + 1), rng.integers(TRAVEL[0], TRAVEL[1] + 1)
        first = size / 2 + rng.integers(0, side - size - travel + 1)
        sizes = np.full(FRAMES, float(size))
        along, other = first + travel * steps, np.full(FRAMES, side / 2 + rng.integers(-3 * FINE, 3 * FINE + 1))
        across, down = (along, other) if motion in ("left", "right") else (other, along)
    if motion in ("left", "up", "shrink"):  # the same way back
        across, down, sizes = across[::-1], down[::-1], sizes[::-1]
    boxes = []
    for x, y, size in zip(across, down, sizes, strict=True):
        boxes.append((round(x - size / 2), round(y - size / 2), round(size)))
    return tuple(boxes)


def clips(split: str = "train", n: int | None = None, start: int = 0) -> Iterator[Clip]:
    """Clips ``start``, ``start + 1``, … of a split: ``n`` of them, or without end."""
    index = start
    while n is None or index < start + n:
        yield clip(index, split)
        index += 1


def videos(items: list[Clip]):
    """Frames of clips as one uint8 tensor [N, 9, 3, 32, 32]."""
    import torch

    return torch.from_numpy(np.stack([item.frames for item in items])).permute(0, 1, 4, 2, 3).contiguous()
