"""Files written whole or not at all."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path


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
