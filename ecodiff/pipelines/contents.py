"""What images depend on, described by value: the description is what stored images are filed under.

Plain values, tensors, images and the objects of the libraries below are described by their class and their contents,
never by an address, a shortened text or the order of a set. Code that is no library's (a function of one's own, a hook,
a patched method) has no description by value, for it may change without a trace. ``Undescribed`` says what it is, and
then nothing is stored.
"""

from __future__ import annotations

import dis
import functools
import hashlib
import importlib
import inspect
import json
import math
import sys
import types
from collections.abc import Iterator, Mapping
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from pathlib import PurePath

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ecodiff.errors import EcoDiffError
from ecodiff.storage.fingerprint import canonical, key, raw_bytes, tensor_hash

from .parts import plain_name

# Their code is named by its place and the library's version. All other code is unknown here.
_VERSIONED = ("torch", "diffusers", "transformers", "tokenizers", "peft", "accelerate", "numpy", "pillow", "ecodiff")
_LIBRARIES = {*_VERSIONED, "PIL", "huggingface_hub", "safetensors", *sys.stdlib_module_names} - {"unittest"}
# Hooks of these only fetch weights or collect outputs. Ecodiff's own change what a network computes.
_HARMLESS_HOOKS = ("transformers.", "accelerate.")
# Attributes that no image depends on: places, progress, what is recomputed and how, and marks of being loaded.
_IGNORED = {
    "name_or_path", "_name_or_path", "init_kwargs", "_processor_class", "warnings_issued", "training",
    "_is_hf_initialized", "_weight_conversions", "_use_kernels", "_output_capturing_hooks_installed",
    "_hf_peft_config_loaded",
    "gradient_checkpointing", "_gradient_checkpointing_func", "_compiled_call_impl",
    "_progress_bar_config", "_all_hooks", "_offload_device", "_offload_gpu_id", "hf_device_map", "save_pretrained",
}  # fmt: skip
_OF_EVERY_MODULE = set(vars(nn.Module()))


class Undescribed(EcoDiffError):
    """Something has no description by value; the text says where and what."""


def versions() -> dict[str, str]:
    """The libraries that images depend on, with their versions."""
    found = {}
    for library in _VERSIONED:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            pass
    return found


def of_pipeline(pipe) -> dict:
    """All of a pipeline that its images depend on, as plain values.

    That is its class, its configuration and attributes; of each component the class, configuration, weights, buffers
    and the attributes of all modules (adapters and their scales, FreeU, attention processors); the scheduler's
    settings; the tokenizers' contents; the versions of the libraries. What a call sets by itself is left out. Raises
    ``Undescribed`` for hooks, patches and code of one's own.
    """
    name = type(pipe).__name__
    if nn.modules.module._global_forward_hooks or nn.modules.module._global_forward_pre_hooks:
        raise Undescribed("torch has hooks on all modules")
    config = {k: v for k, v in _public(pipe.config).items() if k not in pipe.components}
    described = {
        "class": _class(type(pipe), f"{name}, the pipeline's class,", except_for="__call__"),
        "device": pipe.device.type,
        "versions": versions(),
        "config": describe(config, "the pipeline's config"),
    }
    # What a call sets for itself: it assigns it, or shows it under a name without the underscore.
    changing = _assigned_by(type(pipe).__call__)
    changing |= {name for name in vars(pipe) if isinstance(getattr(type(pipe), name[1:], None), property)}
    left_out = {*pipe.components, *changing, *_IGNORED, "_internal_dict"}
    described["attributes"] = _attributes(pipe, "pipe", left_out, frozenset({id(pipe)}))
    described["components"] = {part: describe(value, part) for part, value in pipe.components.items()}
    return described


def describe(value, where: str = "the value", seen: frozenset = frozenset()):
    """A value as JSON can hold it, equal for equal values in every process; ``where`` names it in errors.

    Raises ``Undescribed`` for what can only be told by its address or its code.
    """
    if isinstance(value, Enum):  # first, since some are numbers or texts as well
        return {"class": _class(type(value), where), "name": value.name}
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):  # a subclass, such as numpy's text, becomes what it holds
        return int(value)
    if isinstance(value, str):
        return str(value)
    if isinstance(value, float) and math.isfinite(value):
        return float(value)
    if isinstance(value, (float, complex)):
        return {"number": repr(value)}  # complex, or one that JSON does not have: NaN, infinity
    if id(value) in seen:  # it lies inside itself, and would be described without end
        return {"again": type(value).__name__}
    inside = seen | {id(value)}
    if isinstance(value, Tensor):
        return _tensor(value, where)
    if isinstance(value, (np.ndarray, np.generic)):
        return _array(value, where)
    if isinstance(value, Image.Image):
        return _picture(value)
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": hashlib.sha256(value).hexdigest()}
    if isinstance(value, (torch.dtype, torch.device, PurePath)):
        return {type(value).__name__: str(value)}
    if isinstance(value, (list, tuple)):
        return [describe(part, f"{where}[{i}]", inside) for i, part in enumerate(value)]
    if isinstance(value, (set, frozenset)):
        return {"set": sorted((describe(part, where, inside) for part in value), key=canonical)}
    if isinstance(value, Mapping):
        pairs = [[describe(k, where, inside), describe(v, f"{where}[{k!r}]", inside)] for k, v in value.items()]
        return {"mapping": sorted(pairs, key=lambda pair: canonical(pair[0]))}
    if isinstance(value, type):
        return {"type": _class(value, where)}
    if isinstance(value, nn.Module):
        return _module(value, where)
    if callable(getattr(value, "get_vocab", None)):
        return _tokenizer(value, where)
    if callable(getattr(value, "set_timesteps", None)) and hasattr(value, "config"):
        return _scheduler(value, where)
    if isinstance(value, (functools.partial, types.FunctionType, types.MethodType, types.BuiltinFunctionType)):
        return _callable(value, where, inside)
    return _object(value, where, inside)


def _tensor(value: Tensor, where: str) -> dict:
    if value.is_meta or value.layout != torch.strided or type(value) not in (Tensor, nn.Parameter, nn.Buffer):
        raise Undescribed(f"{where} is a {type(value).__name__} whose values cannot be read here")
    return {"tensor": tensor_hash(value)}


def _array(value, where: str):
    if value.dtype == object:
        return describe(value.tolist(), where)
    value = np.ascontiguousarray(value)
    return {"array": [list(value.shape), str(value.dtype), hashlib.sha256(value.tobytes()).hexdigest()]}


def _picture(value: Image.Image) -> dict:
    pixels = hashlib.sha256(value.tobytes()).hexdigest()
    return {"picture": [value.mode, list(value.size), pixels, value.getpalette()]}


def _public(config) -> dict:
    """A configuration without what a save or a load adds.

    That is paths, versions, which values are defaults, and the dtype (that of the weights counts).
    """
    if hasattr(config, "to_dict"):
        config = config.to_dict()
    added = ("transformers_version", "architectures", "dtype", "torch_dtype")
    return {k: v for k, v in dict(config).items() if not str(k).startswith("_") and k not in added}


def _attributes(value, where: str, left_out: set, seen: frozenset) -> dict:
    found = {}
    for name, attribute in vars(value).items():
        if name in left_out or attribute is None:
            continue
        found[name] = describe(attribute, f"{where}.{name}", seen)
    return found


def _object(value, where: str, seen: frozenset) -> dict:
    described = {"class": _class(type(value), where)}
    if not hasattr(value, "__dict__"):
        raise Undescribed(f"{where} is a {type(value).__name__}, whose contents cannot be read")
    left_out = {*_IGNORED}
    if hasattr(value, "to_dict") and type(value).__module__.startswith("transformers."):  # their configurations
        return described | {"config": describe(_public(value), where, seen)}
    config = vars(value).get("_internal_dict")
    if isinstance(config, Mapping):
        described["config"] = describe(_public(config), f"{where}.config", seen)
        left_out.add("_internal_dict")
    return described | {"attributes": _attributes(value, where, left_out, seen)}


def _module(module: nn.Module, where: str) -> dict:
    """Weights and buffers, and the class and all attributes of every module inside."""
    for parameter in module.parameters():
        if type(parameter) is not nn.Parameter or parameter.is_meta:
            raise Undescribed(f"{where} has weights that cannot be read here (quantised, or kept elsewhere by a hook)")
    parts, classes = [], {}
    for name, part in module.named_modules():
        if type(part).__name__ == "OptimizedModule":  # torch.compile's, around the module itself
            continue
        place = f"{where}.{name}".rstrip(".")
        if type(part) not in classes:
            classes[type(part)] = _class(type(part), place)
        parts.append([plain_name(name), classes[type(part)], _state(part, place)])
    return {"weights": weights_hash(module), "modules": parts}


def _state(module: nn.Module, where: str) -> dict:
    """The attributes of a module itself, its configuration, and the buffers that a save leaves out."""
    described: dict = {}
    for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
        if not _home(hook).startswith(_HARMLESS_HOOKS):
            raise Undescribed(f"{where} has hooks")
    registry = vars(module).get("_diffusers_hook")
    for name in getattr(registry, "hooks", {}):
        if "group_offloading" not in name:
            raise Undescribed(f"{where} has the hook {name!r}")
    left_out = {*_OF_EVERY_MODULE, *_IGNORED, "_diffusers_hook"}
    offloading = vars(module).get("_hf_hook")
    if offloading is not None:  # it moves weights and calls what was there before
        before = vars(module).get("_old_forward")
        if not _home(type(offloading)).startswith("accelerate.") or not _is_own(module, before, "forward"):
            raise Undescribed(f"{where} has hooks")
        left_out |= {"_hf_hook", "_old_forward", "forward", "to", "cuda"}
    config = vars(module).get("_internal_dict")
    if isinstance(config, Mapping):
        described["config"] = describe(_public(config), f"{where}.config")
        left_out.add("_internal_dict")
    for name in sorted(module._non_persistent_buffers_set):
        described[f"buffer {name}"] = describe(module._buffers[name], f"{where}.{name}")
    return described | _attributes(module, where, left_out, frozenset({id(module)}))


def _tokenizer(value, where: str) -> dict:
    """What a tokenizer makes of a text; how the last call padded is left out."""
    described = {
        "class": _class(type(value), where),
        "vocabulary": key(value.get_vocab()),
        "most tokens": getattr(value, "model_max_length", None),
    }
    for name in ("padding_side", "truncation_side", "special_tokens_map", "chat_template", "split_special_tokens"):
        described[name] = describe(getattr(value, name, None), f"{where}.{name}")
    backend = getattr(value, "backend_tokenizer", None)
    if backend is not None:
        rules = json.loads(backend.to_str())
        described["rules"] = key({name: rules[name] for name in rules if name not in ("padding", "truncation")})
    return described


def _scheduler(value, where: str) -> dict:
    """Class, configuration, and what was set beside it; what a run sets by itself is left out."""
    changing: set[str] = set()
    for cls in type(value).__mro__:
        for name, method in vars(cls).items():
            if isinstance(method, types.FunctionType) and not _sets_up(name):
                changing |= _assigned_by(method)
    attributes = _attributes(value, where, {*changing, *_IGNORED, "_internal_dict"}, frozenset({id(value)}))
    for name in changing & vars(value).keys():  # a method put in the place of its own is a patch all the same
        if callable(vars(value)[name]):
            raise Undescribed(f"{where}.{name} was replaced")
    config = describe(_public(value.config), f"{where}.config")
    return {"class": _class(type(value), where), "config": config, "attributes": attributes}


def _sets_up(name: str) -> bool:
    """Whether a scheduler's method is no part of a run: it sets up, or (noise) only moves what it reads."""
    setter = name.startswith("set_") and name not in ("set_timesteps", "set_begin_index")
    return setter or name in ("__init__", "add_noise", "get_velocity", "scale_noise")


def _assigned_by(function) -> set[str]:
    """Names of the attributes that a function assigns, read in its code."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    if code is None:  # one that is built in
        return set()
    return {step.argval for step in dis.get_instructions(code) if step.opname == "STORE_ATTR"}


def _callable(value, where: str, seen: frozenset) -> dict:
    if isinstance(value, functools.partial):
        parts = [value.func, list(value.args), value.keywords]
        return {"partial": [describe(part, where, seen) for part in parts]}
    if isinstance(value, types.MethodType):
        if not _is_own(value.__self__, value, value.__func__.__name__):
            raise Undescribed(f"{where} is {value.__name__}, a function of one's own")
        return {"method": value.__func__.__name__, "of": describe(value.__self__, where, seen)}
    owner = getattr(value, "__self__", None)
    if isinstance(value, types.BuiltinFunctionType) and owner is not None and not isinstance(owner, types.ModuleType):
        return {"method": value.__name__, "of": describe(owner, where, seen)}
    home, name = _home(value), value.__qualname__
    if not _of_library(home) or _found(home, name) is not value:
        raise Undescribed(f"{where} is {value.__name__}, a function of one's own")
    return {"function": f"{home}.{name}"}


def _is_own(owner, method, name: str) -> bool:
    """Whether a bound method is the one that its object's class has."""
    function = inspect.getattr_static(type(owner), name, None)
    return getattr(method, "__func__", method) is function and getattr(method, "__self__", None) is owner


def _home(thing) -> str:
    """Name of the module whose code it is. A wrapper carries the name of what it wraps, but its globals do not."""
    if isinstance(thing, functools.partial):
        return _home(thing.func)
    if isinstance(thing, types.MethodType):
        thing = thing.__func__
    if isinstance(thing, types.FunctionType):
        return thing.__globals__.get("__name__") or ""
    if isinstance(thing, (type, types.BuiltinFunctionType)):
        return thing.__module__ or "builtins"
    return type(thing).__module__


def _of_library(module: str) -> bool:
    return module.partition(".")[0] in _LIBRARIES


def _found(module: str, name: str):
    """What an import of this name gives, None where there is nothing."""
    try:
        found = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError):
        return None
    return found


def _class(cls: type, where: str, except_for: str = "") -> str:
    """A library's class by its name, checked to be that class as the library made it."""
    if not _of_library(cls.__module__) or _found(cls.__module__, cls.__qualname__) is not cls:
        raise Undescribed(f"{where} is of a class of one's own ({cls.__qualname__})")
    for base in cls.__mro__:
        for method in _foreign(base):
            if method != except_for:
                raise Undescribed(f"{where} has a class with a patched method ({cls.__qualname__}.{method})")
    return f"{cls.__module__}.{cls.__qualname__}"


def _foreign(cls: type) -> Iterator[str]:
    """Names under which a library's class has functions that are no library's."""
    if not _of_library(cls.__module__):
        return
    for name, value in vars(cls).items():
        function = getattr(value, "__func__", None) or getattr(value, "fget", None) or value
        if not callable(function) or isinstance(function, type):
            continue
        code = getattr(function, "__code__", None)
        written = code is not None and code.co_filename == "<string>"  # by a dataclass or a named tuple for itself
        if not written and not _of_library(_home(function)):
            yield name


def weights_hash(module: nn.Module) -> str:
    """SHA-256 (64 hex digits) over names, shapes, dtypes and bytes of all parameters and saved buffers of a module.

    The same on every device and in every process; about a second a gigabyte. Raises EcoDiffError for weights that are
    not there (meta device).
    """
    total = hashlib.sha256()
    state = {plain_name(name): value for name, value in module.state_dict().items()}  # torch.compile's prefix
    dtype = next((value.dtype for value in module.parameters() if value.is_floating_point()), None)
    for name, part in module.named_modules():
        # Layers without units had tensors without entries when the first hashes were recorded.
        for leaf, shape in getattr(part, "empty_tensors", {}).items():
            state[plain_name(f"{name}.{leaf}")] = torch.empty(shape, dtype=dtype)
    for name, value in sorted(state.items()):
        if not isinstance(value, Tensor):  # a module's extra state may be anything
            continue
        if value.is_meta:
            raise EcoDiffError(
                f"{type(module).__name__}: {name} is on the meta device and has no values to hash: load its weights."
            )
        total.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        total.update(raw_bytes(value))
    return total.hexdigest()
