"""Where data files lie: the repository's ``data/`` folder, or the folder that ECODIFF_DATA names."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from contextlib import contextmanager
from pathlib import Path

from .errors import EcoDiffError


def root() -> Path:
    """The repository's root (of an editable installation)."""
    return Path(__file__).resolve().parent.parent


def data_dir() -> Path:
    """The data folder: ECODIFF_DATA if set, else ``data/`` of the repository."""
    return Path(os.environ.get("ECODIFF_DATA") or root() / "data")


def write_whole(path: Path, content: bytes) -> None:
    """Write under a temporary name, then rename: a reader sees the old file or the new one, never half of one.

    Raises OSError as the system does; nothing is left of the attempt then.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        if path.parent.is_dir():
            temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path):
    """A folder to write to, which becomes `path` when the context ends without an error.

    An earlier saved model at `path` is put aside and comes back if anything fails. Raises EcoDiffError then, and for a
    file or a folder that holds something else.
    """
    path = path.absolute()
    if path.is_file():
        raise EcoDiffError(f"{path}: is a file; give a folder to save to.")
    if path.is_dir() and any(path.iterdir()) and not any((path / name).exists() for name in _SAVED_MODEL):
        raise EcoDiffError(f"{path}: this folder holds something else than a saved model; give a new or empty one.")
    workshop = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        workshop = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        folder = workshop / path.name
        yield str(folder)
        if path.exists():
            path.rename(workshop / "earlier")
        folder.rename(path)
    except Exception as error:  # a full disk is an OSError, a SafetensorError or, from tokenizers, a bare Exception
        cause = error.__cause__ if isinstance(error, EcoDiffError) and error.__cause__ else error
        raise EcoDiffError(f"{path}: saving failed ({cause}); nothing was written.") from cause
    finally:
        if workshop is not None:
            if (workshop / "earlier").exists() and not path.exists():
                (workshop / "earlier").rename(path)
            shutil.rmtree(workshop, ignore_errors=True)


_SAVED_MODEL = ("model_index.json", "config.json")


def data_file(name: str) -> Path:
    """Path of a data file by its name inside the data folder; raises EcoDiffError where it is absent."""
    for path in (data_dir() / name, Path(__file__).resolve().parent / "_data" / name):
        if path.exists():
            return path
    raise EcoDiffError(f"{name} is not in {data_dir()}: clone the repository, or set ECODIFF_DATA to its data folder.")
