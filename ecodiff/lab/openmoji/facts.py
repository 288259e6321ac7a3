"""The judge: a contrastive model (CLIP) that says how well pictures show what their captions state.

Three measures, all on the same two encoders: the CLIP score (Hessel et al. 2021), by torchmetrics' own class; the rank
of the right caption among others; and, fact by fact, whether a picture's right caption beats those that say only that
fact differently. The last asks what GenEval (Ghosh et al. 2023) asks of a detector: is each object there, are there as
many, do they stand in the right relation, is the colour right. Here the closed vocabulary of the scenes lets
captions ask it.

``openmoji-clip`` was trained on real scenes only, with another seed and shape than any text encoder of the pipelines.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize

from ecodiff.errors import EcoDiffError
from ecodiff.lab import openmoji
from ecodiff.metrics.inception import check_pictures
from ecodiff.storage.paths import data_dir

DEFAULT = "openmoji-clip"
_BATCH = 256


@dataclass
class Judge:
    """A ``CLIPModel`` of transformers and its ``CLIPProcessor``.

    ``texts``: features of captions that were seen before, {caption: [D]}; give ``{}`` to keep them, for a judge whose
    weights stay as they are.
    """

    model: nn.Module
    processor: object
    texts: dict[str, Tensor] | None = None

    @property
    def components(self) -> dict[str, nn.Module]:
        return {"model": self.model}

    @classmethod
    def load(cls, id_or_path: str | os.PathLike = DEFAULT) -> Judge:
        """A judge by its embedded name, a folder in transformers' format, or a Hub id (owner/name).

        Raises EcoDiffError where nothing can be loaded.
        """
        from transformers import CLIPModel, CLIPProcessor

        name = os.fspath(id_or_path)
        folders = (data_dir() / "models" / name, Path(name))
        source = next((folder for folder in folders if (folder / "config.json").is_file()), name)
        if source == name and name.count("/") != 1:
            raise EcoDiffError(
                f"{name!r} is no judge here, no folder and no Hub id: run python -m ecodiff zoo train {DEFAULT}."
            )
        try:
            return cls(CLIPModel.from_pretrained(source).eval(), CLIPProcessor.from_pretrained(source))
        except (OSError, ValueError, RuntimeError) as error:
            raise EcoDiffError(f"{name}: the judge could not be loaded: {error}") from error

    def to(self, *arguments) -> Judge:
        self.model.to(*arguments)
        return self

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write model and processor, so that ``CLIPModel`` and ``CLIPProcessor`` load them."""
        self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)

    @torch.no_grad()
    def image_features(self, images: Tensor) -> Tensor:
        """Unit vectors float [N, D] of pictures uint8 [N, 3, H, W]."""
        check_pictures(images)
        parts = []
        for batch in images.split(_BATCH):
            pixels = self.processor(images=list(batch), return_tensors="pt")["pixel_values"]
            parts.append(vectors(self.model.get_image_features(pixels.to(self.model.device))))
        return normalize(torch.cat(parts).float().cpu(), dim=-1)

    @torch.no_grad()
    def text_features(self, captions: Sequence[str]) -> Tensor:
        """Unit vectors float [N, D] of captions; longer ones than the model reads are cut."""
        if self.texts is None:
            return self._text_features(captions)
        if new := list(dict.fromkeys(caption for caption in captions if caption not in self.texts)):
            self.texts.update(zip(new, self._text_features(new), strict=True))
        return torch.stack([self.texts[caption] for caption in captions])

    def _text_features(self, captions: Sequence[str]) -> Tensor:
        parts = []
        for first in range(0, len(captions), 4 * _BATCH):
            words = self.processor(
                text=list(captions[first : first + 4 * _BATCH]), return_tensors="pt", padding=True, truncation=True
            )
            words = {k: words[k].to(self.model.device) for k in ("input_ids", "attention_mask")}
            parts.append(vectors(self.model.get_text_features(**words)))
        return normalize(torch.cat(parts).float().cpu(), dim=-1)


def vectors(features) -> Tensor:
    """The tensor [N, D] in what ``get_image_features`` gives: itself, or from transformers 5 on a part of an output."""
    return features if isinstance(features, Tensor) else features.pooler_output


class _Features(nn.Module):
    """A CLIPModel as torchmetrics 1.9 calls it: features are plain tensors."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.config = model, model.config

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        return vectors(self.model.get_image_features(pixel_values))

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return vectors(self.model.get_text_features(input_ids, attention_mask))


def clip_score_metric(model: str | os.PathLike | Judge = DEFAULT):
    """torchmetrics' ``CLIPScore`` with this judge: an embedded name, a folder, or a Hub id.

    ``clip_score_metric("openai/clip-vit-base-patch16")`` is the paper's figure, where the Hub can be reached.
    """
    from torchmetrics.multimodal import CLIPScore

    judge = model if isinstance(model, Judge) else Judge.load(model)
    return CLIPScore(model_name_or_path=lambda: (_Features(judge.model), judge.processor))


def clip_score(images: Tensor, captions: Sequence[str], model: str | os.PathLike | Judge = DEFAULT) -> float:
    """CLIP score, max(100 times the mean cosine of picture and caption, 0), of pictures uint8 [N, 3, H, W].

    One caption a picture. The maximum is taken of the mean, as torchmetrics does, not picture by picture.
    Scores of different judges cannot be compared. Raises EcoDiffError for numbers that do not match.
    """
    _same_number(images, captions, "captions")
    metric = clip_score_metric(model)
    for first in range(0, len(images), _BATCH):
        metric.update(images[first : first + _BATCH], list(captions[first : first + _BATCH]))
    return metric.compute().item()


def caption_ranks(judge: Judge, images: Tensor, scenes: Sequence[openmoji.Scene], candidates: int = 100, seed: int = 0):
    """Rank (1 is best) of each picture's right caption among ``candidates``, the others drawn from the other scenes.

    images: uint8 [N, 3, H, W]; returns int64 [N]. Captions that are true of the scene as well are never drawn. Ties
    count against the picture. Raises EcoDiffError where there are fewer scenes than candidates.
    """
    _same_number(images, scenes, "scenes")
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
        backwards = self.relation in ("right of", "below")
        axis = "" if len(self.objects) != 2 else "down" if self.relation in ("above", "below") else "across"
        return (self.objects[::-1] if backwards else self.objects, axis, self.colour)

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
    found = {}
    for k in range(len(objects) if len(objects) != 2 else 0):
        swaps = ((*objects[:k], name, *objects[k + 1 :]) for name in others)
        found[f"object {k + 1}"] = [right, *(Facts(names, colour, relation).caption() for names in swaps)]
    fewer = [Facts(objects[:k] + objects[k + 1 :], colour).caption() for k in range(len(objects)) if len(objects) > 1]
    more = [Facts((*objects, name), colour).caption() for name in others] if len(objects) < 3 else []
    found["number"] = [right, *fewer, *more]
    found["colour"] = [
        right,
        *(Facts(objects, other, relation).caption() for other in openmoji.COLOURS if other != colour),
    ]
    return found


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
    texts = {
        colour: judge.text_features([Facts((name,), colour).caption() for name in names])
        for colour in {scene.colour for scene in scenes}
    }
    best = [(seen @ texts[scene.colour].T).argmax(1).tolist() for seen, scene in zip(features, scenes, strict=True)]
    return [dict(zip(PLACES, (names[i] for i in chosen), strict=True)) for chosen in best]


def verdicts(judge: Judge, images: Tensor, scenes: Sequence[openmoji.Scene]) -> dict[str, Tensor]:
    """Which facts of its scene each picture shows: bool tensors [N].

    ``objects``: every object is there; ``number``, ``relation``, ``colour``; ``all``: all of these. By ``questions``;
    with two objects, by ``seen_at``: an object is there if it is named at any place, and the relation is wrong if one
    is named only at another place than its own. A fact that a scene does not have (the relation of one object) counts
    as shown. Ties count against the picture. Pictures of another size are brought to that of the scenes first.
    """
    _same_number(images, scenes, "scenes")
    if images.shape[-2:] != (openmoji.SIZE, openmoji.SIZE):  # ``PLACES`` are those of a scene
        images = interpolate(images.float(), size=(openmoji.SIZE, openmoji.SIZE), mode="area")
        images = images.round().clamp(0, 255).to(torch.uint8)
    asked = [questions(scene) for scene in scenes]
    captions = sorted({caption for answers in asked for options in answers.values() for caption in options})
    place = {caption: i for i, caption in enumerate(captions)}
    texts, pictures = judge.text_features(captions), judge.image_features(images)
    shown = {name: torch.ones(len(scenes), dtype=torch.bool) for name in ("objects", "number", "relation", "colour")}
    for i, answers in enumerate(asked):
        for name, options in answers.items():
            scores = texts[[place[caption] for caption in options]] @ pictures[i]
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
    objects, axis, _ = Facts.of(scene).key
    return dict(zip(objects, ("left", "right") if axis == "across" else ("top", "bottom"), strict=True))


def _same_number(images: Tensor, others: Sequence, what: str) -> None:
    check_pictures(images)
    if len(images) != len(others):
        raise EcoDiffError(f"{len(images)} pictures but {len(others)} {what}: give one a picture.")
