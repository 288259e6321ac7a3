"""Results kept on disk under a hash of all they depend on, and the hashes themselves."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from .errors import EcoDiffError
from .paths import write_whole
from .pipelines import plain_name


def weights_hash(module: nn.Module) -> str:
    """SHA-256 (64 hex digits) over names, shapes, dtypes and bytes of all parameters and saved buffers of a module.

    The same on every device and in every process; about a second a gigabyte. Raises EcoDiffError for weights that are
    not there (meta device).
    """
    known = _known.get()
    if known is None:
        return _hash(module)
    if id(module) not in known:
        known[id(module)] = module, _hash(module)  # the module too, so that its id stays its own
    return known[id(module)][1]


_known: ContextVar[dict | None] = ContextVar("known", default=None)


@contextmanager
def hashed_once() -> Iterator[None]:
    """Inside, ``weights_hash`` reads each module once: for code that looks up many results and changes no weights."""
    token = _known.set({})
    try:
        yield
    finally:
        _known.reset(token)


def _hash(module: nn.Module) -> str:
    total = hashlib.sha256()
    state = {plain_name(name): value for name, value in module.state_dict().items()}
    for name, value in sorted(state.items()):
        if isinstance(value, Tensor):
            if value.is_meta:
                raise EcoDiffError(
                    f"{type(module).__name__}: {name} is on the meta device and has no values to hash: load its "
                    "weights."
                )
            total.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
            total.update(_bytes(value))
    return total.hexdigest()


def tensor_hash(value: Tensor) -> str:
    """SHA-256 over shape, dtype and bytes of a tensor, the same on every device."""
    about = f"{tuple(value.shape)} {value.dtype}\n".encode()
    return hashlib.sha256(about + bytes(_bytes(value))).hexdigest()


def canonical(value) -> str:
    """One text for equal settings: JSON with sorted keys; tensors and arrays enter by the hash of their contents.

    Raises EcoDiffError for what has no such text (a function, a NaN).
    """
    try:
        return json.dumps(
            value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False, default=_plain
        )
    except (TypeError, ValueError) as error:
        if isinstance(error, EcoDiffError):
            raise
        raise EcoDiffError(f"These settings have no unambiguous text form ({error}): use plain values.") from error


def key(value) -> str:
    """SHA-256 of ``canonical(value)``: what a result is filed under."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def cached(folder: str | os.PathLike | None, kind: str, request: Mapping, compute: Callable[[], Tensor]) -> Tensor:
    """``compute()``, or what it gave before for an equal ``request``: one safetensors file a request in ``folder``.

    With ``folder`` None it only computes. A file appears whole or not at all. Raises EcoDiffError for a file that is
    damaged or was changed, and where the folder cannot be written; nothing is left behind then.
    """
    if folder is None:
        return compute()
    name = key(request)
    path = Path(folder) / f"{kind}-{name[:20]}.safetensors"
    if path.exists():
        return _read(path, name)
    result = compute().detach().cpu().contiguous()
    metadata = {"request": name, "sha256": hashlib.sha256(_bytes(result)).hexdigest()}
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
    if metadata.get("request") != name or metadata.get("sha256") != hashlib.sha256(_bytes(result)).hexdigest():
        raise EcoDiffError(f"{path} is not what was written there: delete it, and it is computed again.")
    return result


def _bytes(value: Tensor) -> memoryview:
    return memoryview(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def _plain(value):
    if isinstance(value, np.ndarray) and value.dtype != object:
        value = torch.from_numpy(np.ascontiguousarray(value))
    if isinstance(value, Tensor):
        return {
            "shape": list(value.shape),
            "dtype": str(value.dtype),
            "sha256": hashlib.sha256(_bytes(value)).hexdigest(),
        }
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, torch.dtype):
        return str(value)
    raise EcoDiffError(
        f"A {type(value).__name__} among the settings has no text form to file a result under: use plain values."
    )
