"""Loading a pipeline by the name of an embedded one, from a folder or from the Hub."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path

import torch
from accelerate import PartialState
from torch import nn

from ecodiff.errors import EcoDiffError
from ecodiff.storage.paths import data_dir, embedded
from ecodiff.storage.saving import finish_interrupted

DTYPES = {
    "bf16": torch.bfloat16, "bfloat16": torch.bfloat16, "fp16": torch.float16, "float16": torch.float16,
    "fp32": torch.float32, "float32": torch.float32,
}  # fmt: skip


def load(id_or_path: str | os.PathLike, *, offload: bool = False, **from_pretrained_kwargs):
    """Load a diffusers pipeline: the name of an embedded one ("openmoji-sdxl"), a folder, or a Hub id.

    Keyword arguments go to `DiffusionPipeline.from_pretrained`; ``dtype`` may be a name, such as "bfloat16" or "bf16".
    With ``offload`` its components are on the device one at a time (``enable_model_cpu_offload``); where the device is
    the CPU, this changes nothing.
    Raises EcoDiffError where nothing can be loaded, and for a dtype that is none. Of a Hub id it says whether access
    must be asked for, the repository is not there, the Hub was not reached, or the disk is full.
    """
    from diffusers import DiffusionPipeline
    from huggingface_hub.utils import httpx

    for argument in ("dtype", "torch_dtype"):
        if argument in from_pretrained_kwargs:
            from_pretrained_kwargs[argument] = dtype_of(from_pretrained_kwargs[argument])
    name = os.fspath(id_or_path)
    source = _source(name)
    if isinstance(source, Path):
        finish_interrupted(source)
    try:
        pipe = DiffusionPipeline.from_pretrained(source, **from_pretrained_kwargs)
    except EcoDiffError:
        raise  # it is a ValueError, too
    except (OSError, ValueError, RuntimeError, httpx.HTTPError) as error:
        raise EcoDiffError(f"{name}: {_reason(error, name, isinstance(source, str))}") from error
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            align(part)
    device = PartialState().device
    if offload and device.type != "cpu":
        pipe.enable_model_cpu_offload(device=device)
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


def _reason(error: BaseException, name: str, on_hub: bool) -> str:
    """Why a pipeline was not loaded, and what to do: libraries wrap the error that says it into others."""
    from huggingface_hub import errors
    from huggingface_hub.utils import httpx

    causes = list(_causes(error))

    def caused_by(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    if any(getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT) for cause in causes):
        return "the disk is full: make room, or let HF_HOME name a folder on a larger disk."
    if on_hub:
        if caused_by(errors.GatedRepoError):
            return (
                f"the model is gated: accept its licence at huggingface.co/{name}, then log in with `hf auth login` "
                "(or set HF_TOKEN)."
            )
        if caused_by(errors.RevisionNotFoundError):
            return "the repository has no such revision: give a branch, tag or commit that it has."
        if caused_by(errors.RepositoryNotFoundError):
            return "the Hub has no such repository, or a private one: check the id, or log in with `hf auth login`."
        if caused_by(errors.OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE is set, and the model is not in the cache: unset it, or give a folder."
        if caused_by(httpx.TransportError, ConnectionError, TimeoutError):
            return "the Hub was not reached, and the model is not in the cache: check the network, or give a folder."
        if caused_by(errors.RemoteEntryNotFoundError):
            return "the repository has no pipeline as diffusers saves it (a file is missing): take another id."
    return f"the pipeline could not be loaded: {error}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those that led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


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


def dtype_of(given):
    """A torch.dtype for its name; what diffusers takes beside (None, "auto", one a component) stays as it is."""
    if isinstance(given, Mapping):
        return {name: dtype_of(each) for name, each in given.items()}
    if given is None or given == "auto" or isinstance(given, torch.dtype):
        return given
    if isinstance(given, str) and given.removeprefix("torch.") in DTYPES:
        return DTYPES[given.removeprefix("torch.")]
    raise EcoDiffError(f"load: dtype is one of {', '.join(DTYPES)} (or a torch.dtype), not {given!r}.")
