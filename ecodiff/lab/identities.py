"""Identities of models by their id: stored beside the weights of each embedded model, hashed once for any other.

So whoever looks recorded results up needs no model. ``python -m ecodiff zoo check`` and the tests compare what is
stored with the weights.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

from ecodiff.errors import EcoDiffError
from ecodiff.pipelines.identity import Identity
from ecodiff.storage import records
from ecodiff.storage.files import write_whole
from ecodiff.storage.fingerprint import key
from ecodiff.storage.paths import data_dir

FILE = "identity.json"
JUDGE = "openmoji-clip"


def identity(model: str) -> Identity:
    """The identity of an embedded model, of a folder or of a Hub id.

    Raises EcoDiffError for an embedded model whose weights are not of the size that its identity names, and for a
    model that cannot be loaded where that is needed.
    """
    # A copy of a stored model may have been trained on: what lies in a folder elsewhere is not taken for its identity.
    folder = data_dir() / "models" / model
    if folder.parent == data_dir() / "models" and (folder / FILE).is_file():
        return Identity(**_stored(folder))
    return hashed(model, _files_of(model))


def judge_hash() -> str | None:
    """The hash of the embedded judge's weights; None where it is not trained."""
    folder = data_dir() / "models" / JUDGE
    if not (folder / FILE).is_file():
        return None
    return _stored(folder)["weights"]


def write(folder: Path, fields: dict) -> None:
    """Store the identity of a model in its folder: its ``fields``, and the sizes of its weights."""
    text = json.dumps({**fields, "bytes": _sizes(folder)}, indent=1, sort_keys=True)
    write_whole(folder / FILE, (text + "\n").encode())


def check(folder: Path, fields: dict) -> None:
    """Compare the stored identity with the ``fields`` of the weights; raises EcoDiffError where they differ."""
    stored = _stored(folder)
    for name, value in fields.items():
        # As JSON gives it back: a tuple is stored as a list, a number that is a key as text.
        if stored.get(name) != json.loads(json.dumps(value)):
            raise EcoDiffError(
                f"{folder / FILE} names another {name} than the model has: restore both with git checkout data."
            )


def _stored(folder: Path) -> dict:
    """The stored fields of an identity, if the weights beside it still have the sizes that it names."""
    path = folder / FILE
    if not path.is_file():
        raise EcoDiffError(f"{folder.name} has no {FILE} yet: run python -m ecodiff zoo evaluate {folder.name}.")
    stored = dict(_parsed(path, path.stat().st_mtime_ns))  # a copy, because the next line takes a field away
    if stored.pop("bytes") != _sizes(folder):
        raise EcoDiffError(
            f"The weights in {folder} are not those that its {FILE} describes: restore both with git checkout data, or "
            f"run `python -m ecodiff zoo evaluate {folder.name}` for weights of your own."
        )
    return stored


@lru_cache(maxsize=16)
def _parsed(path: Path, changed: int) -> dict:
    """What a file holds. ``changed`` is when it was written: for a newer file nothing is in the cache yet."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise EcoDiffError(f"{path} is damaged ({error}): restore it with git checkout data.") from error


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of each file of weights."""
    files = sorted(folder.rglob("*.safetensors"))
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def _files_of(model: str) -> tuple | None:
    """Files of a model outside the repository, with size and time; None where they are not known before loading."""
    folder = data_dir() / "models" / model
    if not folder.is_dir():
        folder = Path(model)
    if not folder.is_dir():
        try:
            from huggingface_hub import snapshot_download

            folder = Path(snapshot_download(model, local_files_only=True))
        except Exception:  # not here yet, or no id at all: loading says so
            return None
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".json", ".safetensors", ".bin", ".txt"))
    return tuple((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files)


@lru_cache(maxsize=16)
def hashed(model: str, files: tuple | None) -> Identity:
    """Hashed once, and remembered in ``data/.cache/identities`` by the paths, sizes and times of its files."""
    from ecodiff.pipelines.loading import load_once

    if files is None:
        return Identity.of(load_once(model))
    path = data_dir() / ".cache" / "identities" / f"{key(files)[:16]}.json"
    if path.is_file():
        return Identity.read(path)
    made = Identity.of(load_once(model))
    if records.enabled():
        path.parent.mkdir(parents=True, exist_ok=True)
        made.write(path)
    return made
