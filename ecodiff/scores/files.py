"""Importance scores on disk, whichever method they are from."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping

from torch import Tensor, nn

from ecodiff.errors import EcoDiffError
from ecodiff.method.gates import FORMAT as GATES
from ecodiff.method.gates import Gates
from ecodiff.method.published import published
from ecodiff.method.sites import KINDS, check_units, find_sites
from ecodiff.storage.tensors import read_tensors, write_tensors

FORMAT = "ecodiff.scores.1"
PUBLISHED = "published:"  # and a name, in the place of a file


def save_scores(path: str | os.PathLike, scores: Mapping[str, Tensor], **about) -> None:
    """Write {site name: scores [units]} as safetensors with a checksum; ``about``: what JSON can hold, kept with them.

    Raises EcoDiffError where there is no score, or the file cannot be written; nothing is left of it then.
    """
    if not scores:
        raise EcoDiffError(f"{path}: there are no scores to save.")
    write_tensors(path, scores, {"format": FORMAT, "about": json.dumps(about)})


def load_scores(path: str | os.PathLike, denoiser: nn.Module) -> dict[str, Tensor]:
    """Scores of a file that `save_scores` or `Gates.save` wrote, checked against the denoiser: {site name: [units]}.

    "published:sdxl" in the place of a file is the λ that `ecodiff.published` gives by this name.

    Raises EcoDiffError for a missing, truncated or changed file, for scores of another model, and for a name by which
    nothing was published.
    """
    name = _published_name(path)
    if name is not None:
        found = published(name)
        try:
            return found.gates(denoiser).scores()
        except EcoDiffError as error:
            raise EcoDiffError(f"{path}: λ of another model: {error}") from error
    tensors, metadata = _read(path)
    if metadata["format"] == GATES:
        return Gates.load(path, denoiser).scores()
    try:
        check_units(tensors, find_sites(denoiser, KINDS), "scores")
    except EcoDiffError as error:
        raise EcoDiffError(f"{path}: scores of another model: {error}") from error
    return tensors


def about_scores(path: str | os.PathLike) -> dict:
    """How scores came about, as their file says: {"method": ..., and what was kept with them}.

    Raises EcoDiffError for what `load_scores` does not read either.
    """
    name = _published_name(path)
    if name is not None:
        return {"method": "learned by the authors of EcoDiff", "source": published(name).origin}
    _, metadata = _read(path)
    if metadata["format"] == GATES:
        return {"method": "learned", "updates": len(json.loads(metadata["history"]))}
    return json.loads(metadata["about"])


def _read(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file with gates or scores; raises EcoDiffError for any other."""
    tensors, metadata = read_tensors(path)
    if metadata.get("format") not in (GATES, FORMAT):
        raise EcoDiffError(f"{path}: holds neither gates nor scores.")
    return tensors, metadata


def _published_name(path: str | os.PathLike) -> str | None:
    """The name in "published:NAME"; None for a path."""
    text = os.fspath(path)
    return text.removeprefix(PUBLISHED) if text.startswith(PUBLISHED) else None
