"""Where data files lie: the repository's ``data/`` folder, or the folder that ECODIFF_DATA names."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path

from ecodiff.errors import EcoDiffError


def root() -> Path:
    """The repository's root (of an editable installation)."""
    return Path(__file__).resolve().parents[2]


def data_dir() -> Path:
    """The data folder: ECODIFF_DATA if set, else ``data/`` of the repository."""
    return Path(os.environ.get("ECODIFF_DATA") or root() / "data")


def write_whole(path: Path, content: bytes) -> None:
    """Write under a temporary name, then rename: a reader sees the old file or the new one, never half of one.

    The content is on disk before the name leads to it. Where `path` is a link, the file that it leads to is written;
    a file that is replaced leaves its permissions to the new one. Raises OSError as the system does; nothing is left of
    the attempt then.
    """
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        temporary.write_bytes(content)
        if path.is_file():
            shutil.copymode(path, temporary)
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        if path.parent.is_dir():
            temporary.unlink(missing_ok=True)


def sync(path: str | os.PathLike) -> None:
    """Have a file, or the names in a folder, on disk when this returns. Raises OSError, for a file only."""
    is_folder = os.path.isdir(path)
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError:
        if not is_folder:  # some file systems know no such thing for folders
            raise


def data_file(name: str) -> Path:
    """Path of a data file by its name inside the data folder; raises EcoDiffError where it is absent."""
    for path in (data_dir() / name, Path(__file__).resolve().parents[1] / "_data" / name):
        if path.exists():
            return path
    raise EcoDiffError(f"{name} is not in {data_dir()}: clone the repository, or set ECODIFF_DATA to its data folder.")
