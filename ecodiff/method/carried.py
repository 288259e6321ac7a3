"""What a model has beside its config and its weights, and how a copy of it gets the same.

A pruned denoiser is built anew from config and weights. But a denoiser in use has more: FreeU's factors, attention
processors, a patched `forward`, hooks, flags of gradient checkpointing, weights that are stored in another precision
or in another place. `carry_over` compares each module of the original with the fresh one: what differs is copied, and
what cannot be copied is named.

Copying has one trap. A patch often holds the module that it patches::

    original = block.forward
    block.forward = lambda *args: original(*args) * 0.9

Copied as it is, this function would run the *original* model's block inside the pruned model, silently. So functions,
bound methods, containers and small objects are copied with every module of the original in them exchanged for the
module of the same name (`_Copier`).
"""

from __future__ import annotations

import copy
import functools
import types
from collections import OrderedDict
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from ecodiff.errors import EcoDiffError
from ecodiff.pipelines.parts import plain_module, plain_name

# Entries of a module's __dict__ that weights, config, structure, or code below take care of.
_ELSEWHERE = {
    "_parameters",
    "_buffers",
    "_modules",
    "_non_persistent_buffers_set",
    "_internal_dict",
    "_hf_hook",
    "_old_forward",
    "_diffusers_hook",
    "_cache_config",
    "_compiled_call_impl",
    "forward",
    "peft_config",
    "_hf_peft_config_loaded",
    "hf_device_map",
}
COMPILED = "compilation (compile the pruned denoiser as you did the original)"
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_LAYERWISE_CASTING = "layerwise_casting"
_GROUP_OFFLOADING = "group_offloading"


def plain_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of all modules, without the wrappers of parts that were compiled by ``torch.compile(part)``."""
    for name, module in model.named_modules():
        if "_orig_mod" not in module._modules:
            yield plain_name(name), module


def all_tensors(model: nn.Module) -> dict[str, Tensor]:
    """{name: tensor} of all parameters and buffers, with the values of those that a hook keeps elsewhere.

    Offloading leaves meta tensors in the modules (accelerate's sequential and disk offload) or arbitrary values
    (diffusers' group offload to disk); their hooks know where the weights are. The tensors are the model's own, or what
    its hooks keep: not copies. A model that is on the meta device without hooks gives its meta tensors.
    """
    tensors = {plain_name(name): tensor for name, tensor in model.named_parameters(remove_duplicate=False)}
    tensors |= {plain_name(name): tensor for name, tensor in model.named_buffers(remove_duplicate=False)}
    # By identity, since tied weights are one tensor under several names.
    fetched_by_identity: dict[int, Tensor] = {}
    groups = {}
    for prefix, module in plain_modules(model):
        for hook in _accelerate_hooks(module):
            if not getattr(hook, "offload", False) or getattr(hook, "weights_map", None) is None:
                continue
            own = dict(module.named_parameters(recurse=hook.place_submodules))
            own |= dict(module.named_buffers(recurse=hook.place_submodules))
            for name, tensor in own.items():
                if tensor is not None and tensor.is_meta:
                    value = hook.weights_map[name]
                    fetched_by_identity[id(tensor)] = value
                    tensors[f"{prefix}.{name}".lstrip(".")] = value
        group = _group(module)
        if getattr(group, "_is_offloaded_to_disk", False):
            groups[group.safetensors_file_path] = group
    for path, group in groups.items():
        from safetensors.torch import load_file

        stored = load_file(path)
        for tensor, key in group.tensor_to_key.items():
            fetched_by_identity[id(tensor)] = stored[key]
    for name, tensor in tensors.items():
        if id(tensor) in fetched_by_identity:
            tensors[name] = fetched_by_identity[id(tensor)]
    return tensors


def kept_elsewhere(model: nn.Module) -> bool:
    """Whether some of the model's weights are not in its modules but where an offloading hook keeps them."""
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        return True
    groups = [_group(module) for module in model.modules()]
    return any(getattr(group, "_is_offloaded_to_disk", False) for group in groups)


def refuse_elsewhere(model: nn.Module, caller: str) -> None:
    """Raise EcoDiffError for a model some of whose weights are kept elsewhere (`kept_elsewhere`)."""
    if kept_elsewhere(model):
        raise EcoDiffError(
            f"{caller}: some weights of this {type(model).__name__} are not in it but kept elsewhere (sequential or "
            "disk offload, or the meta device). Call pipe.remove_all_hooks() or load the pipeline again, and take "
            "enable_model_cpu_offload() where memory is short, which keeps weights whole."
        )


def refuse_streamed(model: nn.Module, caller: str) -> None:
    """Raise EcoDiffError for a model whose weights are on the device only while its forward runs (group offload).

    Backward needs the weights once more, and hooks of the forward do not bring them back.
    """
    groups = [_group(module) for module in model.modules()]
    if any(group is not None and group.onload_device.type != group.offload_device.type for group in groups):
        raise EcoDiffError(
            f"{caller} needs gradients, and group offload takes the weights of this {type(model).__name__} away before "
            "backward. Load the pipeline again and take enable_model_cpu_offload(), or a score without gradients."
        )


def carry_over(old: nn.Module, new: nn.Module) -> list[str]:
    """Give ``new``, freshly built from ``old``'s config, what ``old`` has beside config and weights.

    Module names and layers must agree. Returns what could not be copied, each entry in words that go on "not carried
    over: ...", with what to do about it.
    """
    modules = dict(plain_modules(old))
    fresh = dict(new.named_modules())
    missing = _Missing()
    copier = _Copier({id(module): fresh[name] for name, module in modules.items() if name in fresh}, old)
    missing.add_all(_on_the_whole(old))
    # Structure first, so that everything that refers to modules finds them.
    for name, module in modules.items():
        target = fresh.get(name)
        if target is not None:
            _carry_children(name, module, target, copier, missing)
            _carry_class(name, module, target, root=module is old, missing=missing)
    for name, module in modules.items():
        target = fresh.get(name)
        if target is not None:
            _carry_entries(name, module, target, copier, missing)
    for name, parameter in old.named_parameters():
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            missing.add(f"gradient hooks of weights (register them on the pruned model), such as of {name}")
    for name in copier.still_original:
        missing.add(f"what refers to the original model or pipeline itself and goes on doing so: {name}")
    return missing.entries


def carry_casting(old: nn.Module, new: nn.Module) -> None:
    """Cast weights of ``new`` layer by layer where ``old`` does (``enable_layerwise_casting``). To be called once the
    layers of ``new`` are final, since it moves their weights to the storage dtype."""
    fresh = dict(new.named_modules())
    for name, module in plain_modules(old):
        hook = _registered(module).get(_LAYERWISE_CASTING)
        if hook is not None and name in fresh:
            from diffusers.hooks.layerwise_casting import apply_layerwise_casting_hook

            apply_layerwise_casting_hook(fresh[name], hook.storage_dtype, hook.compute_dtype, hook.non_blocking)


def carry_pipeline(old, new, old_denoiser: nn.Module, new_denoiser: nn.Module) -> list[str]:
    """`carry_over` for public attributes of a pipeline that its class did not set (patched methods and the like)."""
    fresh = dict(new_denoiser.named_modules())
    modules = {id(module): fresh[name] for name, module in plain_modules(old_denoiser) if name in fresh}
    copier = _Copier({**modules, id(old): new}, old_denoiser)
    for name, value in vars(old).items():
        if name.startswith("_") or name in old.components:
            continue
        if name not in vars(new) or not _same(value, vars(new)[name], copier):
            new.__dict__[name] = copier.copy(value, f"pipe.{name}")
    return [f"what refers to the original pipeline itself: {name}" for name in copier.still_original]


class _Missing:
    """A list of words without repetitions."""

    def __init__(self):
        self.entries: list[str] = []

    def add(self, words: str) -> None:
        if words not in self.entries:
            self.entries.append(words)

    def add_all(self, many: list[str]) -> None:
        for words in many:
            self.add(words)


def _on_the_whole(old: nn.Module) -> list[str]:
    """What the original has that acts on all of it and has to be switched on again, in words."""
    missing = []
    registered: set[str] = set()
    accelerate_hooks = []
    compiled = False
    for module in old.modules():
        registered.update(_registered(module))
        accelerate_hooks += _accelerate_hooks(module)
        # module.compile() leaves the first, torch.compile(module) the second
        compiled |= getattr(module, "_compiled_call_impl", None) is not None or "_orig_mod" in module._modules
    if compiled:
        missing.append(COMPILED)
    if _GROUP_OFFLOADING in registered:
        missing.append("group offloading (call enable_group_offload on the pruned denoiser)")
    if getattr(old, "_cache_config", None) is not None:
        missing.append(f"caching by {type(old._cache_config).__name__} (call enable_cache on the pruned denoiser)")
    ours = {_GROUP_OFFLOADING, _LAYERWISE_CASTING, "layer_execution_tracker", "lazy_prefetch_group_offloading"}
    others = sorted(registered - ours)
    if others and getattr(old, "_cache_config", None) is None:
        missing.append(f"diffusers hooks {', '.join(others)} (apply them to the pruned denoiser)")
    if any(getattr(hook, "offload", False) for hook in accelerate_hooks):
        missing.append(
            "sequential offload (its weights were fetched; call enable_sequential_cpu_offload on the pruned pipeline)"
        )
    elif getattr(old, "hf_device_map", None):
        missing.append("the device map (dispatch the pruned denoiser as you did the original)")
    strange = sorted({type(hook).__name__ for hook in accelerate_hooks} - {"AlignDevicesHook", "CpuOffload"})
    if strange:
        missing.append(f"accelerate hooks {', '.join(strange)} (add them to the pruned denoiser)")
    return missing


def _carry_children(name: str, old: nn.Module, new: nn.Module, copier: _Copier, missing: _Missing) -> None:
    """Modules without weights that were added, exchanged or taken away (weights were compared before)."""
    for child, module in old._modules.items():
        module = plain_module(module)
        theirs = new._modules.get(child)
        if module is None:
            if theirs is not None:
                new._modules[child] = None
        elif theirs is None or not (isinstance(module, type(theirs)) or isinstance(theirs, type(module))):
            place = f"{name}.{child}".lstrip(".")
            if next(module.parameters(), None) is not None or next(module.buffers(), None) is not None:
                missing.add(f"the class {type(module).__name__} of {place}")
            else:
                for part in module.modules():  # no counterparts: the copy takes its own place
                    copier.counterparts.pop(id(part), None)
                new._modules[child] = copier.copy_module(module, place)
    for child in list(new._modules):
        if child not in old._modules and child not in vars(old):
            del new._modules[child]


def _carry_class(name: str, old: nn.Module, new: nn.Module, root: bool, missing: _Missing) -> None:
    """A module whose class was exchanged for a subclass, which is how some patches (token merging) are applied."""
    if root or type(old) is type(new):
        return
    if issubclass(type(old), type(new)):
        new.__class__ = type(old)
    elif isinstance(new, type(old)):
        missing.add(f"the class {type(old).__name__} of {name}")


def _carry_entries(name: str, old: nn.Module, new: nn.Module, copier: _Copier, missing: _Missing) -> None:
    """Plain attributes: flags, factors, processors, hooks, and a forward that was set on the instance."""
    for key, value in vars(old).items():
        if key in _ELSEWHERE:
            continue
        if key in _HOOKS:  # gates and the like hold only while their context is open
            value = type(value)((number, hook) for number, hook in value.items() if not hasattr(hook, "of_ecodiff"))
        if key not in vars(new) or not _same(value, vars(new)[key], copier):
            new.__dict__[key] = copier.copy(value, f"{name}.{key}".lstrip("."))
    forward = _own_forward(old)
    if forward is not None:
        new.__dict__["forward"] = copier.copy(forward, f"{name}.forward".lstrip("."))
    new._non_persistent_buffers_set |= {key for key in old._non_persistent_buffers_set if key in new._buffers}


def _own_forward(module: nn.Module):
    """The forward that a user set on this module, beneath the hooks of diffusers and accelerate; None without one."""
    forward = vars(module).get("forward")
    while hasattr(forward, "in_place_of"):  # `replaced_forward` wraps it for the moment
        forward = forward.in_place_of
    if forward is None:
        return None
    registry = vars(module).get("_diffusers_hook")
    if registry is not None and registry._fn_refs:
        first = registry._fn_refs[0]
        forward = first.original_forward or first.forward
    if "_hf_hook" in vars(module):
        forward = vars(module).get("_old_forward", forward)
    if isinstance(forward, types.MethodType) and forward.__func__ is type(module).forward:
        return None
    return forward


class _Copier:
    """Copies values from one model into another: what belongs to the first is exchanged for its counterpart.

    counterparts: {id of an object of the original: the object that takes its place}. ``still_original`` collects the
    places of values that go on referring to the original, because nothing can be exchanged in them.
    """

    def __init__(self, counterparts: dict[int, object], original: nn.Module):
        self.counterparts = counterparts
        self.original = original
        self.still_original: list[str] = []
        self._copies: dict[int, tuple[object, object]] = {}  # id -> (original, copy): one object stays one object

    def copy(self, value, place: str):
        """A copy of the value, or the value itself where it cannot refer to the model."""
        if id(value) in self.counterparts:
            return self.counterparts[id(value)]
        if id(value) in self._copies:
            return self._copies[id(value)][1]
        if isinstance(value, nn.Parameter):
            return value
        if isinstance(value, Tensor):
            return self._remember(value, value.detach().clone())
        if isinstance(value, nn.Module):
            return self.copy_module(value, place)
        if isinstance(value, types.MethodType):
            return types.MethodType(self.copy(value.__func__, place), self.copy(value.__self__, place))
        if isinstance(value, functools.partial):
            arguments = [self.copy(part, place) for part in value.args]
            named = {key: self.copy(part, place) for key, part in value.keywords.items()}
            made = functools.partial(self.copy(value.func, place), *arguments, **named)
            made.__dict__.update({key: self.copy(part, place) for key, part in vars(value).items()})
            return self._remember(value, made)
        if isinstance(value, types.FunctionType):
            return self._function(value, place)
        if type(value) in (list, set, tuple, dict, OrderedDict):
            return self._container(value, place)
        if self._holds_original(value):
            return self._object(value, place)
        return value

    def copy_module(self, module: nn.Module, place: str) -> nn.Module:
        """A module like this one with its tensors shared, and its children copied likewise."""
        made = self._remember(module, object.__new__(type(module)))
        made.__dict__.update(vars(module))
        for key in ("_parameters", "_buffers"):
            made.__dict__[key] = dict(vars(module)[key])
        made.__dict__["_modules"] = {
            name: self.copy(child, f"{place}.{name}") for name, child in module._modules.items()
        }
        for key, value in vars(module).items():
            if key not in _ELSEWHERE:
                made.__dict__[key] = self.copy(value, f"{place}.{key}")
        if "forward" in vars(module):
            made.__dict__["forward"] = self.copy(vars(module)["forward"], f"{place}.forward")
        return made

    def _remember(self, value, made):
        self._copies[id(value)] = value, made
        return made

    def _function(self, function: types.FunctionType, place: str):
        """The function with the original's modules exchanged in its closure and defaults; itself if there are none."""
        cells, defaults = function.__closure__ or (), function.__defaults__ or ()
        named = function.__kwdefaults__ or {}
        wrapped = vars(function).get("__wrapped__")
        self._remember(function, function)  # a function may be in its own closure
        before = [cell.cell_contents if _full(cell) else None for cell in cells]
        after = [self._in_closure(part, place) for part in before]
        new_defaults = tuple(self._in_closure(part, place) for part in defaults)
        new_named = {key: self._in_closure(part, place) for key, part in named.items()}
        new_wrapped = self.copy(wrapped, place)
        old_parts = [*before, *defaults, *named.values(), wrapped]
        new_parts = [*after, *new_defaults, *new_named.values(), new_wrapped]
        if all(a is b for a, b in zip(old_parts, new_parts, strict=True)):
            return function
        closure = tuple(types.CellType(part) if _full(cell) else cell for cell, part in zip(cells, after, strict=True))
        made = types.FunctionType(function.__code__, function.__globals__, function.__name__, new_defaults, closure)
        made.__kwdefaults__ = new_named or None
        made.__dict__.update(vars(function))
        made.__qualname__, made.__doc__ = function.__qualname__, function.__doc__
        if new_wrapped is not None:
            vars(made)["__wrapped__"] = new_wrapped
        for cell, part in zip(closure, before, strict=True):
            if part is function:  # a recursive function calls its copy, which is there only now
                cell.cell_contents = made
        return self._remember(function, made)

    def _in_closure(self, value, place: str):
        """What a function sees in the place of a value: the value itself, unless something of the original is in it.

        So lists that a hook fills stay shared, and whoever reads them goes on seeing what is filled in.
        """
        if self._holds_original(value):
            return self.copy(value, place)
        return value

    def _container(self, value, place: str):
        if isinstance(value, dict):
            made = copy.copy(value)
            self._remember(value, made)
            for key, part in value.items():
                made[key] = self.copy(part, place)
            return made
        return self._remember(value, type(value)(self.copy(part, place) for part in value))

    def _object(self, value, place: str):
        """A shallow copy of an object whose attributes refer to the original, with these exchanged."""
        if not hasattr(value, "__dict__") or isinstance(value, type) or _is_pipeline(value):
            self.still_original.append(place)
            return value
        try:
            made = copy.copy(value)
        except Exception:  # whatever a foreign class's own copying may raise
            self.still_original.append(place)
            return value
        self._remember(value, made)
        for key, part in vars(value).items():
            if self._holds_original(part):
                made.__dict__[key] = self.copy(part, place)
        return made

    def _holds_original(self, value, depth: int = 4) -> bool:
        """Whether the value is, or refers to, something of the original; looks a few levels deep."""
        if id(value) in self.counterparts:
            return True
        if depth == 0 or isinstance(value, (str, bytes, int, float, bool, type(None), type, Tensor, types.ModuleType)):
            return False
        if isinstance(value, nn.Module):
            return any(id(module) in self.counterparts for module in value.modules())
        if _is_pipeline(value):
            return any(part is self.original for part in value.components.values())
        return any(self._holds_original(part, depth - 1) for part in _parts(value))


def _parts(value) -> list:
    """What a value refers to directly."""
    if isinstance(value, types.MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if _full(cell)]
        wrapped = [vars(value)["__wrapped__"]] if "__wrapped__" in vars(value) else []
        return [*cells, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values(), *wrapped]
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, (list, tuple, set, frozenset)):
        return list(value)
    return list(getattr(value, "__dict__", {}).values())


def _full(cell) -> bool:
    try:
        cell.cell_contents  # noqa: B018 (raises where it is empty)
    except ValueError:
        return False
    return True


def _is_pipeline(value) -> bool:
    from diffusers import DiffusionPipeline

    return isinstance(value, DiffusionPipeline)


def _same(a, b, copier: _Copier, depth: int = 6) -> bool:
    """Whether a value of the original is what the fresh model has in its place. Where that is unclear: no."""
    if a is b or (id(a) in copier.counterparts and copier.counterparts[id(a)] is b):
        return True
    if type(a) is not type(b) or depth == 0:
        return False
    if isinstance(a, Tensor):
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        return a.is_meta or b.is_meta or torch.equal(a, b.to(a.device))
    if isinstance(a, types.MethodType):
        return a.__func__ is b.__func__ and _same(a.__self__, b.__self__, copier, depth - 1)
    if isinstance(a, (types.FunctionType, functools.partial)):
        if isinstance(a, types.FunctionType) and a.__code__ is not b.__code__:
            return False
        mine, theirs = _parts(a), _parts(b)
        return len(mine) == len(theirs) and all(
            _same(x, y, copier, depth - 1) for x, y in zip(mine, theirs, strict=True)
        )
    if isinstance(a, Mapping):
        return list(a) == list(b) and all(_same(a[key], b[key], copier, depth - 1) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(_same(x, y, copier, depth - 1) for x, y in zip(a, b, strict=True))
    if isinstance(a, nn.Module):
        return False
    try:
        if bool(a == b):
            return True
    except Exception:  # comparisons of foreign classes may raise anything
        return False
    if not hasattr(a, "__dict__"):
        return False
    return _same(vars(a), vars(b), copier, depth - 1)


def _accelerate_hooks(module: nn.Module) -> list:
    """The accelerate hooks of one module, those in a sequence one by one."""
    hook = vars(module).get("_hf_hook")
    if hook is None:
        return []
    return list(getattr(hook, "hooks", [hook]))


def _registered(module: nn.Module) -> dict:
    """{name: hook} of the diffusers hooks of one module."""
    registry = vars(module).get("_diffusers_hook")
    return {} if registry is None else registry.hooks


def _group(module: nn.Module):
    """The group of diffusers' group offloading that this module leads; None if there is none."""
    return getattr(_registered(module).get(_GROUP_OFFLOADING), "group", None)
