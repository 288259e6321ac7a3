"""The pruned classes: ordinary diffusers models whose config says how many units each site kept."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import cache, wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ecodiff.errors import EcoDiffError
from ecodiff.pipelines.endings import FAULTS
from ecodiff.pipelines.loading import align, check_counts, check_dtypes
from ecodiff.pipelines.parts import plain_module
from ecodiff.storage.saving import finish_interrupted, whole

from .adapters import guard_flux_loader, guarded_methods
from .emptied import emptied, form_of
from .kept import ENTRIES, kept_entries, mask_of_config
from .layers import EmptiedLayer, cut_layer
from .sites import (
    HEADS,
    KEY_HEADS,
    KINDS,
    Site,
    find_sites,
    returned_channels,
)

if TYPE_CHECKING:  # always mixed into a model class of diffusers
    from diffusers import ModelMixin as _Model
else:
    _Model = object


class PrunedMixin(_Model):
    """What `Pruned<Class>` adds to a diffusers model class: shapes from the config, and no weights but saved ones."""

    @classmethod
    def from_config(cls, config=None, return_unused_kwargs=False, **kwargs):
        config = kwargs.pop("pretrained_model_name_or_path", config)
        if config is None:
            return super().from_config(None)  # diffusers' error
        if not isinstance(config, dict):  # a folder or an id, which diffusers still takes
            config, kwargs = cls.load_config(config, return_unused_kwargs=True, **kwargs)
        config = dict(config)
        told = {name: config.pop(name) for name in ENTRIES if name in config}
        check_counts(config, "config.json")
        try:
            model, unused = super().from_config(config, return_unused_kwargs=True, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except FAULTS as error:  # of a value that the class cannot be made with
            raise EcoDiffError(
                f"config.json: no {cls.__name__} can be made of it ({error}); was it changed?"
            ) from error
        sites = find_sites(model, KINDS)
        mask, _ = mask_of_config(told, sites)
        cut_units(model, sites, {name: mask[name] for name in told.get("pruned_units", {})})
        model.register_to_config(**{"pruned_units": {}, **told})
        if return_unused_kwargs:
            return model, unused
        return model

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *, output_loading_info=False, **kwargs):
        """diffusers' own, with every weight from the files, moved to aligned memory.

        diffusers gives weights that are not in the files random values, with a warning. Here that is an EcoDiffError,
        as are weights that the model does not have and weights of other shapes (those pass with
        `ignore_mismatched_sizes=True`). What a killed save left in the folder is tidied first.

        The loader leaves tensors where they lie in the file. Odd numbers of units put them at odd addresses, where CPU
        kernels are slower and round differently: images would not be bit for bit those of the model that was saved.
        """
        place = os.path.join(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
        if os.path.isdir(place):
            finish_interrupted(place)
        try:
            model, info = super().from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
        except (EcoDiffError, torch.OutOfMemoryError):
            raise
        except (OSError, *FAULTS) as error:
            # diffusers has no class for weights of other shapes: only its words tell this error from others.
            if re.search("shape|size mismatch", str(error)):
                raise EcoDiffError(_other_weights(place, cls, f"do not fit its config.json ({error})")) from error
            if not os.path.isdir(place):  # of the Hub, such as a name that is not there
                raise
            said = " ".join(str(error).split())
            raise EcoDiffError(f"{place}: no {cls.__name__} can be loaded from this folder ({said})."[:1000]) from error
        _check_loaded(place, model, info, kwargs)
        check_dtypes(place, model)
        align(model)
        if output_loading_info:
            return model, info
        return model

    def _fix_state_dict_keys_on_load(self, state_dict) -> None:
        """Also leave out the empty weights that earlier folders have for layers without units."""
        super()._fix_state_dict_keys_on_load(state_dict)
        for name, module in self.named_modules():
            if isinstance(module, EmptiedLayer):
                for part in ("weight", "bias", "index"):
                    tensor = state_dict.get(f"{name}.{part}")
                    if tensor is not None and not tensor.numel():
                        del state_dict[f"{name}.{part}"]


@cache
def pruned_class(name: str) -> type:
    """The pruned class of the diffusers model class `name`, also to be had as `ecodiff.Pruned<name>`."""
    import diffusers

    base: Any = getattr(diffusers, name, None)
    is_model = isinstance(base, type) and issubclass(base, diffusers.ModelMixin)
    if not is_model:
        raise EcoDiffError(f"{name} is not a model class of diffusers, so there is no Pruned{name}.")

    _save_pruned_pipelines_whole()
    body = {
        "__module__": "ecodiff",
        "__doc__": f"{name} with units removed.",
        "save_pretrained": whole(base.save_pretrained),
    }
    cls = type(f"Pruned{name}", (PrunedMixin, base), body | guarded_methods(base))
    guard_flux_loader(PrunedMixin)
    try:  # diffusers finds the rule for LoRA scales by class name
        from diffusers.loaders.peft import _SET_ADAPTER_SCALE_FN_MAPPING as rules
    except ImportError:
        return cls
    if name in rules:
        rules[cls.__name__] = rules[name]
    return cls


def cut_units(model: nn.Module, sites: Mapping[str, Site], mask: Mapping[str, Tensor]) -> None:
    """Remove the units whose mask is False from the model, in place; works on real and on meta tensors."""
    forms = {}
    for name, keep in mask.items():
        if sites[name].kind == "attention" and not keep.any():
            forms[name] = form_of(model.get_submodule(name))
            if not forms[name]:
                raise EcoDiffError(f"{name}: keep at least one head; what its processor returns without is not known.")
    for (layer, dimension), entries in kept_entries(model, sites, mask).items():
        _cut(model, layer, dimension, entries)

    for name, keep in mask.items():
        site, module = sites[name], model.get_submodule(name)
        if site.kind == "attention":
            for span in site.selects:
                norm = model.get_submodule(span.layer)
                _replace(model, span.layer, SelectedNorm.of(norm, keep.repeat_interleave(span.size)))
            _set_heads(module, int(keep.sum()), site)
            if not keep.any():
                _replace(model, name, emptied(module, forms[name]))
        elif site.kind == "modulation":
            if keep.any():
                _replace(model, f"{name}.linear", ScatteredLinear(module.linear, keep))
            else:  # it writes zeros, as wide as ever
                module.linear.out_features = keep.numel()
        else:
            owner = model.get_submodule(name.rpartition(".")[0])
            if isinstance(getattr(owner, "mlp_hidden_dim", None), int):  # some blocks split what is written by it
                owner.mlp_hidden_dim = int(keep.sum())


def _cut(model: nn.Module, name: str, dimension: int, entries: Tensor) -> None:
    """Keep some rows (dimension 0) or columns (1) of a layer. Without columns it is its bias, without rows nothing."""
    layer = model.get_submodule(name)
    blocks = getattr(layer, "_tp_packed_row_blocks", None)  # FLUX: how tensor parallelism splits proj_out
    if blocks:
        layer._tp_packed_row_blocks = [int(block.sum()) for block in entries.split(blocks)]
    cut_layer(layer, dimension, entries)
    if not entries.any():
        _replace(model, name, EmptiedLayer(layer))


# What attentions keep that follows from their heads: the number of heads, or of channels of all heads.
_NUMBERS_OF_HEADS = (*HEADS, *KEY_HEADS, "sliceable_head_dim")
_NUMBERS_OF_CHANNELS = ("inner_dim", "inner_kv_dim", "kv_inner_dim", "out_dim")


def _set_heads(attention: nn.Module, units: int, site: Site) -> None:
    """Tell the attention module how many heads are left; its processors reshape by these numbers."""
    for name in (*_NUMBERS_OF_HEADS, *_NUMBERS_OF_CHANNELS):
        number = getattr(attention, name, None)
        # OmniGen reshapes what its heads return by `out_dim`; with all heads this is their width as well.
        if isinstance(number, int) and number % site.units == 0:
            setattr(attention, name, number // site.units * units)
    if type(getattr(attention, "processor", None)).__name__ == "AttnAddedKVProcessor2_0":
        # It reshapes by the width of its input. The older one does the same by what its heads return.
        from diffusers.models.attention_processor import AttnAddedKVProcessor

        attention.processor = AttnAddedKVProcessor()
    if site.selects and not any(hook is _select_positions for hook in attention._forward_pre_hooks.values()):
        attention.register_forward_pre_hook(_select_positions, with_kwargs=True)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of another; hooks of the user's and the mode stay."""
    owner, _, leaf = name.rpartition(".")
    before = model.get_submodule(name)
    for key, value in vars(before).items():
        if "_hooks" in key or key == "training":
            module.__dict__[key] = value
    setattr(model.get_submodule(owner), leaf, module)


class ScatteredLinear(nn.Linear):
    """A linear layer with some output channels left, put back in their places; the others are zero.

    Its weight has the rows that are left, and `out_features` counts all: what an adapter beside it adds is as wide as
    what it returns.
    """

    def __init__(self, linear: nn.Linear, keep: Tensor):
        nn.Module.__init__(self)  # no weights are made
        self.in_features, self.out_features = linear.in_features, keep.numel()
        self.weight, self.bias = linear.weight, linear.bias
        self.register_buffer("index", keep.nonzero().flatten().to(linear.weight.device))

    def places_are_right(self) -> bool:
        """Whether each channel that is left has a place of its own."""
        return _ascending(self.index, self.out_features)

    def forward(self, x: Tensor) -> Tensor:
        kept = nn.functional.linear(x, self.weight, self.bias)
        return kept.new_zeros(*kept.shape[:-1], self.out_features).index_copy(-1, self.index, kept)


class SelectedNorm(nn.Module):
    """A norm over the queries or keys of all heads, of which those of the heads that are left are returned.

    What the norm divides by depends on every channel, so none of its inputs can go.
    """

    def __init__(self, norm: nn.Module, index: Tensor):
        super().__init__()
        self.norm = norm
        self.register_buffer("index", index)

    @classmethod
    def of(cls, norm: nn.Module, keep: Tensor) -> SelectedNorm:
        """A norm that returns the channels ``keep`` of what the given one returns, which may be such a norm."""
        device = next((tensor.device for tensor in norm.parameters()), keep.device)
        left = keep.nonzero().flatten().to(device)
        if isinstance(norm, SelectedNorm):
            return cls(norm.norm, norm.index[left])
        return cls(norm, left)

    @property
    def normalized_shape(self):
        """That of the norm."""
        return getattr(self.norm, "normalized_shape", None)

    @property
    def weight(self) -> Tensor | None:
        """That of the norm."""
        return getattr(self.norm, "weight", None)

    @property
    def channels(self) -> int:
        """Channels that the norm sees."""
        return self.normalized_shape[-1] if self.weight is None else self.weight.numel()

    def places_are_right(self) -> bool:
        """Whether each channel that is returned is another one of those that there are."""
        return _ascending(self.index, self.channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)[..., self.index]


def _ascending(index: Tensor, end: int) -> bool:
    """Whether these are different places below ``end``, in order."""
    index = index.cpu()
    return bool((index[1:] > index[:-1]).all()) and bool(((index >= 0) & (index < end)).all())


def _select_positions(attention: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Positions that hold a number for each channel of each head (LTX), or for each head: those of heads that are left.

    A hook of attentions with a `SelectedNorm`. Positions that all heads share pass as they are.
    """
    norms = {name: norm for name, norm in attention.named_children() if isinstance(norm, SelectedNorm)}
    if not norms:
        return args, kwargs
    norm = next(iter(norms.values()))
    whole, left = norm.channels, returned_channels(norm)
    heads = next(getattr(attention, name) for name in HEADS if hasattr(attention, name))
    head_dim = left // heads

    def selected(value):
        if isinstance(value, (tuple, list)):
            return type(value)(selected(part) for part in value)
        if not isinstance(value, Tensor):
            return value
        if value.shape[-1] == whole:
            return value[..., norm.index]
        if value.ndim == 4 and value.shape[1] * head_dim == whole and value.shape[1] > 1:
            return value[:, norm.index[::head_dim] // head_dim]
        return value

    return args, {key: selected(value) if "rotary" in key else value for key, value in kwargs.items()}


def _check_loaded(place: str, model: nn.Module, info: Mapping, options: Mapping) -> None:
    """Raise EcoDiffError where a weight of the model did not come from its files."""
    quantized = getattr(model, "hf_quantizer", None) is not None  # has tensors under names of its own
    missing = sorted(info.get("missing_keys", ()))
    if options.get("device_map") is None and not quantized:
        # What an index file names but no weight file holds is none of diffusers' missing keys; it stays a meta tensor.
        tensors = (*model.named_parameters(), *model.named_buffers())
        missing += [name for name, tensor in tensors if tensor.is_meta and name not in missing]
    if missing:
        raise EcoDiffError(_other_weights(place, type(model), f"lack {len(missing)} tensors, such as {missing[0]!r}"))
    unexpected = sorted(info.get("unexpected_keys", ()))
    if unexpected and not quantized:
        what = f"have {len(unexpected)} tensors that its config.json does not know, such as {unexpected[0]!r}"
        raise EcoDiffError(_other_weights(place, type(model), what))
    for name, module in model.named_modules():
        placed = isinstance(module, (ScatteredLinear, SelectedNorm))
        if placed and not module.index.is_meta and not module.places_are_right():
            what = f"put channels of {name!r} where there are none, or two in one place"
            raise EcoDiffError(_other_weights(place, type(model), what))


def _other_weights(place: str, cls: type, what: str) -> str:
    return f"{place}: the weights of this {cls.__name__} {what}; save it again, or fetch the folder anew."


@cache
def _save_pruned_pipelines_whole() -> None:
    """From now on diffusers' `save_pretrained` is all or nothing for pipelines that hold a pruned denoiser.

    This changes a method of diffusers. Nothing less reaches every such pipeline: a pruned pipeline is of diffusers' own
    class, so that copies of it, pipelines made of its components and loaded ones have no other method than that class
    gives them. Pipelines without a pruned denoiser are saved as diffusers saves them.
    """
    from diffusers import DiffusionPipeline

    by_diffusers = DiffusionPipeline.save_pretrained
    all_or_nothing = whole(by_diffusers)

    @wraps(by_diffusers)
    def save_pretrained(self, *args, **kwargs):
        pruned = any(isinstance(plain_module(part), PrunedMixin) for part in vars(self).values())
        method = all_or_nothing if pruned else by_diffusers
        return method(self, *args, **kwargs)

    vars(save_pretrained)["of_library"] = by_diffusers
    DiffusionPipeline.save_pretrained = save_pretrained
