"""Safetensors files with a checksum: gates and scores."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping

import torch
from torch import Tensor

from ecodiff.errors import EcoDiffError

from .files import write_whole
from .paths import checked_path


def write_tensors(path: str | os.PathLike, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors and metadata with a checksum of both; all or nothing. Raises EcoDiffError where writing fails."""
    from safetensors.torch import save

    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    signed = {**metadata, "sha256": _digest(plain, metadata)}
    path = checked_path(path, "saving")
    try:
        write_whole(path, save(plain, signed))
    except OSError as error:
        raise EcoDiffError(f"{path}: could not be saved ({error}); nothing was written.") from error


def read_tensors(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file of `write_tensors`, without the checksum, which is compared first.

    Raises EcoDiffError for a missing, truncated or changed file, and for one that `write_tensors` did not write.
    """
    from safetensors import SafetensorError, safe_open

    path = checked_path(path, "reading")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError, ValueError) as error:  # a path that is none, or too deep a header
        raise EcoDiffError(f"{path}: not a readable safetensors file ({error}); save it again.") from error
    if "sha256" not in metadata:
        raise EcoDiffError(
            f"{path}: not written by Gates.save or save_scores; for λ of another origin use Gates.from_tensors."
        )
    if metadata.pop("sha256") != _digest(tensors, metadata):
        raise EcoDiffError(f"{path}: the contents do not fit their checksum; the file was changed or damaged.")
    return tensors, metadata


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 over metadata and tensors, each in the order of their names."""
    digest = hashlib.sha256(json.dumps(dict(sorted(metadata.items()))).encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)}".encode())
        digest.update(tensors[name].contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
