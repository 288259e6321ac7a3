"""Files written whole or not at all, and files and folders that one process has for itself."""

from __future__ import annotations

import errno
import glob
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ecodiff.errors import EcoDiffError

# Files and folders themselves are locked, not a file beside them as filelock would: nothing may stay in a user's
# folder, and a lock must end with its process, so that one that was killed is known.
try:
    import fcntl
except ImportError:  # not on Windows, where nobody is kept from writing to one folder twice at once
    fcntl = None  # type: ignore[assignment]


SECONDS_TO_LOCK = 60
"""A temporary file without a lock that is younger than this may belong to a process that lives."""


def write_whole(path: Path, content: bytes, *, tidy: bool = True) -> None:
    """Write under a temporary name, then rename: a reader sees the old file or the new one, never half of one.

    The content is on disk before the name leads to it. Where `path` is a link, the file that it leads to is written;
    a file that is replaced leaves its permissions to the new one. Raises OSError as the system does; nothing is left of
    the attempt then.

    tidy: what killed processes left of their attempts at this file goes. The folder is listed for that, so that many
    files in one folder are better written without it, after one `tidy_up`.
    """
    path = Path(os.path.realpath(path))
    if tidy:
        tidy_up(path.parent, glob.escape(path.name))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        temporary.touch()
        with locked(temporary, wait=True):
            temporary.write_bytes(content)
            if path.is_file():
                shutil.copymode(path, temporary)
            sync(temporary)
            os.replace(temporary, path)
        sync(path.parent)
    finally:
        with suppress(OSError):  # there is nothing after a rename, or nothing could be made
            temporary.unlink()


def tidy_up(folder: Path, name: str = "*") -> None:
    """Remove what killed processes left of their attempts at a file of a folder (a pattern; all files)."""
    for left in glob.glob(f".{name}.*.tmp", root_dir=folder, include_hidden=True):
        _tidy(folder / left)


def _tidy(left: Path) -> None:
    """Remove a temporary file that no process is writing any more."""
    with suppress(OSError):  # another process has tidied it meanwhile
        if time.time() - left.stat().st_mtime < SECONDS_TO_LOCK:
            return  # its process may be about to lock it
        with locked(left, wait=False) as dead:
            if dead:
                left.unlink()


@contextmanager
def locked(path: str | os.PathLike, wait: bool) -> Iterator[bool | None]:
    """Whether this process has a file or folder for itself: True, or False where another one has it.

    None where that cannot be told: the file system has no locks, or the path cannot be opened. With `wait` until others
    are done. The system frees the lock when the process ends, however it ends.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        yield None
        return
    try:
        alone: bool | None = None
        try:
            if fcntl is not None:
                fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
                alone = True
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                alone = False
        yield alone
    finally:
        os.close(descriptor)


@contextmanager
def alone_in(folder: str | os.PathLike) -> Iterator[None]:
    """Keep a folder for this process; raises EcoDiffError where a run of another one is writing there.

    Where the file system has no locks, nobody is kept away.
    """
    with locked(folder, wait=False) as alone:
        if alone is False:
            raise EcoDiffError(f"{folder}: another run is writing there: wait until it ends, or give another folder.")
        yield


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
