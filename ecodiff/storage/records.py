"""Recorded results: each measurement is one row, found again by the hash of its full configuration.

``data/results/<name>.jsonl`` holds one JSON object a line:

    key        hash of the configuration; what a row is found by
    config     everything the values depend on: weights' hash, method, ratio, prompts, steps, seed, ...
    values     what was measured
    seed       the configuration's seed, repeated
    versions   of Python and the libraries
    commit     with "+" where tracked files were changed
    machine    processor, cores, memory; nothing that names it
    seconds    what it took
    date       UTC
    added      in some rows: names of values that were measured later, at which commit and when
    checksum   SHA-256 over all the rest of the row; rows of earlier versions have none

``measure`` reads the row where the configuration is the same, and computes it otherwise. Environment variables:
ECODIFF_RECOMPUTE=1 ignores what is recorded (and replaces it); ECODIFF_RECORDS=off neither reads nor writes rows
(profile ``smoke``).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path

from filelock import FileLock

from ecodiff.errors import EcoDiffError

from .files import write_whole
from .fingerprint import canonical, key
from .paths import checked_path, data_dir
from .provenance import commit, machine, versions

_FIELDS = {"key", "config", "values", "seed", "versions", "commit", "machine", "seconds", "date"}


def measure(
    config: Mapping,
    function: Callable[[], Mapping],
    *,
    name: str,
    recompute: bool = False,
    folder: str | os.PathLike | None = None,
) -> dict:
    """The recorded row of a measurement, or a new one: ``function()`` runs only where there is none.

    Args:
        config: everything the values depend on, as plain values (tensors and arrays are filed by their hash). Put
            ``weights_hash`` of the model in, and a version number that you raise when the measurement itself changes.
        function: measures; returns a mapping of plain values, tensors or arrays. Called without arguments.
        name: of the file, ``data/results/<name>.jsonl``.
        recompute: measure anew and replace the recorded row.
        folder: another place for the file.

    Returns:
        The row (see the module's docstring), and ``"recorded"``: True if it was read, False if it was measured now.

    Raises:
        EcoDiffError: a name that is no file name, a configuration or values without a text form, a damaged file, or a
            row that could not be written; the error's ``row`` then holds it.
    """
    path = _path(name, folder)
    config = json.loads(canonical(dict(config)))
    filed = key(config)
    if enabled():
        recorded = find(config, name=name, folder=folder)  # even if it is to be replaced: damage shows before the work
        if recorded and not (recompute or recompute_asked()):
            return recorded | {"recorded": True}
    started = time.perf_counter()
    values = _values(function(), name)
    row = {
        "key": filed,
        "config": config,
        "values": values,
        "seed": config.get("seed"),
        "versions": versions(),
        "commit": commit(),
        "machine": machine(),
        "seconds": round(time.perf_counter() - started, 3),
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
    row["checksum"] = _checksum(row)
    if enabled():
        _write(path, row)
    return row | {"recorded": False}


def find(config: Mapping, *, name: str, folder: str | os.PathLike | None = None) -> dict | None:
    """The recorded row of a configuration, or None; what ``measure`` would read. None with ECODIFF_RECORDS=off."""
    # Through JSON, as `measure` files it: there a tuple is a list and a tensor its hash.
    filed = key(json.loads(canonical(dict(config))))
    if not enabled():
        return None
    for row in reversed(_read(_path(name, folder))):  # the newest, should a merge have brought two
        if row["key"] == filed:
            return row
    return None


def enabled() -> bool:
    """Whether results are kept and read: not with ECODIFF_RECORDS=off (or 0, no)."""
    return os.environ.get("ECODIFF_RECORDS", "").lower() not in ("off", "0", "no")


def recompute_asked() -> bool:
    """Whether everything is measured anew: with ECODIFF_RECOMPUTE=1 (anything but off, 0, no)."""
    return os.environ.get("ECODIFF_RECOMPUTE", "").lower() not in ("", "0", "off", "no")


def rows(name: str, folder: str | os.PathLike | None = None) -> list[dict]:
    """All recorded rows of a name, oldest first; an empty list where there are none."""
    return _read(_path(name, folder))


def table(name: str, folder: str | os.PathLike | None = None) -> list[dict]:
    """The rows flattened, configuration and values side by side: ready for ``pandas.DataFrame``."""
    flat = []
    for row in rows(name, folder):
        flat.append({**row["config"], **row["values"], "seconds": row["seconds"], "date": row["date"]})
    return flat


def _path(name: str, folder) -> Path:
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{,99}", name):
        raise EcoDiffError(
            f"{name!r} cannot name a file of results: use up to 100 letters, digits, '-', '_' and '.'."[:300]
        )
    return checked_path(folder or data_dir() / "results", name) / f"{name}.jsonl"


def _read(path: Path) -> list[dict]:
    if not os.path.exists(path):  # a Path raises where nobody may look
        return []
    try:
        with path.open("rb") as file:  # network file systems look anew where a file is opened, and not for stat
            state = os.fstat(file.fileno())
        return list(_parsed(path, state.st_ino, state.st_size, state.st_mtime_ns))
    except (OSError, UnicodeDecodeError) as error:
        raise EcoDiffError(f"{path} cannot be read ({error}): restore it, or delete it to measure again.") from error


@lru_cache(maxsize=8)
def _parsed(path: Path, number: int, size: int, changed: int) -> list[dict]:
    """The rows of a file; its number, size and time of change say which content was parsed."""
    # Pages look up hundreds of rows in the same file, so it is parsed once. A file is replaced whole when a row is
    # written (write_whole), so that another content has another number and time.
    parsed = []
    lines = path.read_text(encoding="utf-8").split("\n")  # splitlines also splits at separators that prompts may hold
    if not lines[-1]:
        lines.pop()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            whole = isinstance(row, dict) and row.keys() >= _FIELDS and row["key"] == key(row["config"])
            whole = whole and row.get("checksum") in (None, _checksum(row))
        except (ValueError, RecursionError):
            whole = False
        if not whole:
            raise EcoDiffError(
                f"{path}, line {number}, is no whole recorded row: restore the file, or delete that line to measure "
                "it again."
            )
        parsed.append(row)
    return parsed


def _write(path: Path, row: dict) -> None:
    """Add the row, in the place of one with the same key; the file is rewritten whole or not at all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.parent / ".lock"):  # another process may add rows to the same file meanwhile
            others = [old for old in _read(path) if old["key"] != row["key"]]
            lines = [json.dumps(each, ensure_ascii=False) + "\n" for each in [*others, row]]
            write_whole(path, "".join(lines).encode())
    except OSError as error:
        failed = EcoDiffError(
            f"{path} could not be written ({error}): set ECODIFF_RECORDS=off to measure without recording."
        )
        vars(failed)["row"] = row  # hours of measuring are not lost with a full disk
        raise failed from error


def _checksum(row: Mapping) -> str:
    """SHA-256 over all of a row but its checksum, the same before it is written and after it is read."""
    rest = {name: value for name, value in row.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()  # NaN and infinities have a form, too


def _values(values, name: str) -> dict:
    """Measured values as JSON can hold them. NaN and infinities stay (as Python's json writes them)."""
    if not isinstance(values, Mapping):
        raise EcoDiffError(f"{name}: a measurement returns a mapping of names to values, not {type(values).__name__}.")

    def plain(value):
        if hasattr(value, "tolist"):  # tensors, arrays, numpy's numbers
            return value.tolist()
        raise TypeError(f"{type(value).__name__} is no plain value")

    try:
        text = json.dumps(dict(values), default=plain, ensure_ascii=False)
        text.encode()  # half of a surrogate pair has no bytes
        return json.loads(text)
    except (TypeError, ValueError) as error:
        raise EcoDiffError(
            f"{name}: the measured values cannot be recorded ({error}): return numbers, texts and lists."
        ) from error
