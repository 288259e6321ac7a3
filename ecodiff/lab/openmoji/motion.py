"""The judge of clips: which object moves how, on which background, seen in the frames alone.

Three facts of a caption are looked for. The **background** is the named colour nearest to the median of all frames'
borders. The **motion** is read from the place and the size of what differs from that background, frame by frame. The
**object** is the one whose art, drawn at that place and in that size on that background, differs least from the
frames. So the judge has nothing that was learned, and knows no generator.

A clip shows a motion if its object covers at least half of the least way (or of the least growth) that real clips have,
along that direction more than along any other; otherwise its motion is "none".
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from ecodiff.errors import EcoDiffError

from .drawing import COLOURS
from .moving import CLIP_OBJECTS, CLIP_SIZE, FINE, LARGE, SMALL, TRAVEL, Clip, render_frame

FACTS = ("object", "colour", "motion")
_BORDER = 2  # pixels
_DIFFERENT = 40  # of 255, in any channel: such a pixel is no background
_FEWEST = 6  # pixels; a frame whose object has fewer shows none
_COMPARED = 3  # frames in which the object is compared with the art: those where it is largest
_MARGINS = (0, FINE // 2, FINE)  # quarters of a pixel: soft edges make a box wider than what is in it
_LEAST = (TRAVEL[0] / FINE, math.log(LARGE[0] / SMALL[1]))  # pixels, and log of the growth, of any real clip
_WAYS = (("left", "right"), ("up", "down"), ("shrink", "grow"))

Box = tuple[int, int, int]  # left, top, size in quarters of a pixel, as in a clip


def clip_facts(videos: Tensor) -> list[dict[str, str]]:
    """What each clip shows, {"object", "colour", "motion"}; videos: uint8 [N, frames, 3, 32, 32].

    Object and motion are "none" where less than half of the frames shows anything. Raises EcoDiffError for videos of
    another form.
    """
    if videos.dtype != torch.uint8 or videos.dim() != 5 or videos.shape[2:] != (3, CLIP_SIZE, CLIP_SIZE):
        raise EcoDiffError(
            f"Clips are uint8 [N, frames, 3, {CLIP_SIZE}, {CLIP_SIZE}], not {videos.dtype} {list(videos.shape)}."
        )
    return [_facts_of(video) for video in videos.permute(0, 1, 3, 4, 2).numpy()]


def clip_verdicts(videos: Tensor, clips: Sequence[Clip]) -> dict[str, Tensor]:
    """Which facts of its caption each clip shows: bool [N] for ``object``, ``colour``, ``motion``, and ``all`` three.

    Raises EcoDiffError for videos of another form than ``clip_facts`` reads, and for another number of clips.
    """
    if len(videos) != len(clips):
        raise EcoDiffError(f"{len(videos)} videos but {len(clips)} clips: give one a video.")
    seen, shown = clip_facts(videos), {}
    for fact in FACTS:
        right = [facts[fact] == getattr(clip, fact) for facts, clip in zip(seen, clips, strict=True)]
        shown[fact] = torch.tensor(right, dtype=torch.bool)
    return {**shown, "all": torch.stack(list(shown.values())).all(0)}


def _facts_of(frames: np.ndarray) -> dict[str, str]:
    """What one clip, uint8 [frames, 32, 32, 3], shows."""
    rim = np.ones(frames.shape[1:3], dtype=bool)
    rim[_BORDER:-_BORDER, _BORDER:-_BORDER] = False
    background = np.median(frames[:, rim].reshape(-1, 3), axis=0)
    distance = {name: np.square(background - tone).sum() for name, tone in COLOURS.items()}
    colour = min(distance, key=lambda name: distance[name])
    boxes = [_box(frame, background) for frame in frames]
    if sum(box is not None for box in boxes) * 2 < len(frames):
        return {"object": "none", "colour": colour, "motion": "none"}
    return {"object": _object(frames, background, boxes), "colour": colour, "motion": _motion(boxes)}


def _box(frame: np.ndarray, background: np.ndarray) -> Box | None:
    """The square around the largest connected part of a frame that is no background; None where there is none."""
    other = np.abs(frame - background).max(-1) > _DIFFERENT
    parts, _ = ndimage.label(other, structure=np.ones((3, 3)))
    sizes = np.bincount(parts.ravel())[1:]
    if not len(sizes) or sizes.max() < _FEWEST:
        return None
    ys, xs = np.nonzero(parts == 1 + sizes.argmax())
    left, right, top, bottom = xs.min(), xs.max() + 1, ys.min(), ys.max() + 1
    size = max(right - left, bottom - top)
    across, down = (left + right - size) * FINE // 2, (top + bottom - size) * FINE // 2
    return int(across), int(down), int(size * FINE)


def _motion(boxes: Sequence[Box | None]) -> str:
    """The direction in which centre or size changes most, each against the least change that real clips have."""
    times, changes = [], []
    for time, box in enumerate(boxes):
        if box is not None:
            left, top, size = box
            times.append(time / (len(boxes) - 1))
            changes.append(((left + size / 2) / FINE, (top + size / 2) / FINE, math.log(size)))
    slopes = np.polyfit(times, np.array(changes), 1)[0]  # over the whole clip: a line through all frames
    shares = slopes / np.array([_LEAST[0], _LEAST[0], _LEAST[1]])
    most = int(np.abs(shares).argmax())
    if abs(shares[most]) < 0.5:
        return "none"
    return _WAYS[most][int(shares[most] > 0)]


def _object(frames: np.ndarray, background: np.ndarray, boxes: Sequence[Box | None]) -> str:
    """The object whose art, drawn into the boxes, differs least from the frames (mean square over pixels)."""
    places = [place for place, box in enumerate(boxes) if box is not None]
    places.sort(key=lambda place: boxes[place][2], reverse=True)
    tone = tuple(int(value) for value in background)
    errors = {}
    for name in CLIP_OBJECTS:
        total = 0.0
        for place in places[:_COMPARED]:
            left, top, size = boxes[place]
            fits = []
            for margin in _MARGINS:
                box = (left + margin, top + margin, size - 2 * margin)
                art = render_frame(name, tone, box).astype(float)
                fits.append(np.square(art - frames[place]).mean())
            total += min(fits)
        errors[name] = total
    return min(errors, key=lambda name: errors[name])
