"""How a pruned pipeline was made, in a file beside it: what the commands know and no weight or config says."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ecodiff.errors import EcoDiffError
from ecodiff.method.kept import packed
from ecodiff.method.surgery import mask_of
from ecodiff.storage.files import write_whole
from ecodiff.storage.paths import is_embedded, is_hub_id

FILE = "pruning.json"
FORMAT = "ecodiff.hub.1"


def write_made(folder: str | os.PathLike, pipe, **about) -> None:
    """Write ``about``, which JSON can hold, into the folder that a pruned pipeline was saved to.

    It names the units that the pipeline kept, so that it is not taken for what made another one that is saved there
    later; nothing is written of one that an earlier version pruned first, as its units are not known. Raises
    EcoDiffError where it cannot be written.
    """
    try:
        units = _digest(mask_of(pipe))
    except EcoDiffError:
        return
    content = {"format": FORMAT, "units": units, **about}
    try:
        write_whole(Path(folder) / FILE, (json.dumps(content, indent=1) + "\n").encode())
    except OSError as error:
        raise EcoDiffError(f"{folder}: {FILE} could not be written ({error}); the pipeline was saved.") from error


def read_made(folder: str | os.PathLike, mask: Mapping[str, Tensor]) -> dict:
    """What `write_made` wrote about a pipeline that kept these units; empty where it wrote nothing about it."""
    try:
        content = json.loads((Path(folder) / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        return {}
    if content.pop("units", None) != _digest(mask):
        return {}
    return content


def carry_made(source: str | os.PathLike, folder: str | os.PathLike, pipe, step: str) -> None:
    """Write into ``folder`` what is written about the pipeline in ``source``, and one more step.

    Nothing is written where nothing is known.

    pipe: the pipeline that was saved to ``folder``; it kept the same units.
    """
    try:
        made = read_made(source, mask_of(pipe))
    except EcoDiffError:  # not pruned
        return
    if made:
        made["then"] = [*made.get("then", []), step]
        write_made(folder, pipe, **made)


def public_name(model: str) -> str | None:
    """A model's Hub id or embedded name; None for a folder, whose name says nothing to others."""
    if is_embedded(model) or (is_hub_id(model) and not Path(model).exists()):
        return model
    return None


def _digest(mask: Mapping[str, Tensor]) -> str:
    return hashlib.sha256(json.dumps(packed(mask), sort_keys=True).encode()).hexdigest()[:16]
