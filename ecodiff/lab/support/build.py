"""Tiny random denoisers and pipelines of diffusers' own classes, from the configurations in ``tiny.yaml``.

``denoisers`` of that file: {class: {config, inputs}}.  ``parts``: {name: configuration} of everything else, where the
name is a class, or a class and a number.  ``pipelines``: {class: {parts: {component: name of a part}, call:
arguments}}. A class that has no entry is made from the entries of those that are most like it.

A value that stands for a tensor or an image is written as a text: "randn 1x16x4", "ones bool 1x12", "below 9 int64
2x3", "image 32x32"; small tensors as {values: [...], dtype: int64}.
"""

from __future__ import annotations

import copy
import inspect
import re
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
import yaml
from torch import Tensor, nn

from ecodiff.errors import EcoDiffError

from .texts import tokenizer

FILE = Path(__file__).with_name("tiny.yaml")
_TENSOR = re.compile(r"(randn|ones|zeros|complex|below (?P<below>\d+))(?: (?P<dtype>\w+))? (?P<size>\d+(?:x\d+)*)$")
# Sizes of text and image encoders that have no configuration in ``tiny.yaml``.
SMALL = {
    **dict.fromkeys(("hidden_size", "d_model", "embed_dim", "image_size"), 32),
    **dict.fromkeys(("intermediate_size", "d_ff"), 37),
    **dict.fromkeys(("num_layers", "num_hidden_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "num_heads", "num_key_value_heads"), 4),
    **dict.fromkeys(("d_kv", "head_dim", "patch_size"), 8),
    "vocab_size": 1103,
    "max_position_embeddings": 514,
}
IMAGE = "image 32x32"  # where a pipeline needs one and its entry has none
_IMAGE = re.compile(r"image (?P<width>\d+)x(?P<height>\d+)$")


@cache
def configurations() -> dict[str, dict]:
    """The content of ``tiny.yaml``."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the one in C is ten times as fast
    return yaml.load(FILE.read_text(encoding="utf-8"), Loader=loader)


def denoiser(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A tiny denoiser of a class, and the arguments of a call; raises EcoDiffError where no configuration is known."""
    entry = configurations()["denoisers"].get(name)
    if entry is None:
        return _in_a_pipeline(name)
    torch.manual_seed(0)
    network = trained(getattr(diffusers, name)(**entry["config"]))
    return network, value(entry["inputs"], torch.Generator().manual_seed(1))


def _in_a_pipeline(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """The denoiser of the first pipeline that has one of this class, and the arguments of its first call there."""
    for owner, entry in configurations()["pipelines"].items():
        for component, which in entry["parts"].items():
            if isinstance(which, str) and which.split(".")[0] == name:
                pipe, call = pipeline(owner)
                network = pipe.components[component]
                return network, _first_call(pipe, call, network)
    raise EcoDiffError("no tiny configuration of it in tiny.yaml")


class _Enough(Exception):
    """Ends a sampling loop."""


def _first_call(pipe, call: Mapping, network: nn.Module) -> dict[str, Any]:
    """The arguments with which the sampling loop calls the network first, by name."""
    calls: list[dict] = []

    def note(module, args, kwargs):
        calls.append(dict(inspect.signature(module.forward).bind(*args, **kwargs).arguments))
        raise _Enough

    handle = network.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with torch.no_grad():
            pipe(**call)
    except _Enough:
        pass
    finally:
        handle.remove()
    if not calls:
        raise EcoDiffError("the sampling loop of the pipeline that has it does not call it")
    return calls[0]


def pipeline(name: str) -> tuple[Any, dict[str, Any]]:
    """A tiny pipeline of a class, and the arguments of its call; raises EcoDiffError where no recipe is known."""
    entry = configurations()["pipelines"].get(name) or _derived(name)
    cls = getattr(diffusers, name)
    components = {component: part(which, cls.__module__) for component, which in entry["parts"].items()}
    pipe = cls(**components)
    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            trained(component)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to("cpu"), value(entry["call"], torch.Generator().manual_seed(1))


def _derived(name: str) -> dict[str, dict]:
    """An entry for a pipeline that has none: its components from the pipelines that are most like it.

    Raises EcoDiffError where no other pipeline has such a component.
    """
    cls = getattr(diffusers, name)
    entries = configurations()["pipelines"]
    components = dict(inspect.signature(cls.__init__).parameters)
    del components["self"]

    def fits(component: str, which: Any) -> bool:
        # The annotation is a class, a union of some, or a text.
        return isinstance(which, str) and which.split(".")[0] in str(components[component].annotation)

    def likeness(other: str) -> int:
        parts = entries[other]["parts"]
        return sum(component in components and fits(component, which) for component, which in parts.items())

    others = sorted(entries, key=likeness, reverse=True)
    parts: dict[str, Any] = {}
    for component, parameter in components.items():
        found = [entries[other]["parts"][component] for other in others if component in entries[other]["parts"]]
        fitting = [which for which in found if fits(component, which)]
        if fitting:
            parts[component] = fitting[0]
        elif parameter.default is inspect.Parameter.empty:
            optional = "None" in str(parameter.annotation) or component in getattr(cls, "_optional_components", [])
            if not optional and component not in ("safety_checker", "feature_extractor"):
                raise EcoDiffError(
                    f"no tiny configuration of it, and no other pipeline has a {component} of its class."
                )
            parts[component] = None
    taken = inspect.signature(cls.__call__).parameters
    call = {argument: given for argument, given in entries[others[0]]["call"].items() if argument in taken}
    for argument, parameter in taken.items():
        if "image" in argument and argument not in call and parameter.default is inspect.Parameter.empty:
            call[argument] = IMAGE
    return {"parts": parts, "call": call}


def part(which: Any, owner: str = "") -> Any:
    """A component by its name in ``parts``, or by its class; what is no name is the component itself (None, a flag).

    ``owner``: the module of the pipeline, which may know a class that diffusers itself does not name.
    """
    if isinstance(which, list):
        return [part(one, owner) for one in which]
    if not isinstance(which, str):
        return which
    class_name = which.split(".")[0]
    config = copy.deepcopy(configurations()["parts"].get(which, {}))
    torch.manual_seed(0)
    if class_name.endswith(("Tokenizer", "TokenizerFast")):
        return tokenizer(class_name)
    if hasattr(diffusers, class_name):
        return getattr(diffusers, class_name)(**config)
    cls = getattr(transformers, class_name, None) or getattr(sys.modules.get(owner), class_name, None)
    if cls is None:
        raise EcoDiffError(f"no tiny {class_name} can be made: neither diffusers nor transformers has this class.")
    if issubclass(cls, diffusers.ModelMixin):
        return cls(**config)
    if issubclass(cls, transformers.PreTrainedModel):
        return cls(cls.config_class(**config) if config else _small(cls.config_class())).eval()
    parts = {name: part(config.pop(name)) for name in list(config) if name in ("tokenizer", "image_processor")}
    return cls(**parts, **config)


def _small(config: Any) -> Any:
    """The default configuration of a model of transformers, with the sizes of `SMALL` where it has such."""
    for name, size in SMALL.items():
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, size)
    for name in ("text_config", "vision_config"):
        if hasattr(getattr(config, name, None), "to_dict"):
            _small(getattr(config, name))
    return config


def trained(network: nn.Module) -> nn.Module:
    """The network with random weights large enough that each unit matters, biases included.

    Fresh models have many zeros: gates of blocks that start closed, output layers, biases.
    """
    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        if parameter.ndim == 1:
            parameter.data.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        elif parameter.numel() and parameter.abs().max() == 0:
            parameter.data.normal_(0, 0.1, generator=generator)
    return network.eval()


def value(given: Any, generator: torch.Generator) -> Any:
    """What an entry of ``tiny.yaml`` stands for: a tensor, an image, or the same in lists and mappings."""
    if isinstance(given, str):
        return _from_text(given, generator)
    if isinstance(given, Mapping):
        if set(given) == {"values", "dtype"}:
            return torch.tensor(given["values"], dtype=getattr(torch, given["dtype"]))
        return {name: value(one, generator) for name, one in given.items()}
    if isinstance(given, list):
        if given and all(isinstance(one, int) for one in given):
            return tuple(given)  # a size
        return [value(one, generator) for one in given]
    return given


def _from_text(text: str, generator: torch.Generator) -> Any:
    image = _IMAGE.match(text)
    if image:
        from PIL import Image

        size = int(image["height"]), int(image["width"])
        pixels = torch.randint(0, 256, (*size, 3), generator=generator, dtype=torch.uint8)
        return Image.fromarray(pixels.numpy())
    tensor = _TENSOR.match(text)
    return _tensor(tensor, generator) if tensor else text


def _tensor(text: re.Match, generator: torch.Generator) -> Tensor:
    size = [int(side) for side in text["size"].split("x")]
    dtype = getattr(torch, text["dtype"] or "float32")
    if text["below"]:
        return torch.randint(0, int(text["below"]), size, generator=generator).to(dtype)
    kind = text[1]
    if kind == "randn":
        return torch.randn(size, generator=generator).to(dtype)
    if kind == "complex":
        return torch.polar(torch.ones(size), torch.randn(size, generator=generator))
    return torch.full(size, 1 if kind == "ones" else 0, dtype=dtype)
