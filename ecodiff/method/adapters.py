"""Adapters on pruned models: those of the original are cut to fit, and what cannot be cut is refused by name.

A LoRA adds B A to the weight of a layer. Where units were removed, rows of the weight went, and the same rows of B go;
or columns went, and the same columns of A go. That is exact: loading a LoRA of the original into the pruned model gives
what pruning the original with that LoRA in its weights gives. The projections of an IP-Adapter lose the rows of removed
heads likewise. The mask for this stands in the pruned model's config (`ecodiff.method.kept`).

Pruned classes therefore look at what they are given: the methods here stand before those of the same name of the
diffusers class. Adapters that were trained beside the pruned model fit as they are.
"""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Collection, Mapping, MutableMapping
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

from torch import Tensor, nn

from ecodiff.errors import EcoDiffError

from .emptied import EmptiedAttention
from .kept import ENTRIES, kept_entries, mask_of_config
from .layers import EmptiedLayer
from .sites import KINDS, find_sites

_INSTEAD = "Use it with the original model, or train one for the pruned model."
_UNKNOWN = (
    "was pruned by an earlier version, which did not write which units were kept: prune the original again, and "
    "adapters of the original fit."
)
_FACTORS = re.compile(r"(?P<layer>.+)\.(?P<part>lora_A|lora_B)(\.\w+)?\.weight$")
_OF_LAYER = re.compile(
    r"(?P<layer>.+)\.(?P<part>lora_A|lora_B|lora_magnitude_vector)(\.\w+)?(\.(?P<what>weight|bias))?$"
)
_KRONECKER = re.compile(r"(?P<layer>.+)\.lokr_(?P<part>w[12](_[ab])?)(\.\w+)?$")
# Layers of an attention processor whose output is split into the attention's heads.
_SPLIT_INTO_HEADS = re.compile(r"^(to|add)_(q|k|v)")
_SIDES = {"out": 0, "in": 1}  # a side of a layer -> the dimension of its weight


def guarded_methods(base: Any) -> dict:
    """{name: method} for the pruned class of ``base``: its methods that take adapters, each with what fits them."""
    methods = {}
    if hasattr(base, "load_lora_adapter"):
        methods["load_lora_adapter"] = _loads_fitted_loras(base.load_lora_adapter)
    guards = {
        "add_adapter": _before_new_adapter,
        "load_attn_procs": _before_processors_of_the_original,
        "set_attn_processor": _before_processors,
    }
    if hasattr(base, "_load_ip_adapter_loras"):  # the U-Nets, where what an IP-Adapter adds passes the output layers
        methods["_convert_ip_adapter_attn_to_diffusers"] = _fits_ip_adapters(base._convert_ip_adapter_attn_to_diffusers)
        methods["_load_ip_adapter_loras"] = _reads_as_the_original(base._load_ip_adapter_loras)
    else:
        guards["_load_ip_adapter_weights"] = _before_ip_adapter
    for name, check in guards.items():
        if hasattr(base, name):
            methods[name] = _guarded(getattr(base, name), check)
    return methods


def _guarded(method, check):
    @wraps(method)
    def guarded(self, *args, **kwargs):
        check(self, *args, **kwargs)
        return method(self, *args, **kwargs)

    return guarded


def guard_flux_loader(pruned: type) -> None:
    """Make diffusers' loader of FLUX LoRAs cut those for models of the class ``pruned`` first.

    It widens layers to the LoRA's shapes before it calls the model at all (for control LoRAs, which add channels to the
    input), so that `load_lora_adapter` would cut too late.
    """
    try:
        from diffusers.loaders.lora_pipeline import _MODULE_NAME_TO_ATTRIBUTE_MAP_FLUX as can_widen
        from diffusers.loaders.lora_pipeline import FluxLoraLoaderMixin as loader
    except ImportError:
        return
    name = "_maybe_expand_transformer_param_shape_or_error_"
    present = inspect.getattr_static(loader, name, None)
    if not isinstance(present, classmethod) or hasattr(present.__func__, "of_ecodiff"):
        return
    original = present.__func__

    @wraps(original)
    def checked(cls, transformer, lora_state_dict=None, *args, **kwargs):
        if isinstance(transformer, pruned) and lora_state_dict:
            start = f"{cls.transformer_name}."
            fitted = fit_lora(transformer, _without_prefix(lora_state_dict, cls.transformer_name), can_widen)
            _replace_contents(lora_state_dict, {f"{start}{key}": value for key, value in fitted.items()})
            lora_state_dict = {
                key: value
                for key, value in lora_state_dict.items()
                if any(key.startswith(f"{start}{layer}.") for layer in can_widen)
            }
        return original(cls, transformer, lora_state_dict, *args, **kwargs)

    vars(checked)["of_ecodiff"] = True
    setattr(loader, name, classmethod(checked))


def _replace_contents(mapping: MutableMapping, contents: Mapping) -> None:
    mapping.clear()
    mapping.update(contents)


@dataclass(frozen=True)
class _Original:
    """The model before anything was removed (on the meta device), and what has gone since.

    entries: {(layer, dimension of its weight): bool tensor, which rows or columns stay}, for those that have lost some.
    unknown: those of which it is known how many have stayed, but not which.
    """

    model: nn.Module
    entries: Mapping[tuple[str, int], Tensor]
    unknown: Collection[tuple[str, int]]


def _original(model) -> _Original:
    """The original of a pruned model, from its config."""
    from accelerate import init_empty_weights

    config = dict(model.config)
    told = {name: config.pop(name) for name in ENTRIES if name in config}
    with init_empty_weights():
        original = type(model).from_config(config)
    sites = find_sites(original, KINDS)
    mask, unknown = mask_of_config(told, sites)
    entries = kept_entries(original, sites, mask)
    of_unknown = kept_entries(original, sites, {name: mask[name] for name in unknown})
    return _Original(original, {place: keep for place, keep in entries.items() if not keep.all()}, set(of_unknown))


def fit_lora(model, state_dict: Mapping[str, Tensor], can_widen: Collection[str] = ()) -> dict[str, Tensor]:
    """The weights of a LoRA by peft's names, cut to the units that are left of a pruned model.

    state_dict: {layer.lora_A.weight: [rank, in], layer.lora_B.weight: [out, rank], ...}, also under diffusers' older
    names. What belongs to removed layers, or to layers that have nothing left to write or to read, adds nothing and is
    left out. A LoRA that fits the pruned model as it is stays as it is. Layers that neither this model nor its original
    has are left to diffusers, which warns of them, and so are those named in ``can_widen``.

    Raises EcoDiffError where widths fit neither the pruned model nor its original, and for what cannot be cut exactly:
    LoKr, and DoRA on layers that have lost columns.
    """
    state_dict = _peft_names(state_dict)
    original, name = _original(model), type(model).__name__
    fit = _compare(model, original, _widths(state_dict), can_widen)
    if fit.whole and fit.cut:
        raise EcoDiffError(
            f"This LoRA was made for another pruned model: it has all channels of {fit.whole[0][0]!r}, and of "
            f"{fit.cut[0]!r} only some. {_INSTEAD}"
        )
    if any(place in original.unknown for place in fit.whole):
        raise EcoDiffError(f"This LoRA was made for the original, and this {name} {_UNKNOWN}")
    _check_exact(state_dict, fit, original, name)

    fitted = {}
    for key, value in state_dict.items():
        part = _OF_LAYER.match(key)
        if part is None:
            fitted[key] = value
            continue
        layer, dimension = part["layer"], 1 if part["part"] == "lora_A" else 0
        keep = original.entries.get((layer, dimension))
        if layer in fit.nothing_left:
            continue
        if keep is not None and layer in fit.scattered:
            value = _zeroed(value, keep)
        elif keep is not None and (layer, dimension) in fit.whole and not _shared(part):
            value = value.index_select(dimension if value.ndim > 1 else 0, _index(keep, value))
        fitted[key] = value
    return fitted


@dataclass
class _Fit:
    """How the widths of a LoRA compare with those of a pruned model.

    whole: (layer, dimension of its weight) where the LoRA has the width of the original, and the model has less. cut:
    layers where it has the model's own. nothing_left: layers that write or read nothing any more. scattered: layers
    that return zeros in the places of removed channels.
    """

    whole: list[tuple[str, int]] = field(default_factory=list)
    cut: list[str] = field(default_factory=list)
    nothing_left: set[str] = field(default_factory=set)
    scattered: set[str] = field(default_factory=set)


def _compare(model, original: _Original, widths: Mapping[str, Mapping[str, int]], can_widen: Collection[str]) -> _Fit:
    """Raises EcoDiffError for a width that is neither the model's nor its original's."""
    name = type(model).__name__
    layers = dict(original.model.named_modules())
    own_layers = dict(model.named_modules())
    fit = _Fit()
    for layer, sides in widths.items():
        if layer not in layers or layer in can_widen:
            continue
        own = own_layers.get(layer, layers[layer])
        if _scattered(own):
            fit.scattered.add(layer)
        for side, width in sides.items():
            place = (layer, _SIDES[side])
            keep, before = original.entries.get(place), _own_width(layers[layer], side)
            if keep is None:
                if _own_width(own, side) not in (None, width):
                    raise EcoDiffError(
                        f"This LoRA does not fit {layer!r} of this {name}: it has {width} {side}put channels, the "
                        f"layer {_own_width(own, side)}, and so had the original. It was made for another model."
                    )
                continue
            left = int(keep.sum())
            if width != before and (width != left or layer in fit.scattered):
                raise EcoDiffError(
                    f"This LoRA fits neither this {name} nor its original: for {layer!r} it has {width} {side}put "
                    f"channels, the layer has {left}, and had {before}. It was made for another model."
                )
            if left == 0:
                fit.nothing_left.add(layer)
            elif layer not in fit.scattered:
                if width == before:
                    fit.whole.append(place)
                else:
                    fit.cut.append(layer)
    # What is left out anyway tells nothing about which model the LoRA was made for.
    fit.whole = [place for place in fit.whole if place[0] not in fit.nothing_left]
    fit.cut = [layer for layer in fit.cut if layer not in fit.nothing_left]
    return fit


def _shared(part: re.Match) -> bool:
    """Whether a tensor of a layer has the rank alone for a width: a bias of A."""
    return part["part"] == "lora_A" and part["what"] == "bias"


def _index(keep: Tensor, like: Tensor) -> Tensor:
    return keep.nonzero().flatten().to(like.device)


def _zeroed(value: Tensor, keep: Tensor) -> Tensor:
    """Rows of channels that were removed become zero: what is left of such a layer is put back in its places."""
    if value.shape[0] != keep.numel():
        return value
    return value * keep.to(value.device, value.dtype).reshape(-1, *[1] * (value.ndim - 1))


def _scattered(module: nn.Module | None) -> bool:
    """Whether this is a `ScatteredLinear`, maybe with adapters beside it."""
    return type(getattr(module, "base_layer", module)).__name__ == "ScatteredLinear"


def _check_exact(state_dict: Mapping[str, Tensor], fit: _Fit, original: _Original, name: str) -> None:
    """Raise EcoDiffError for parts of adapters of the original that cutting would change."""
    of_original = {layer for layer, _ in fit.whole} | fit.nothing_left
    for key, value in state_dict.items():
        part, kronecker = _OF_LAYER.match(key), _KRONECKER.match(key)
        if kronecker and kronecker["layer"] in of_original:
            raise EcoDiffError(
                f"This LoKr was made for the original of this {name}: the product for {kronecker['layer']!r} cannot be "
                f"cut. {_INSTEAD}"
            )
        if part is None:
            continue
        layer = part["layer"]
        if part["part"] == "lora_magnitude_vector" and (layer, 1) in fit.whole:
            raise EcoDiffError(
                f"This DoRA was made for the original of this {name}: it weighs whole rows of {layer!r}, which have "
                f"lost columns. {_INSTEAD}"
            )
        adds = part["part"] == "lora_B" and part["what"] == "bias" and bool(value.any())
        writes = (layer, 0) not in original.entries or bool(original.entries[layer, 0].any())
        if adds and writes and layer in fit.nothing_left:
            raise EcoDiffError(
                f"This LoRA adds to the bias of {layer!r}, which has no units left in this {name}. {_INSTEAD}"
            )


def _loads_fitted_loras(method):
    @wraps(method)
    def load_lora_adapter(self, pretrained_model_name_or_path_or_dict, prefix="transformer", hotswap=False, **kwargs):
        state_dict, metadata = _fetched(pretrained_model_name_or_path_or_dict, kwargs)
        own = _without_prefix(state_dict, prefix)
        fitted = fit_lora(self, own) if own else own
        start = "" if prefix is None else f"{prefix}."
        if metadata and len(_layers(fitted)) < len(_layers(_peft_names(own))):
            # Else peft would look for the layers that are left out, and warn.
            metadata = {**metadata, f"{start}target_modules": sorted(_layers(fitted))}
        fitted = {f"{start}{key}": value for key, value in fitted.items()}
        kwargs["metadata"] = metadata
        result = method(self, fitted, prefix=prefix, hotswap=hotswap, **kwargs)
        for module in self.modules():
            if _scattered(module) and hasattr(module, "get_delta_weight"):
                module.get_delta_weight = types.MethodType(_delta_of_what_is_left, module)
        return result

    return load_lora_adapter


def _layers(state_dict: Mapping[str, Tensor]) -> set[str]:
    return {part["layer"] for part in map(_OF_LAYER.match, state_dict) if part}


def _delta_of_what_is_left(layer, adapter: str) -> Tensor:
    """What fusing adds to the weight of a `ScatteredLinear`, which has the rows that are left alone."""
    return type(layer).get_delta_weight(layer, adapter)[layer.get_base_layer().index]


def _fetched(source, kwargs: Mapping) -> tuple[Mapping[str, Tensor], Mapping | None]:
    """The weights of an adapter from a file, the Hub or a dict, and its metadata."""
    if isinstance(source, Mapping):
        return source, kwargs.get("metadata")
    from diffusers.loaders.lora_base import _fetch_state_dict

    # A private function whose parameters change with versions of diffusers: None for those not known here.
    parameters = inspect.signature(_fetch_state_dict).parameters
    arguments = dict.fromkeys(parameters)
    arguments |= {key: value for key, value in kwargs.items() if key in parameters}
    arguments |= {"pretrained_model_name_or_path_or_dict": source, "allow_pickle": False}
    arguments["user_agent"] = {"file_type": "attn_procs_weights", "framework": "pytorch"}
    state_dict = _fetch_state_dict(**arguments)
    if isinstance(state_dict, tuple):  # newer versions return metadata beside it
        return state_dict
    return state_dict, kwargs.get("metadata")


def _before_new_adapter(model, adapter_config, *args, **kwargs) -> None:
    if not hasattr(adapter_config, "target_modules"):
        return
    from peft.tuners.tuners_utils import check_target_module_exists

    modules = dict(model.named_modules())
    _leave_out(adapter_config, [name for name, module in modules.items() if isinstance(module, EmptiedLayer)])
    for name in (name for name, module in modules.items() if _scattered(module)):
        if check_target_module_exists(adapter_config, name):
            raise EcoDiffError(
                f"add_adapter: some channels of {name!r} were removed, and peft has no adapters for what is left: "
                "leave it out of target_modules."
            )


def _leave_out(adapter_config, names: list[str]) -> None:
    """Tell peft to pass layers over that have nothing left to adapt, and that it has no adapters for."""
    excluded = getattr(adapter_config, "exclude_modules", None)
    if not names:
        return
    if isinstance(excluded, str):  # a regular expression
        adapter_config.exclude_modules = "|".join([f"(?:{excluded})", *map(re.escape, names)])
    else:
        adapter_config.exclude_modules = sorted({*(excluded or ()), *names})


def _fits_ip_adapters(method):
    """An IP-Adapter is made for all heads: read as for the original, then without the rows of removed heads.

    An attention without heads takes no part: what its output layer would read of an IP-Adapter is gone.
    """

    @wraps(method)
    def convert(self, *args, **kwargs):
        original = _original(self)
        present = self.attn_processors
        for name, processor in present.items():
            original.model.get_submodule(name.removesuffix(".processor")).processor = processor
        processors = method(original.model, *args, **kwargs)
        for name in present:
            place = (f"{name.removesuffix('.processor')}.to_k", 0)
            layers = _layers_of_heads(processors[name])
            if place not in original.entries or not layers:
                continue
            if place in original.unknown:
                raise EcoDiffError(
                    f"This IP-Adapter was made for the original, and this {type(self).__name__} {_UNKNOWN}"
                )
            keep = original.entries[place]
            for layer in layers.values():
                weight = layer.weight.detach()[_index(keep, layer.weight)]
                layer.weight = nn.Parameter(weight, layer.weight.requires_grad)
                layer.out_features = len(weight)
        return {name: processors[name] for name in present}

    return convert


def _layers_of_heads(processor) -> dict[str, nn.Linear]:
    """{name: layer} of those layers of an attention processor whose output is split into heads."""
    layers = {}
    for name, layer in processor.named_modules() if isinstance(processor, nn.Module) else ():
        if isinstance(layer, nn.Linear) and any(_SPLIT_INTO_HEADS.match(piece) for piece in name.split(".")):
            layers[name] = layer
    return layers


def _reads_as_the_original(method):
    """A method that numbers attentions, called on the original, of which none has gone."""

    @wraps(method)
    def read(self, *args, **kwargs):
        return method(_original(self).model, *args, **kwargs)

    return read


def _before_ip_adapter(model, *args, **kwargs) -> None:
    site = _pruned_attention(model)
    if site is not None:
        raise EcoDiffError(
            f"An IP-Adapter of the original does not fit this {type(model).__name__}: what it adds for each head goes "
            f"past the output layer, and {site!r} has fewer heads. Use it with the original model, or prune "
            "feed-forwards only."
        )


def _before_processors_of_the_original(model, *args, **kwargs) -> None:
    site = _pruned_attention(model)
    if site is not None:
        raise EcoDiffError(
            f"load_attn_procs: attention processors of the original do not fit this {type(model).__name__}: they are "
            f"built for all heads, and {site!r} has fewer. For a LoRA take the pipeline's load_lora_weights."
        )


def _before_processors(model, processor, *args, **kwargs) -> None:
    """Raise EcoDiffError for processors with weights of their own that are not as wide as the heads that are left.

    Those of IP-Adapters are such: wider ones would not raise but be split into wrong heads.
    """
    if not isinstance(processor, Mapping):
        return
    for name, one in processor.items():
        attention = _submodule(model, name.removesuffix(".processor"))
        if attention is None or not isinstance(one, nn.Module) or not hasattr(attention, "to_q"):
            continue
        width = attention.to_q.out_features
        for part, layer in _layers_of_heads(one).items():
            if layer.out_features != width:
                raise EcoDiffError(
                    f"set_attn_processor: {part!r} of {type(one).__name__} for {name!r} gives {layer.out_features} "
                    f"channels, but the heads left there have {width}. {_INSTEAD}"
                )


def _pruned_attention(model) -> str | None:
    """The name of an attention that has lost heads; None where all have all."""
    for name in model.config.get("pruned_units", {}):
        module = _submodule(model, name)
        if hasattr(module, "to_q") or isinstance(module, EmptiedAttention):
            return name
    return None


def _widths(state_dict: Mapping[str, Tensor]) -> dict[str, dict[str, int]]:
    """{layer: {"in": channels, "out": channels}} that the adapter was made for, as far as its weights say."""
    widths: dict[str, dict[str, int]] = {}
    kronecker: dict[str, dict[str, Tensor]] = {}
    for key, value in state_dict.items():
        factor, part = _FACTORS.match(key), _KRONECKER.match(key)
        if factor and factor["part"] == "lora_A":  # [rank, in]
            widths.setdefault(factor["layer"], {})["in"] = value.shape[1]
        elif factor:  # lora_B, [out, rank]
            widths.setdefault(factor["layer"], {})["out"] = value.shape[0]
        elif part:
            kronecker.setdefault(part["layer"], {})[part["part"]] = value
    # A layer's weight is the Kronecker product of w1 and w2, either of which may be a product w_a w_b itself.
    for layer, parts in kronecker.items():
        for side, dimension, half in (("out", 0, "a"), ("in", 1, "b")):
            first = parts.get("w1", parts.get(f"w1_{half}"))
            second = parts.get("w2", parts.get(f"w2_{half}"))
            if first is not None and second is not None:
                widths.setdefault(layer, {})[side] = first.shape[dimension] * second.shape[dimension]
    return widths


def _own_width(module: nn.Module, side: str) -> int | None:
    """Channels of a linear layer or a convolution, ``side`` "in" or "out"; None for other modules."""
    for name in (f"{side}_features", f"{side}_channels"):
        width = getattr(module, name, None)
        if isinstance(width, int):
            return width
    return None


def _peft_names(state_dict: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The weights by peft's names, which older LoRA files do not have."""
    if not state_dict or any("lora_A" in key or "lokr_" in key for key in state_dict):
        return state_dict
    from diffusers.utils import convert_unet_state_dict_to_peft

    return convert_unet_state_dict_to_peft(dict(state_dict))


def _without_prefix(state_dict: Mapping[str, Tensor], prefix: str | None) -> dict[str, Tensor]:
    if prefix is None:
        return dict(state_dict)
    start = f"{prefix}."
    return {key.removeprefix(start): value for key, value in state_dict.items() if key.startswith(start)}


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None
