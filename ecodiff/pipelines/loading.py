"""Loading a pipeline by the name of an embedded one, from a folder or from the Hub."""

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
    source = _source(name)
    if isinstance(source, Path):
        finish_interrupted(source)
    try:
        pipe = DiffusionPipeline.from_pretrained(source, **from_pretrained_kwargs)
    except EcoDiffError:
        raise  # it is a ValueError, too
    except (OSError, ValueError, RuntimeError) as error:
        raise EcoDiffError(f"{name}: the pipeline could not be loaded: {error}") from error
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            align(part)
    return pipe


def _source(name: str) -> Path | str:
    """The folder that a name stands for, or the Hub id that it is; EcoDiffError where it is neither."""
    models = data_dir() / "models"
    is_plain_name = name not in ("", ".", "..") and not {"/", os.sep} & set(name)
    if is_plain_name and (models / name / "model_index.json").is_file():
        return models / name
    if name and Path(name).is_dir():
        if not (Path(name) / "model_index.json").is_file():
            raise EcoDiffError(
                f"{name}: this folder has no model_index.json; save a pipeline there with save_pretrained."
            )
        return Path(name)
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return name  # owner/name on the Hub
    raise EcoDiffError(
        f"{name!r} is no embedded pipeline ({', '.join(embedded()) or 'none is built yet'}), "
        "no folder and no Hub id (owner/name)."
    )


@lru_cache(maxsize=4)
def load_once(id_or_path: str):
    """The same pipeline again for the same name, by `load`: for readers of many cells, who leave it as it is."""
    return load(id_or_path)


def align(module: nn.Module) -> None:
    """Move weights on the CPU that lie at odd addresses to aligned memory, in place.

    Loaders leave tensors where they lie in a mapped file. CPU kernels are slower there and round differently, so that a
    pipeline that was saved and loaded would not generate the same bits as before.
    """

    def aligned(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device.type == "cpu" and tensor.data_ptr() % 64:  # new memory begins at such an address
            return tensor.clone()
        return tensor

    module._apply(aligned)


def _dtype(given):
    """A torch.dtype for its name; what diffusers takes beside (None, "auto", one a component) stays as it is."""
    if isinstance(given, Mapping):
        return {name: _dtype(each) for name, each in given.items()}
    if given is None or given == "auto" or isinstance(given, torch.dtype):
        return given
    if isinstance(given, str) and given.removeprefix("torch.") in DTYPES:
        return DTYPES[given.removeprefix("torch.")]
    raise EcoDiffError(f"load: dtype is one of {', '.join(DTYPES)} (or a torch.dtype), not {given!r}.")
