"""Where data files lie: the repository's ``data/`` folder, or the folder that ECODIFF_DATA names."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ecodiff.errors import EcoDiffError

_ROOT = Path(__file__).resolve().parents[2]


def checked_path(path: Any, what: str) -> Path:
    """The path of a file or folder that a user named; EcoDiffError for what no file system has.

    ``what`` says in the error what the path was given for. Python has an error of another class for each of these.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise EcoDiffError(f"{what}: {path!r} is no path."[:300])
    try:
        content = os.fsencode(path)
    except UnicodeEncodeError:
        content = b"\0"
    if b"\0" in content:
        raise EcoDiffError(f"{what}: {os.fspath(path)!r} holds characters that no path can hold."[:300])
    if len(content) > 4095 or any(len(part) > 255 for part in content.split(os.fsencode(os.sep))):
        raise EcoDiffError(f"{what}: {os.fspath(path)[:100]!r}... is too long for a path.")
    return Path(path)


def root() -> Path:
    """The repository's root (of an editable installation)."""
    return _ROOT


def data_dir() -> Path:
    """The data folder: ECODIFF_DATA if set, else ``data/`` of the repository."""
    return Path(os.environ.get("ECODIFF_DATA") or root() / "data")


def data_file(name: str) -> Path:
    """Path of a data file by its name inside the data folder; raises EcoDiffError where it is absent."""
    path = data_dir() / name
    if path.exists():
        return path
    raise EcoDiffError(f"{name} is not in {data_dir()}: clone the repository, or set ECODIFF_DATA to its data folder.")


def is_hub_id(name: str) -> bool:
    """Whether a name has the form of a Hub id, owner/name."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


def embedded() -> list[str]:
    """Names of the embedded pipelines that are trained: folders of ``data/models``."""
    return sorted(path.parent.name for path in (data_dir() / "models").glob("*/model_index.json"))


def is_embedded(model: str) -> bool:
    """Whether this is the name of an embedded pipeline that is trained."""
    return not {"/", os.sep} & set(model) and (data_dir() / "models" / model / "model_index.json").is_file()
