"""CLIP's two encoders as a judge, and the CLIP score (App. E.1)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from ecodiff.errors import EcoDiffError
from ecodiff.storage.paths import data_dir

from .inception import check_pictures

DEFAULT = "openmoji-clip"

_BATCH = 256


@dataclass
class Judge:
    """A ``CLIPModel`` of transformers and its ``CLIPProcessor``.

    ``texts``: features of captions that were seen before, {caption: [D]}; give ``{}`` to keep them, for a judge whose
    weights stay as they are.
    """

    model: nn.Module
    processor: Any
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
        source: str | Path = name
        for folder in (data_dir() / "models" / name, Path(name)):
            if (folder / "config.json").is_file():
                source = folder
                break
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
        """Unit vectors float [N, D] of images uint8 [N, 3, H, W]."""
        check_pictures(images)
        parts = []
        for batch in images.split(_BATCH):
            pixels = self.processor(images=list(batch), return_tensors="pt")["pixel_values"]
            parts.append(vectors(self.model.get_image_features(pixels.to(self.model.device))))
        return normalize(torch.cat(parts).float().cpu(), dim=-1)

    @torch.no_grad()
    def text_features(self, captions: Sequence[str]) -> Tensor:
        """Unit vectors float [N, D] of captions; those that are longer than what the model reads are cut."""
        if self.texts is None:
            return self._text_features(captions)
        new = list(dict.fromkeys(caption for caption in captions if caption not in self.texts))  # each once
        if new:
            self.texts.update(zip(new, self._text_features(new), strict=True))
        return torch.stack([self.texts[caption] for caption in captions])

    def _text_features(self, captions: Sequence[str]) -> Tensor:
        parts = []
        many = 4 * _BATCH  # a caption is less work than an image
        for first in range(0, len(captions), many):
            batch = list(captions[first : first + many])
            tokens = self.processor(text=batch, return_tensors="pt", padding=True, truncation=True)
            ids, attended = (tokens[key].to(self.model.device) for key in ("input_ids", "attention_mask"))
            parts.append(vectors(self.model.get_text_features(input_ids=ids, attention_mask=attended)))
        return normalize(torch.cat(parts).float().cpu(), dim=-1)


def vectors(features) -> Tensor:
    """The tensor [N, D] in what ``get_image_features`` or ``get_text_features`` gives."""
    if isinstance(features, Tensor):
        return features
    return features.pooler_output  # from transformers 5 on


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

    def network_and_processor():
        return _Features(judge.model), judge.processor

    # torchmetrics calls what is no name of a checkpoint; so it takes a judge that is loaded already.
    return CLIPScore(model_name_or_path=network_and_processor)


def clip_score(images: Tensor, captions: Sequence[str], model: str | os.PathLike | Judge = DEFAULT) -> float:
    """CLIP score, max(100 times the mean cosine of image and caption, 0), of images uint8 [N, 3, H, W].

    There is one caption for each image. The maximum is taken of the mean, as torchmetrics does, not image by image.
    Scores of different judges cannot be compared. Raises EcoDiffError for numbers that do not match.
    """
    check_same_number(images, captions, "captions")
    metric = clip_score_metric(model)
    metric.sync_on_compute = False  # all images are here, whatever other processes a launcher started
    # In batches, since the metric keeps only a sum, and a processor would resize all images at once.
    for first in range(0, len(images), _BATCH):
        metric.update(images[first : first + _BATCH], list(captions[first : first + _BATCH]))
    return metric.compute().item()


def check_same_number(images: Tensor, others: Sequence, what: str) -> None:
    """Raise EcoDiffError unless these are images as `check_pictures` wants them, and as many of the others."""
    check_pictures(images)
    if len(images) != len(others):
        raise EcoDiffError(f"{len(images)} images but {len(others)} {what}: give one per image.")
