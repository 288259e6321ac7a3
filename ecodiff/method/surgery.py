"""From a mask to a smaller model: units are cut out of the weights, and the result is an ordinary diffusers pipeline.

Masked and removed models agree to rounding for every site, also where no unit is left: such a module keeps the bias of
its output layer and does no other work.

The denoiser of a pruned pipeline is an instance of `Pruned<Class>`, a subclass of its diffusers class made on demand.
Its config.json has one entry more, `pruned_units`: {site name: units kept}. That is all `from_pretrained` needs to give
the layers their shapes before the weights arrive; which channels of a modulation layer are left is in the weights file.
diffusers takes component classes from other libraries only once those are imported: `import ecodiff` first (quick), or
load with `ecodiff.load`.
"""

from __future__ import annotations

import copy
import os
import re
import warnings
from collections.abc import Mapping
from functools import cache, wraps

import torch
from torch import Tensor, nn

from ecodiff.errors import EcoDiffError
from ecodiff.pipelines.loading import (
    Experts,
    align,
    denoisers,
    experts,
    plain_module,
    plain_name,
    with_denoiser,
)
from ecodiff.pipelines.loading import denoiser as find_denoiser
from ecodiff.pipelines.running import without_adapters
from ecodiff.storage.saving import finish_interrupted, whole

from .adapters import guard_flux_loader, guarded_methods
from .carried import (
    COMPILED,
    all_tensors,
    carry_casting,
    carry_over,
    carry_pipeline,
    kept_elsewhere,
    refuse_elsewhere,
)
from .gates import check_units
from .sites import KINDS, Site, find_sites, skipped_modules

# How attention processors call and what they return decides what may stand in for an attention without heads.
_ONE_OUTPUT = {
    "AttnProcessor",
    "AttnProcessor2_0",
    "SlicedAttnProcessor",
    "XFormersAttnProcessor",
    "SanaLinearAttnProcessor2_0",
}
_TWO_OUTPUTS = {"JointAttnProcessor2_0", "XFormersJointAttnProcessor", "FluxAttnProcessor", "FluxAttnProcessor2_0"}


def prune(pipe, mask: Mapping[str, Tensor]):
    """Return a pipeline of the same class whose denoiser lacks the masked units; all other components are shared.

    mask: {site name: bool tensor [units]}, True = keep; sites it does not name stay whole.
    The original is not touched and shares no weights of the denoiser with the result. Dtype and device stay, and so
    does what is neither config nor weight: FreeU, attention processors, patched methods, hooks, gradient checkpointing,
    modes, layerwise casting. One warning names what could not be carried over (`ecodiff.method.carried`). Weights that
    offloading keeps elsewhere are fetched. The result's `save_pretrained` is all or nothing (see `save`), and so is
    that of every pipeline that holds its denoiser. A pruned pipeline can be pruned again (its modulation layers
    excepted).

    Raises EcoDiffError for unknown sites, wrong lengths or dtypes, a denoiser with adapters or with other layers than
    its class makes, weights that are not there (meta device), and for an attention whose processor is unknown here and
    that would lose its last head.
    """
    denoiser = find_denoiser(pipe)
    smaller, missing = _smaller(denoiser, mask)
    if kept_elsewhere(smaller):
        raise EcoDiffError(
            f"prune: the weights of this {type(denoiser).__name__} are on the meta device: load the pipeline with them."
        )
    pruned = with_denoiser(pipe, smaller)
    for original, pruned_network in zip(experts(denoiser), experts(smaller), strict=True):
        missing += carry_pipeline(pipe, pruned, original, pruned_network)
    if any(getattr(pipe, name) is not network for name, network in denoisers(pipe).items()):
        missing.append(COMPILED)
    _warn(missing)
    return pruned


def prune_denoiser(denoiser: nn.Module, mask: Mapping[str, Tensor]) -> nn.Module:
    """`prune` for a denoiser by itself: a smaller copy. One that is on the meta device gives one that is, too."""
    denoiser = plain_module(denoiser)
    smaller, missing = _smaller(denoiser, mask)
    _warn(missing)
    return smaller


def _warn(missing: list[str]) -> None:
    """One warning that names what a pruned model lacks; nothing where it lacks nothing."""
    if missing:
        warnings.warn(
            "prune: the pruned model draws and trains like the original but for this, which is neither config nor "
            f"weight and was not carried over: {'; '.join(missing)}.",
            stacklevel=3,
        )


def check_prunable(denoiser: nn.Module, caller: str) -> None:
    """Raise EcoDiffError, in the name of ``caller``, for a denoiser that `prune` would refuse whatever the mask: for
    those who spend hours on the mask first."""
    for network in experts(denoiser):
        _unpruned(network, caller)


def _unpruned(denoiser: nn.Module, caller: str) -> nn.Module:
    """A pruned class's model without units removed yet: layers of the denoiser's config, which borrow its tensors.

    Raises EcoDiffError where the denoiser has other layers than its config makes, or not all of its weights.
    """
    from accelerate import init_empty_weights

    if not hasattr(denoiser, "config"):
        raise EcoDiffError(f"{caller}: {type(denoiser).__name__} is not a diffusers model.")
    without_adapters(denoiser, caller)
    tensors = all_tensors(denoiser)
    absent = [name for name, tensor in tensors.items() if tensor.is_meta]
    if absent and len(absent) < len(tensors):
        raise EcoDiffError(
            f"{caller}: the weights of {absent[0]!r} and {len(absent) - 1} others are on the meta device, and no hook "
            "says where they are: load the pipeline with them."
        )
    with init_empty_weights():
        pruned = _pruned_like(type(denoiser)).from_config(dict(denoiser.config))
    state = {plain_name(name): value for name, value in denoiser.state_dict().items()}
    state = {name: tensors[name].detach() if name in tensors else value for name, value in state.items()}
    try:
        pruned.load_state_dict(state, assign=True)
        for name, _ in denoiser.named_buffers():
            owner, _, leaf = plain_name(name).rpartition(".")
            pruned.get_submodule(owner)._buffers[leaf] = tensors[plain_name(name)]
    except (RuntimeError, AttributeError) as error:
        raise EcoDiffError(
            f"{caller}: {type(denoiser).__name__} has other layers than its class makes, such as fused projections or "
            f"those of an IP-Adapter: undo that first ({str(error).splitlines()[-1].strip()[:200]})."
        ) from error
    return pruned


def _smaller(denoiser: nn.Module, mask: Mapping[str, Tensor]) -> tuple[nn.Module, list[str]]:
    """The pruned denoiser, and what could not be carried over to it, in words."""
    if isinstance(denoiser, Experts):
        _check_mask(mask, find_sites(denoiser, KINDS), skipped_modules(denoiser))  # by the names that it was given
        lacking: list[str] = []

        def smaller_expert(network: nn.Module, part: dict) -> nn.Module:
            smaller, missing = _smaller(network, part)
            lacking.extend(missing)
            return smaller

        return denoiser.each(smaller_expert, mask), lacking
    if not hasattr(denoiser, "config"):
        raise EcoDiffError(f"prune: {type(denoiser).__name__} is not a diffusers model.")
    without_adapters(denoiser, "prune")
    sites = find_sites(denoiser, KINDS)
    _check_mask(mask, sites, skipped_modules(denoiser))
    removing = {name: int(keep.sum()) for name, keep in mask.items() if not keep.all()}

    # Same shapes as the original up to here: borrow its tensors, cut them, then copy what is still shared.
    pruned = _unpruned(denoiser, "prune")
    missing = carry_over(denoiser, pruned)
    patched = [name for name, module in pruned.named_modules() if "forward" in vars(module)]
    _cut(pruned, sites, {name: mask[name].cpu() for name in removing})
    modules = dict(pruned.named_modules())
    missing += [
        f"the patched forward of {name}, which has no units left"
        for name in patched
        if name in modules and "forward" not in vars(modules[name])
    ]
    pruned._apply(lambda tensor: tensor.detach().clone())
    carry_casting(denoiser, pruned)
    pruned.register_to_config(pruned_units={**denoiser.config.get("pruned_units", {}), **removing})
    trained = {plain_name(name) for name, parameter in denoiser.named_parameters() if parameter.requires_grad}
    for name, parameter in pruned.named_parameters():
        parameter.requires_grad_(name in trained)
    return pruned, missing


def fold_gates(pipe, gates: Mapping[str, Tensor]):
    """A pipeline (a copy of the denoiser; the rest is shared) whose weights have these gates in them (Eq. 9, 10).

    gates: {site name: float tensor [units]}. The columns that read a unit are multiplied by its gate, so that it draws
    what the original draws under `apply_gates`, to rounding. Raises EcoDiffError for unknown sites, wrong lengths, and
    sites that no layer reads.
    """
    refuse_elsewhere(find_denoiser(pipe), "fold_gates")
    folded = copy.deepcopy(find_denoiser(pipe))
    sites = find_sites(folded, KINDS)
    check_units(gates, sites, "fold_gates")
    for name, gate in gates.items():
        if not sites[name].readers:
            raise EcoDiffError(f"fold_gates: {name!r} has units that no layer reads: leave this site out.")
        for span in sites[name].readers:
            weight = folded.get_submodule(span.layer).weight
            channels = gate.to(weight.device, weight.dtype).repeat_interleave(span.size)
            with torch.no_grad():
                weight[:, span.offset : span.offset + len(channels)] *= channels
    return with_denoiser(pipe, folded)


def save(pipe, save_directory: str | os.PathLike, *args, **kwargs) -> None:
    """`save_pretrained` of any pipeline or model, with the same arguments, all or nothing.

    The files that this save writes are replaced together; killed at any moment, the folder holds the earlier model or
    the new one. Everything else in the folder stays, except weight files that would load in the place of the new ones
    (shards of an earlier save and their index). Links to folders are followed; a file that is a link is replaced by a
    file, and what it led to stays. `push_to_hub=True` uploads once the files are in their places, and leaves a
    README.md that is there already. What a killed save leaves is tidied by the next save into the folder, by `load`,
    and when a pruned denoiser loads from it.

    Raises EcoDiffError where writing fails (disk full, no permission, a file where a folder should be), with the folder
    as it was; and for `safe_serialization=False`, as pickle files are never written.
    """
    whole(type(pipe).save_pretrained)(pipe, save_directory, *args, **kwargs)


class _Pruned:
    """What `Pruned<Class>` adds to a diffusers model class: shapes from the config, and no weights but saved ones."""

    @classmethod
    def from_config(cls, config=None, return_unused_kwargs=False, **kwargs):
        config = kwargs.pop("pretrained_model_name_or_path", config)
        if config is None:
            return super().from_config(None)  # diffusers' error
        if not isinstance(config, dict):  # a folder or an id, which diffusers still takes
            config, kwargs = cls.load_config(config, return_unused_kwargs=True, **kwargs)
        config = dict(config)
        kept = dict(config.pop("pruned_units", {}))
        model, unused = super().from_config(config, return_unused_kwargs=True, **kwargs)
        sites = find_sites(model, KINDS)
        for name, units in kept.items():
            if name not in sites or not isinstance(units, int) or not 0 <= units <= sites[name].units:
                raise EcoDiffError(
                    f"config.json: pruned_units: {name!r} cannot keep {units!r} units; was the file changed?"
                )
        # Which units does not matter here: the weights that are about to be loaded are cut already.
        _cut(
            model, sites, {name: torch.arange(sites[name].units, device="cpu") < units for name, units in kept.items()}
        )
        model.register_to_config(pruned_units=kept)
        return (model, unused) if return_unused_kwargs else model

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *, output_loading_info=False, **kwargs):
        """diffusers' own, with every weight from the files, moved to aligned memory.

        diffusers gives weights that are not in the files random values, with a warning. Here that is an EcoDiffError,
        as are weights that the model does not have and weights of other shapes (those pass with
        `ignore_mismatched_sizes=True`). What a killed save left in the folder is tidied first.

        The loader leaves tensors where they lie in the file. Odd numbers of units put them at odd addresses, where CPU
        kernels are slower and round differently: pictures would not be bit for bit those of the model that was saved.
        """
        place = os.path.join(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
        if os.path.isdir(place):
            finish_interrupted(place)
        try:
            model, info = super().from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
        except (RuntimeError, ValueError) as error:
            if isinstance(error, EcoDiffError) or not re.search("shape|size mismatch", str(error)):
                raise
            raise EcoDiffError(_other_weights(place, cls, f"do not fit its config.json ({error})")) from error
        _check_loaded(place, model, info, kwargs)
        align(model)
        return (model, info) if output_loading_info else model


def _check_loaded(place: str, model: nn.Module, info: Mapping, options: Mapping) -> None:
    """Raise EcoDiffError where a weight of the model did not come from its files."""
    quantized = getattr(model, "hf_quantizer", None) is not None  # has tensors under names of its own
    missing = sorted(info.get("missing_keys", ()))
    if options.get("device_map") is None and not quantized:
        tensors = (*model.named_parameters(), *model.named_buffers())
        named_in_an_index_only = [name for name, tensor in tensors if tensor.is_meta and name not in missing]
        missing += named_in_an_index_only
    if missing:
        raise EcoDiffError(_other_weights(place, type(model), f"lack {len(missing)} tensors, such as {missing[0]!r}"))
    unexpected = sorted(info.get("unexpected_keys", ()))
    if unexpected and not quantized:
        what = f"have {len(unexpected)} tensors that its config.json does not know, such as {unexpected[0]!r}"
        raise EcoDiffError(_other_weights(place, type(model), what))
    for name, module in model.named_modules():
        if isinstance(module, ScatteredLinear) and not module.index.is_meta and not module.places_are_right():
            what = f"put channels of {name!r} where there are none, or two in one place"
            raise EcoDiffError(_other_weights(place, type(model), what))


def _other_weights(place: str, cls: type, what: str) -> str:
    return f"{place}: the weights of this {cls.__name__} {what}; save it again, or fetch the folder anew."


@cache
def pruned_class(name: str) -> type:
    """The pruned class of the diffusers model class `name`, also to be had as `ecodiff.Pruned<name>`."""
    import diffusers

    base = getattr(diffusers, name, None)
    if not (isinstance(base, type) and issubclass(base, diffusers.ModelMixin)):
        raise EcoDiffError(f"{name} is not a model class of diffusers, so there is no Pruned{name}.")

    _save_pruned_pipelines_whole()
    body = {
        "__module__": "ecodiff",
        "__doc__": f"{name} with units removed.",
        "save_pretrained": whole(base.save_pretrained),
    }
    cls = type(f"Pruned{name}", (_Pruned, base), body | guarded_methods(base))
    guard_flux_loader(_Pruned)
    try:  # diffusers finds the rule for LoRA scales by class name
        from diffusers.loaders.peft import _SET_ADAPTER_SCALE_FN_MAPPING as rules
    except ImportError:
        return cls
    if name in rules:
        rules[cls.__name__] = rules[name]
    return cls


def _pruned_like(cls: type) -> type:
    """The pruned class for a denoiser's class: of a diffusers class or, for a user's subclass of one, a subclass of
    both, so that the user's own methods act in the pruned model as well."""
    import diffusers

    if cls.__name__.startswith("Pruned") and issubclass(cls, _Pruned):
        return cls
    for base in cls.__mro__:
        if getattr(diffusers, base.__name__, None) is base and issubclass(base, diffusers.ModelMixin):
            pruned = pruned_class(base.__name__)
            return pruned if base is cls else type(pruned.__name__, (pruned, cls), {"__module__": "ecodiff"})
    return pruned_class(cls.__name__)  # which says that there is none


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
        pruned = any(isinstance(plain_module(part), _Pruned) for part in vars(self).values())
        method = all_or_nothing if pruned else by_diffusers
        return method(self, *args, **kwargs)

    save_pretrained.of_library = by_diffusers
    DiffusionPipeline.save_pretrained = save_pretrained


def _cut(model: nn.Module, sites: Mapping[str, Site], mask: Mapping[str, Tensor]) -> None:
    """Remove the units whose mask is False from the model, in place; works on real and on meta tensors."""
    kept: dict[tuple[str, int], Tensor] = {}  # (layer, dimension of its weight) -> which entries stay
    for name, keep in mask.items():
        for dimension, spans in enumerate((sites[name].writers, sites[name].readers)):
            for span in spans:
                width = model.get_submodule(span.layer).weight.shape[dimension]
                entries = kept.setdefault((span.layer, dimension), torch.ones(width, dtype=torch.bool, device="cpu"))
                entries[span.offset : span.offset + keep.numel() * span.size] = keep.repeat_interleave(span.size)
    for (layer, dimension), entries in kept.items():
        _cut_linear(model.get_submodule(layer), dimension, entries)

    for name, keep in mask.items():
        site, module = sites[name], model.get_submodule(name)
        if site.kind == "attention":
            _set_heads(module, int(keep.sum()), site)
            if not keep.any():
                _replace(model, name, NoHeads(name, module))
        elif site.kind == "modulation":
            _replace(model, f"{name}.linear", ScatteredLinear(module.linear, keep))


def _cut_linear(linear: nn.Linear, dimension: int, entries: Tensor) -> None:
    """Keep some rows (dimension 0) or columns (1). Left with no column a layer is its bias, with no row nothing."""

    def cut(parameter, dimension):
        index = entries.nonzero().flatten().to(parameter.device)
        return nn.Parameter(parameter.detach().index_select(dimension, index), parameter.requires_grad)

    if blocks := getattr(linear, "_tp_packed_row_blocks", None):  # FLUX: how tensor parallelism splits proj_out
        linear._tp_packed_row_blocks = [int(block.sum()) for block in entries.split(blocks)]
    linear.weight = cut(linear.weight, dimension)
    if dimension == 0 and linear.bias is not None:
        linear.bias = cut(linear.bias, 0)
    linear.out_features, linear.in_features = linear.weight.shape


def _set_heads(attention: nn.Module, units: int, site: Site) -> None:
    """Tell the attention module how many heads are left; its processors reshape by these numbers."""
    attention.heads = attention.heads // site.units * units
    attention.inner_dim = attention.to_q.out_features
    for name, value in (("inner_kv_dim", "to_k"), ("sliceable_head_dim", None)):
        if hasattr(attention, name):
            layer = getattr(attention, value, None) if value else None
            setattr(attention, name, attention.heads if value is None else getattr(layer, "out_features", 0))


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of another; hooks of the user's and the mode stay."""
    owner, _, leaf = name.rpartition(".")
    before = model.get_submodule(name)
    for key, value in vars(before).items():
        if "_hooks" in key or key == "training":
            module.__dict__[key] = value
    setattr(model.get_submodule(owner), leaf, module)


class NoHeads(nn.Module):
    """An attention without heads: nothing is attended to, the output layers add their bias.

    Returns what the attention's own processor would: one output, or two (image, text) in joint attention.
    """

    def __init__(self, name: str, attention: nn.Module):
        super().__init__()
        processor = type(attention.processor).__name__
        if processor not in _ONE_OUTPUT | _TWO_OUTPUTS:
            raise EcoDiffError(
                f"{name}: keep at least one head; what {processor} returns without heads is not known here."
            )
        self.joint = processor in _TWO_OUTPUTS
        self.to_out = getattr(attention, "to_out", None)  # None in a parallel block, whose proj_out reads what is left
        self.to_add_out = getattr(attention, "to_add_out", None)
        self.residual_connection = getattr(attention, "residual_connection", False)
        self.rescale_output_factor = getattr(attention, "rescale_output_factor", 1.0)

    def forward(self, hidden_states, encoder_hidden_states=None, *args, **kwargs):
        no_channels = hidden_states[..., :0]
        if self.to_out is None:
            return no_channels
        if hidden_states.ndim == 4:  # pictures, channels first
            no_channels = hidden_states.movedim(1, -1)[..., :0]
        output = self.to_out[1](self.to_out[0](no_channels))
        if hidden_states.ndim == 4:
            output = output.movedim(-1, 1)
        if self.residual_connection:
            output = output + hidden_states
        output = output / self.rescale_output_factor
        if not self.joint or encoder_hidden_states is None:
            return output
        context = encoder_hidden_states[..., :0]
        return output, context if self.to_add_out is None else self.to_add_out(context)


class ScatteredLinear(nn.Module):
    """A linear layer with some output channels left, put back in their places; the others are zero."""

    def __init__(self, linear: nn.Linear, keep: Tensor):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, keep.numel()
        self.weight, self.bias = linear.weight, linear.bias
        self.register_buffer("index", keep.nonzero().flatten().to(linear.weight.device))

    def places_are_right(self) -> bool:
        """Whether each channel that is left has a place of its own."""
        index = self.index.cpu()
        return bool((index[1:] > index[:-1]).all()) and bool(((index >= 0) & (index < self.out_features)).all())

    def forward(self, x: Tensor) -> Tensor:
        kept = nn.functional.linear(x, self.weight, self.bias)
        return kept.new_zeros(*kept.shape[:-1], self.out_features).index_copy(-1, self.index, kept)


def _check_mask(mask: Mapping[str, Tensor], sites: Mapping[str, Site], skipped: Mapping[str, str]) -> None:
    for name, keep in mask.items():
        if name not in sites:
            why = f" ({skipped[name]})" if name in skipped else "; find_sites lists them"
            raise EcoDiffError(f"prune: {name!r} is not a site of this denoiser{why}.")
        if not isinstance(keep, Tensor) or keep.dtype != torch.bool:
            raise EcoDiffError(f"prune: the mask of {name!r} must be a bool tensor, True = keep; make_mask makes one.")
        if tuple(keep.shape) != (sites[name].units,):
            raise EcoDiffError(f"prune: {name!r} has {sites[name].units} units, its mask {list(keep.shape)}.")
