"""Adapters on pruned models: those that fit are loaded, those of the original are refused before anything changes.

A LoRA holds matrices as wide as the layers it was trained beside, and an IP-Adapter is built for as many heads as the
config says. On a pruned model the first raises from deep inside (or, for FLUX, silently widens the layers again), and
the second silently gives another image, since its processors reshape by the number of heads. So pruned classes check
what they are given: the methods here stand before those of the same name of the diffusers class.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from functools import wraps

from torch import Tensor, nn

from ecodiff.errors import EcoDiffError

from .emptied import EmptiedAttention, is_emptied

_UNTIL = "It was made for the original model: load it there, or train one for the pruned model, which does fit."
_FACTORS = re.compile(r"(?P<layer>.+)\.(?P<part>lora_A|lora_B)(\.\w+)?\.weight$")
_KRONECKER = re.compile(r"(?P<layer>.+)\.lokr_(?P<part>w[12](_[ab])?)(\.\w+)?$")
# Layers of an attention processor whose output is split into the attention's heads.
_SPLIT_INTO_HEADS = re.compile(r"^(to|add)_(q|k|v)")


def guarded_methods(base: type) -> dict:
    """{name: method} for the pruned class of ``base``: its methods that take adapters, with a check before each."""
    guards = {
        "load_lora_adapter": _before_lora,
        "add_adapter": _before_new_adapter,
        "load_attn_procs": _before_processors_of_the_original,
        "_load_ip_adapter_weights": _before_ip_adapter,
        "set_attn_processor": _before_processors,
    }
    return {name: _guarded(getattr(base, name), check) for name, check in guards.items() if hasattr(base, name)}


def _guarded(method, check):
    @wraps(method)
    def guarded(self, *args, **kwargs):
        check(self, *args, **kwargs)
        return method(self, *args, **kwargs)

    return guarded


def guard_flux_loader(pruned: type) -> None:
    """Make diffusers' loader of FLUX LoRAs check those for models of the class ``pruned``.

    It widens layers to the LoRA's shapes before it calls the model at all (for control LoRAs, which add channels to the
    input), so that the check in `guarded_methods` would come too late.
    """
    try:
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
        if isinstance(transformer, pruned):
            check_lora(transformer, _without_prefix(lora_state_dict or {}, cls.transformer_name))
        return original(cls, transformer, lora_state_dict, *args, **kwargs)

    vars(checked)["of_ecodiff"] = True
    setattr(loader, name, classmethod(checked))


def check_lora(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Raise EcoDiffError where a LoRA (or LoKr) has other widths than the model's layers, or layers that were removed.

    state_dict: {layer.lora_A.weight: [rank, in], layer.lora_B.weight: [out, rank], ...}, also under diffusers' older
    names. Layers that neither this model nor its original has are left to diffusers, which warns of them.
    """
    widths = _widths(_peft_names(state_dict))
    modules = dict(model.named_modules())
    for layer, given in widths.items():
        gone = _emptied(layer, modules)
        if gone is not None:
            raise EcoDiffError(
                f"This LoRA has weights for {layer!r}, but {gone!r} has no units left in this {type(model).__name__}. "
                f"{_UNTIL}"
            )
        module = modules.get(layer)
        if module is None:
            continue
        if type(module).__name__ == "ScatteredLinear":
            raise EcoDiffError(
                f"This LoRA has weights for {layer!r}, some of whose channels were removed in this "
                f"{type(model).__name__}. {_UNTIL}"
            )
        for side, width in given.items():
            own = _own_width(module, side)
            if own is not None and own != width:
                raise EcoDiffError(
                    f"This LoRA does not fit {layer!r} of this {type(model).__name__}: it has {width} {side}put "
                    f"channels, the layer {own}. {_UNTIL}"
                )


def _before_lora(model, pretrained_model_name_or_path_or_dict, prefix="transformer", hotswap=False, **kwargs) -> None:
    state_dict = pretrained_model_name_or_path_or_dict
    if not isinstance(state_dict, Mapping):
        from diffusers.loaders.lora_base import _fetch_state_dict

        # A private function whose parameters change with versions of diffusers: None for those not known here.
        parameters = inspect.signature(_fetch_state_dict).parameters
        arguments = dict.fromkeys(parameters)
        arguments |= {key: value for key, value in kwargs.items() if key in parameters}
        arguments |= {"pretrained_model_name_or_path_or_dict": state_dict, "allow_pickle": False}
        arguments["user_agent"] = {"file_type": "attn_procs_weights", "framework": "pytorch"}
        state_dict = _fetch_state_dict(**arguments)
        if isinstance(state_dict, tuple):  # newer versions return metadata beside it
            state_dict = state_dict[0]
    check_lora(model, _without_prefix(state_dict, prefix))


def _before_new_adapter(model, adapter_config, *args, **kwargs) -> None:
    scattered = [name for name, module in model.named_modules() if type(module).__name__ == "ScatteredLinear"]
    if not scattered or not hasattr(adapter_config, "target_modules"):
        return
    from peft.tuners.tuners_utils import check_target_module_exists

    for name in scattered:
        if check_target_module_exists(adapter_config, name):
            raise EcoDiffError(
                f"add_adapter: some channels of {name!r} were removed, and peft has no adapters for what is left: "
                "leave it out of target_modules."
            )


def _before_ip_adapter(model, *args, **kwargs) -> None:
    site = _pruned_attention(model)
    if site is not None:
        raise EcoDiffError(
            f"An IP-Adapter of the original does not fit this {type(model).__name__}: it is built for all heads, and "
            f"{site!r} has fewer. Use it with the original model, or prune feed-forwards only."
        )


def _before_processors_of_the_original(model, *args, **kwargs) -> None:
    site = _pruned_attention(model)
    if site is not None:
        raise EcoDiffError(
            f"load_attn_procs: attention processors of the original do not fit this {type(model).__name__}: they are "
            f"built for all heads, and {site!r} has fewer. For a LoRA that was trained for the pruned model take "
            "load_lora_adapter."
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
        for part, layer in one.named_modules():
            splits = any(_SPLIT_INTO_HEADS.match(piece) for piece in part.split("."))
            if splits and isinstance(layer, nn.Linear) and layer.out_features != width:
                raise EcoDiffError(
                    f"set_attn_processor: {part!r} of {type(one).__name__} for {name!r} gives {layer.out_features} "
                    f"channels, but the heads left there have {width}. {_UNTIL}"
                )


def _pruned_attention(model) -> str | None:
    """The name of an attention that has lost heads; None where all have all."""
    for name in model.config.get("pruned_units", {}):
        module = _submodule(model, name)
        if hasattr(module, "to_q") or isinstance(module, EmptiedAttention):
            return name
    return None


def _emptied(layer: str, modules: Mapping[str, nn.Module]) -> str | None:
    """The part without units whose layer this was, if it was and is no more."""
    if layer in modules and not is_emptied(modules[layer]):
        return None
    name = layer
    while "." in name and name not in modules:  # up to the nearest module that is there
        name = name.rpartition(".")[0]
    if name in modules and is_emptied(modules[name]):
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
