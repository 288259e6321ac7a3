"""The judge: a contrastive model (CLIP) that says how well pictures show what their captions state.

Three measures, all on the same two encoders: the CLIP score (Hessel et al. 2021), by torchmetrics' own class; the rank
of the right caption among others; and, fact by fact, whether a picture's right caption beats those that say only that
fact differently. The last asks what GenEval (Ghosh et al. 2023) asks of a detector: is each object there, are there as
many, do they stand in the right relation, is the colour right. Here the closed vocabulary of the scenes lets
captions ask it.

``openmoji-clip`` was trained on real scenes only, with another seed and shape than any text encoder of the pipelines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ecodiff.errors import EcoDiffError
from ecodiff.lab import openmoji
from ecodiff.metrics.clip import Judge, check_same_number


def caption_ranks(judge: Judge, images: Tensor, scenes: Sequence[openmoji.Scene], candidates: int = 100, seed: int = 0):
    """Rank (1 is best) of each picture's right caption among ``candidates``, the others drawn from the other scenes.

    images: uint8 [N, 3, H, W]; returns int64 [N]. Captions that are true of the scene as well are never drawn. Ties
    count against the picture. Raises EcoDiffError where there are fewer scenes than candidates.
    """
    check_same_number(images, scenes, "scenes")
    if not 2 <= candidates <= len(scenes):
        raise EcoDiffError(f"{candidates} captions to choose from need at least 2 and at most {len(scenes)} scenes.")
    similar = judge.image_features(images) @ judge.text_features([scene.caption for scene in scenes]).T
    keys = [Facts.of(scene).key for scene in scenes]
    generator = torch.Generator().manual_seed(seed)
    ranks = []
    for i, row in enumerate(similar):
        order = torch.randperm(len(scenes), generator=generator).tolist()
        others = [j for j in order if keys[j] != keys[i]][: candidates - 1]
        ranks.append(1 + int((row[others] >= row[i]).sum()))
    return torch.tensor(ranks)


@dataclass(frozen=True)
class Facts:
    """What a caption states. Two captions with the same ``key`` are true of the same pictures."""

    objects: tuple[str, ...]
    colour: str
    relation: str = ""

    @classmethod
    def of(cls, scene: openmoji.Scene) -> Facts:
        return cls(scene.objects, scene.colour, scene.relation)

    @property
    def key(self) -> tuple:
        """Objects in the order of their places, the axis they lie on, and the colour. "a and b" puts a on the left."""
        objects, axis = self.objects, ""
        if len(objects) == 2:
            axis = "across"
        if len(objects) == 2 and self.relation in ("above", "below"):
            axis = "down"
        if self.relation in ("right of", "below"):
            objects = objects[::-1]
        return (objects, axis, self.colour)

    def caption(self, wording: int = 0) -> str:
        return openmoji.caption(self.objects, self.colour, self.relation, wording)


def questions(scene: openmoji.Scene) -> dict[str, list[str]]:
    """For each fact that is asked of the whole picture the captions to choose among, the right one first.

    ``object 1`` … : any other object in its place (not for two objects, see ``seen_at``); ``number``: one of its
    objects left out, or one more; ``colour``: the other nine. All in one wording.
    """
    facts = Facts.of(scene)
    objects, colour, relation = facts.objects, facts.colour, facts.relation
    others = [name for name in openmoji.object_names() if name not in objects]
    right = facts.caption()
    answers = {}
    if len(objects) != 2:
        for k in range(len(objects)):
            swaps = [(*objects[:k], name, *objects[k + 1 :]) for name in others]
            answers[f"object {k + 1}"] = [right, *(Facts(names, colour, relation).caption() for names in swaps)]
    numbers = []  # as sets of objects: one fewer, one more
    if len(objects) > 1:
        numbers += [objects[:k] + objects[k + 1 :] for k in range(len(objects))]
    if len(objects) < 3:
        numbers += [(*objects, name) for name in others]
    answers["number"] = [right, *(Facts(names, colour).caption() for names in numbers)]
    colours = [other for other in openmoji.COLOURS if other != colour]
    answers["colour"] = [right, *(Facts(objects, other, relation).caption() for other in colours)]
    return answers


PLACES = {"left": (17, 32), "right": (47, 32), "top": (32, 17), "bottom": (32, 47)}  # centres of two objects
_REACH = 17  # half of the side of what is looked at there


def views(image: Tensor) -> Tensor:
    """What is at each of the four ``PLACES`` of a picture [3, 64, 64], enlarged to its size: uint8 [4, 3, 64, 64]."""
    boxes = [(x - _REACH, y - _REACH, 2 * _REACH) for x, y in PLACES.values()]
    return torch.stack([cut(image.float(), box, 0) for box in boxes]).round().clamp(0, 255).to(torch.uint8)


def cut(picture: Tensor, box: tuple[int, int, int], margin: int) -> Tensor:
    """The part of a picture [3, 64, 64] about a box (left, top, size), enlarged to the picture's size."""
    left, top, size = box
    limit = picture.shape[-1]
    x0, y0 = max(0, left - margin), max(0, top - margin)
    x1, y1 = min(limit, left + size + margin), min(limit, top + size + margin)
    return interpolate(picture[None, :, y0:y1, x0:x1], size=(limit, limit), mode="bilinear", align_corners=False)[0]


def seen_at(judge: Judge, images: Tensor, scenes: Sequence[openmoji.Scene]) -> list[dict[str, str]]:
    """The object that the judge names at each of the ``PLACES`` of each picture, {place: name}.

    It looks at ``views`` and chooses among one-object captions with the scene's background. Asked of a whole picture,
    a judge of this kind knows which objects are there better than which is where.
    """
    names = openmoji.object_names()
    features = judge.image_features(torch.cat([views(image) for image in images])).split(len(PLACES))
    texts: dict[str, Tensor] = {}
    named = []
    for seen, scene in zip(features, scenes, strict=True):
        if scene.colour not in texts:
            texts[scene.colour] = judge.text_features([Facts((name,), scene.colour).caption() for name in names])
        best = (seen @ texts[scene.colour].T).argmax(1).tolist()
        named.append({place: names[i] for place, i in zip(PLACES, best, strict=True)})
    return named


def verdicts(judge: Judge, images: Tensor, scenes: Sequence[openmoji.Scene]) -> dict[str, Tensor]:
    """Which facts of its scene each picture shows: bool tensors [N].

    ``objects``: every object is there; ``number``, ``relation``, ``colour``; ``all``: all of these. By ``questions``;
    with two objects, by ``seen_at``: an object is there if it is named at any place, and the relation is wrong if one
    is named only at another place than its own. A fact that a scene does not have (the relation of one object) counts
    as shown. Ties count against the picture. Pictures of another size are brought to that of the scenes first.
    """
    check_same_number(images, scenes, "scenes")
    if images.shape[-2:] != (openmoji.SIZE, openmoji.SIZE):  # ``PLACES`` are those of a scene
        images = interpolate(images.float(), size=(openmoji.SIZE, openmoji.SIZE), mode="area")
        images = images.round().clamp(0, 255).to(torch.uint8)
    answers = [questions(scene) for scene in scenes]
    every_caption: set[str] = set()
    for of_scene in answers:
        every_caption.update(*of_scene.values())
    captions = sorted(every_caption)  # each is encoded once: scenes share most of them
    row = {caption: i for i, caption in enumerate(captions)}
    texts, pictures = judge.text_features(captions), judge.image_features(images)
    shown = {name: torch.ones(len(scenes), dtype=torch.bool) for name in ("objects", "number", "relation", "colour")}
    for i, of_scene in enumerate(answers):
        for name, options in of_scene.items():
            scores = texts[[row[caption] for caption in options]] @ pictures[i]
            right = bool((scores[0] > scores[1:]).all())
            fact = "objects" if name.startswith("object") else name
            shown[fact][i] &= right
    pairs = [i for i, scene in enumerate(scenes) if len(scene.objects) == 2]
    if pairs:
        for i, named in zip(pairs, seen_at(judge, images[pairs], [scenes[i] for i in pairs]), strict=True):
            own = _places(scenes[i])
            shown["objects"][i] = all(name in named.values() for name in own)
            shown["relation"][i] = all(named[at] == name or name not in named.values() for name, at in own.items())
    return {**shown, "all": torch.stack(list(shown.values())).all(0)}


def _places(scene: openmoji.Scene) -> dict[str, str]:
    """Where each of two objects stands, {object: place}."""
    (first, second), axis, _ = Facts.of(scene).key
    if axis == "across":
        return {first: "left", second: "right"}
    return {first: "top", second: "bottom"}
