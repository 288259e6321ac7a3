"""Where data files lie: the repository's ``data/`` folder, or the folder that ECODIFF_DATA names."""

from __future__ import annotations

import os
from pathlib import Path

from ecodiff.errors import EcoDiffError

_ROOT = Path(__file__).resolve().parents[2]


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


def embedded() -> list[str]:
    """Names of the embedded pipelines that are trained: folders of ``data/models``."""
    return sorted(path.parent.name for path in (data_dir() / "models").glob("*/model_index.json"))


def is_embedded(model: str) -> bool:
    """Whether this is the name of an embedded pipeline that is trained."""
    return not {"/", os.sep} & set(model) and (data_dir() / "models" / model / "model_index.json").is_file()
