"""Loading a pipeline and finding its denoiser."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import torch
from torch import nn

from ecodiff.errors import EcoDiffError
from ecodiff.storage.paths import data_dir, embedded
from ecodiff.storage.saving import finish_interrupted

DTYPES = {
    "bf16": torch.bfloat16, "bfloat16": torch.bfloat16, "fp16": torch.float16, "float16": torch.float16,
    "fp32": torch.float32, "float32": torch.float32,
}  # fmt: skip


def load(id_or_path: str | os.PathLike, **from_pretrained_kwargs):
    """Load a diffusers pipeline: the name of an embedded one ("openmoji-sdxl"), a folder, or a Hub id.

    Keyword arguments go to `DiffusionPipeline.from_pretrained`; ``dtype`` may be a name, such as "bfloat16" or "bf16".
    Raises EcoDiffError where nothing can be loaded, and for a dtype that is none.
    """
    from diffusers import DiffusionPipeline

    for argument in ("dtype", "torch_dtype"):
        if argument in from_pretrained_kwargs:
            from_pretrained_kwargs[argument] = _dtype(from_pretrained_kwargs[argument])
    name = os.fspath(id_or_path)
    models = data_dir() / "models"
    source: Path | str
    is_plain_name = name not in ("", ".", "..") and not {"/", os.sep} & set(name)
    if is_plain_name and (models / name / "model_index.json").is_file():
        source = models / name
    elif name and Path(name).is_dir():
        source = Path(name)
        if not (source / "model_index.json").is_file():
            raise EcoDiffError(
                f"{name}: this folder has no model_index.json; save a pipeline there with save_pretrained."
            )
    elif name.count("/") == 1 and not name.startswith((".", "/", "~")):
        source = name  # owner/name on the Hub
    else:
        raise EcoDiffError(
            f"{name!r} is no embedded pipeline ({', '.join(embedded()) or 'none is built yet'}), "
            "no folder and no Hub id (owner/name)."
        )
    if isinstance(source, Path):
        finish_interrupted(source)
    try:
        pipe = DiffusionPipeline.from_pretrained(source, **from_pretrained_kwargs)
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, EcoDiffError):
            raise
        raise EcoDiffError(f"{name}: the pipeline could not be loaded: {error}") from error
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            align(part)
    return pipe


@lru_cache(maxsize=4)
def load_once(id_or_path: str):
    """`load`, the same pipeline again for the same name: for readers of many cells, who leave it as it is."""
    return load(id_or_path)


def align(module: nn.Module) -> None:
    """Move weights on the CPU that lie at odd addresses to aligned memory, in place.

    Loaders leave tensors where they lie in a mapped file. CPU kernels are slower there and round differently, so that a
    pipeline that was saved and loaded would not draw the same bits as before.
    """
    module._apply(lambda t: t.clone() if t.device.type == "cpu" and t.data_ptr() % 64 else t)


def _dtype(given):
    """A torch.dtype for its name; what diffusers takes beside (None, "auto", one a component) stays as it is."""
    if isinstance(given, Mapping):
        return {name: _dtype(each) for name, each in given.items()}
    if given is None or given == "auto" or isinstance(given, torch.dtype):
        return given
    if isinstance(given, str) and given.removeprefix("torch.") in DTYPES:
        return DTYPES[given.removeprefix("torch.")]
    raise EcoDiffError(f"load: dtype is one of {', '.join(DTYPES)} (or a torch.dtype), not {given!r}.")
