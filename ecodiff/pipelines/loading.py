"""Loading a pipeline by the name of an embedded one, from a folder or from the Hub."""

from __future__ import annotations

import errno
import json
import os
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ecodiff.errors import EcoDiffError
from ecodiff.storage.paths import checked_path, data_dir, embedded, is_hub_id
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

    for argument in ("dtype", "torch_dtype"):
        if argument in from_pretrained_kwargs:
            from_pretrained_kwargs[argument] = dtype_of(from_pretrained_kwargs[argument])
    checked_path(id_or_path, "load")
    name = os.fspath(id_or_path)
    source = _source(name)
    if isinstance(source, Path):
        finish_interrupted(source)
        for file in sorted(source.glob("*/*config.json")):
            check_counts(_parsed(file), str(file))
    try:
        with _nothing_random():
            pipe = DiffusionPipeline.from_pretrained(source, **from_pretrained_kwargs)
    except EcoDiffError as error:
        raise EcoDiffError(f"{name}: {error}") from error
    except Exception as error:  # what the libraries raise for damaged files is of many classes
        raise EcoDiffError(f"{name}: {_reason(error, name, isinstance(source, str))}"[:1000]) from error
    for component, part in pipe.components.items():
        if isinstance(part, nn.Module):
            # What an index of shards names but no file holds is none of diffusers' missing weights.
            tensors = (*part.named_parameters(), *part.named_buffers())
            left = [weight for weight, tensor in tensors if tensor.is_meta]
            if left and from_pretrained_kwargs.get("device_map") is None:
                raise EcoDiffError(f"{name}: {_lacking(component, left)}")
            check_dtypes(os.path.join(source, component), part)
            align(part)
    if offload:
        from accelerate import PartialState  # here, since its import is slow, and warns in notebooks

        device = PartialState().device
        if device.type != "cpu":
            pipe.enable_model_cpu_offload(device=device)
    return pipe


_LOADING = threading.RLock()


@contextmanager
def _nothing_random() -> Iterator[None]:
    """While this is open, a model whose files lack weights is an EcoDiffError.

    Libraries give such weights random values and log a warning. They say which these are if they are asked, but a
    pipeline does not ask for its components.
    """
    from diffusers import ModelMixin
    from transformers import PreTrainedModel

    def strict(from_pretrained):
        def from_files(cls, *args, output_loading_info=False, **kwargs):
            model, info = from_pretrained(cls, *args, output_loading_info=True, **kwargs)
            missing = sorted(info.get("missing_keys", ()))
            if missing and getattr(model, "hf_quantizer", None) is None and not output_loading_info:
                raise EcoDiffError(_lacking(type(model).__name__, missing))
            return (model, info) if output_loading_info else model

        return classmethod(from_files)

    with _LOADING:
        before = {cls: vars(cls)["from_pretrained"] for cls in (ModelMixin, PreTrainedModel)}
        try:
            for cls, method in before.items():
                cls.from_pretrained = strict(method.__func__)
            yield
        finally:
            for cls, method in before.items():
                cls.from_pretrained = method


def _lacking(what: str, missing: list[str]) -> str:
    return (
        f"the files of {what} lack {len(missing)} of its tensors, such as {missing[0]!r}, which would be random; save "
        "it again, or fetch the folder anew."
    )


def check_dtypes(folder: str | os.PathLike, model: nn.Module) -> None:
    """Raise EcoDiffError where a weight file in the folder says that a weight of the model is whole numbers.

    Libraries convert those to fractions without a word. A folder that is not there has no such file.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        return
    fractions = {name for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    for file in sorted(Path(folder).glob("*.safetensors")):
        try:
            with safe_open(file, "pt") as opened:
                dtypes = {name: opened.get_slice(name).get_dtype() for name in opened.keys()}
        except (OSError, SafetensorError):  # a variant that nobody has loaded
            continue
        for name, dtype in dtypes.items():
            if name in fractions and re.match("[IU]|BOOL", dtype):
                raise EcoDiffError(f"{file}: {name} is of dtype {dtype}, as no weight is; fetch the file anew.")


_COUNTS = re.compile("layers|blocks|depth|timesteps")
MOST = 100_000
"""More layers, blocks or training steps than any model has."""


def check_counts(config: Any, where: str) -> None:
    """Raise EcoDiffError for a config that asks for so many layers or steps that making them would not end."""
    entries = [("", config)]
    while entries:
        name, value = entries.pop()
        if isinstance(value, Mapping):
            entries += [(str(key), each) for key, each in value.items()]
        elif isinstance(value, (list, tuple)):
            entries += [(name, each) for each in value]
        elif isinstance(value, (int, float)) and value > MOST and _COUNTS.search(name):
            raise EcoDiffError(f"{where}: {name} is {value}, more than any model has; was the file changed?")


def _parsed(file: Path) -> Any:
    """What a JSON file holds; None where it cannot be read, which its reader says in its own words."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def _source(name: str) -> Path | str:
    """The folder that a name stands for, or the Hub id that it is; EcoDiffError where it is neither."""
    models = data_dir() / "models"
    is_plain_name = name not in ("", ".", "..") and not {"/", os.sep} & set(name)
    # os.path, since a Path raises where nobody may look.
    if is_plain_name and os.path.isfile(models / name / "model_index.json"):
        return models / name
    if name and os.path.isdir(name):
        if not os.path.isfile(os.path.join(name, "model_index.json")):
            raise EcoDiffError(
                f"{name}: this folder has no model_index.json; save a pipeline there with save_pretrained."
            )
        return Path(name)
    if is_hub_id(name):
        return name
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
    said = " ".join(str(error).split()) or type(error).__name__
    return f"the pipeline could not be loaded: {said}"


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
