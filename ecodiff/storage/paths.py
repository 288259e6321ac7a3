"""Where data files lie: the repository's ``data/`` folder, or the folder that ECODIFF_DATA names."""

from __future__ import annotations

import os
from pathlib import Path

from ecodiff.errors import EcoDiffError


def root() -> Path:
    """The repository's root (of an editable installation)."""
    return Path(__file__).resolve().parents[2]


def data_dir() -> Path:
    """The data folder: ECODIFF_DATA if set, else ``data/`` of the repository."""
    return Path(os.environ.get("ECODIFF_DATA") or root() / "data")


def data_file(name: str) -> Path:
    """Path of a data file by its name inside the data folder; raises EcoDiffError where it is absent."""
    for path in (data_dir() / name, Path(__file__).resolve().parents[1] / "_data" / name):
        if path.exists():
            return path
    raise EcoDiffError(f"{name} is not in {data_dir()}: clone the repository, or set ECODIFF_DATA to its data folder.")
