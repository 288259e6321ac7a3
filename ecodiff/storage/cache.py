"""Results kept on disk under a hash of all they depend on, and the hashes themselves."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ecodiff.errors import EcoDiffError

from . import records
from .files import write_whole
from .fingerprint import key, raw_bytes
from .paths import checked_path, data_dir


def cached(folder: str | os.PathLike | None, kind: str, request: Mapping, compute: Callable[[], Tensor]) -> Tensor:
    """``compute()``, or what it gave before for an equal ``request``: one safetensors file a request in ``folder``.

    With ``folder`` None it only computes. A file appears whole or not at all. Raises EcoDiffError for a file that is
    damaged or was changed, and where the folder cannot be written; nothing is left behind then.
    """
    if folder is None:
        return compute()
    name = key(request)
    # 20 hex digits tell files apart; the whole key is in the file and is compared when it is read.
    path = checked_path(folder, "cache") / f"{kind}-{name[:20]}.safetensors"
    if os.path.exists(path):
        return _read(path, name)
    result = compute().detach().cpu().contiguous()
    metadata = {"request": name, "sha256": hashlib.sha256(raw_bytes(result)).hexdigest()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, save({"result": result}, metadata))
    except OSError as error:
        raise EcoDiffError(f"{path} could not be written ({error}): choose another cache folder, or none.") from error
    return result


def _read(path: Path, name: str) -> Tensor:
    try:
        with safe_open(path, "pt") as file:
            metadata, result = file.metadata() or {}, file.get_tensor("result")
    except (OSError, SafetensorError) as error:
        raise EcoDiffError(f"{path} is damaged ({error}): delete it, and it is computed again.") from error
    if metadata.get("request") != name or metadata.get("sha256") != hashlib.sha256(raw_bytes(result)).hexdigest():
        raise EcoDiffError(f"{path} is not what was written there: delete it, and it is computed again.")
    return result


def cache_folder(name: str, anew: bool = False) -> Path:
    """The folder where images and scores are kept outside git, so that cells share them.

    With ``anew``, ECODIFF_RECOMPUTE=1 or ECODIFF_RECORDS=off, it is a folder of this process, which goes when the
    process ends. So what is measured again is generated again, once.
    """
    if anew or records.recompute_asked() or not records.enabled():
        return Path(_own_folder().name) / name
    return data_dir() / ".cache" / name


# Kept by the cache, since a temporary folder goes with its last reference.
@lru_cache(maxsize=1)
def _own_folder() -> TemporaryDirectory:
    return TemporaryDirectory(prefix="ecodiff-")
