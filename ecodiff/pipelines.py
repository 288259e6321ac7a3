"""Loading a pipeline and finding its denoiser."""

from __future__ import annotations

import inspect
import os
from functools import lru_cache
from pathlib import Path

from torch import nn

from .errors import EcoDiffError
from .paths import data_dir
from .saving import finish_interrupted

_DENOISER_NAMES = ("unet", "transformer")


def load(id_or_path: str | os.PathLike, **from_pretrained_kwargs):
    """Load a diffusers pipeline: the name of an embedded one ("openmoji-sdxl"), a folder, or a Hub id.

    Keyword arguments go to `DiffusionPipeline.from_pretrained`. Raises EcoDiffError where nothing can be loaded.
    """
    from diffusers import DiffusionPipeline

    name = os.fspath(id_or_path)
    models = data_dir() / "models"
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


def embedded() -> list[str]:
    """Names of the embedded pipelines that are trained: folders of ``data/models``."""
    return sorted(path.parent.name for path in (data_dir() / "models").glob("*/model_index.json"))


def align(module: nn.Module) -> None:
    """Move weights on the CPU that lie at odd addresses to aligned memory, in place.

    Loaders leave tensors where they lie in a mapped file. CPU kernels are slower there and round differently, so that a
    pipeline that was saved and loaded would not draw the same bits as before.
    """
    module._apply(lambda t: t.clone() if t.device.type == "cpu" and t.data_ptr() % 64 else t)


def denoiser_name(pipe) -> str:
    """The name, unet or transformer, of the component that the sampling loop calls at every step."""
    for name in _DENOISER_NAMES:
        if isinstance(getattr(pipe, name, None), nn.Module):
            return name
    raise EcoDiffError(
        f"{type(pipe).__name__} has no denoiser: expected a component called {' or '.join(_DENOISER_NAMES)}."
    )


def denoiser(pipe) -> nn.Module:
    """The network that predicts noise, velocity or flow; the one that is pruned."""
    return getattr(pipe, denoiser_name(pipe))


def with_denoiser(pipe, network: nn.Module):
    """A pipeline of the same class with ``network`` as its denoiser; all other components are shared. Where ``pipe``
    offloads whole components, the new one does so, too."""
    parts = {**pipe.components, denoiser_name(pipe): network}
    arguments = list(inspect.signature(type(pipe).__init__).parameters)[1:]
    given = {key: parts.get(key, pipe.config.get(key)) for key in arguments if key in {*parts, *pipe.config}}
    result = type(pipe)(**given)
    result._progress_bar_config = dict(getattr(pipe, "_progress_bar_config", {}))
    if getattr(pipe, "_all_hooks", None):
        result.enable_model_cpu_offload(device=pipe._offload_device)
    return result


def sampling_loop(pipe):
    """The pipeline's own ``__call__`` without its ``torch.no_grad``: a function of the pipeline and its arguments."""
    return getattr(type(pipe).__call__, "__wrapped__", type(pipe).__call__)
