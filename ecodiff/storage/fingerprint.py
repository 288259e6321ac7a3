"""Hashes of values: what results are filed under."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from ecodiff.errors import EcoDiffError

if TYPE_CHECKING:  # keys of plain values need no torch
    from torch import Tensor


def tensor_hash(value: Tensor) -> str:
    """SHA-256 over shape, dtype and bytes of a tensor, the same on every device."""
    # Two tensors of other shapes or dtypes may have the same bytes.
    about = f"{tuple(value.shape)} {value.dtype}\n".encode()
    return hashlib.sha256(about + bytes(raw_bytes(value))).hexdigest()


def canonical(value) -> str:
    """One text for equal settings: JSON with sorted keys; tensors and arrays enter by the hash of their contents.

    Raises EcoDiffError for what has no such text (a function, a NaN).
    """
    try:
        text = json.dumps(
            value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False, default=_plain
        )
        text.encode()  # half of a surrogate pair has no bytes
        return text
    except EcoDiffError:
        raise  # said by _plain; it is a ValueError, too
    except (TypeError, ValueError, RecursionError) as error:
        raise EcoDiffError(f"These settings have no unambiguous text form ({error}): use plain values.") from error


def key(value) -> str:
    """SHA-256 of ``canonical(value)``: what a result is filed under."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def raw_bytes(value: Tensor) -> memoryview:
    """The bytes of a tensor, in order."""
    import torch

    return memoryview(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def _plain(value):
    """What JSON cannot hold, as plain values. Recorded keys depend on each of these forms."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    import torch  # not at the top: keys of plain values need none, and it takes seconds

    if isinstance(value, np.ndarray) and value.dtype != object:
        value = torch.from_numpy(np.ascontiguousarray(value))
    if isinstance(value, torch.Tensor):
        return {
            "shape": list(value.shape),
            "dtype": str(value.dtype),
            "sha256": hashlib.sha256(raw_bytes(value)).hexdigest(),
        }
    if isinstance(value, torch.dtype):
        return str(value)
    raise EcoDiffError(
        f"A {type(value).__name__} among the settings has no text form to file a result under: use plain values."
    )
