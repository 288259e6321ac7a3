"""From a mask to a smaller model: units are cut out of the weights, and the result is an ordinary diffusers pipeline.

Masked and removed models agree to rounding for every site, also where no unit is left: such a module keeps the bias of
its output layer and does no other work.

The denoiser of a pruned pipeline is an instance of `Pruned<Class>`, a subclass of its diffusers class made on demand.
Its config.json has two entries more. `pruned_units`: {site name: units kept} is all `from_pretrained` needs to give the
layers their shapes before the weights arrive. `kept_units` (`ecodiff.method.kept`) says which units of the original
those are, so that `mask_of` gives the mask back, and adapters of the original can be cut to fit.
diffusers takes component classes from other libraries only once those are imported: `import ecodiff` first (quick), or
load with `ecodiff.load`.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ecodiff.errors import EcoDiffError
from ecodiff.pipelines.parts import (
    Experts,
    denoisers,
    experts,
    named_experts,
    plain_module,
    plain_name,
    with_denoiser,
)
from ecodiff.pipelines.parts import denoiser as find_denoiser
from ecodiff.pipelines.running import without_adapters
from ecodiff.storage.saving import whole

from .carried import (
    COMPILED,
    all_tensors,
    carry_casting,
    carry_over,
    carry_pipeline,
    kept_elsewhere,
    refuse_elsewhere,
)
from .kept import composed, packed, unpacked
from .layers import weight_matrix
from .pruned import PrunedMixin, cut_units, pruned_class
from .sites import KINDS, Site, check_units, find_sites, skipped_modules


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
    its class makes, weights that are not there (meta device), and for a site that would lose its last unit where it is
    not known what is left then.
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
    # `denoisers` looks inside the wrapper of torch.compile, so another object in its place is such a wrapper.
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


def mask_of(pipe) -> dict[str, Tensor]:
    """The mask that a pruned pipeline or denoiser was made with: {site name: bool tensor [units]}, True = kept.

    Names and numbers of units are the original's, on the CPU, also after saving and loading. A pipeline that was pruned
    several times has the mask that leads there from the original at once. Sites that no mask named are not in it:
    ``prune(original, mask_of(pruned))`` gives the same weights, unless they were trained since.

    Raises EcoDiffError for what is not pruned, and for what an earlier version saved, which did not write which units
    were kept.
    """
    network = plain_module(pipe) if isinstance(pipe, nn.Module) else find_denoiser(pipe)
    pruned = {name: part for name, part in named_experts(network).items() if isinstance(part, PrunedMixin)}
    if not pruned:
        raise EcoDiffError(f"mask_of: this {type(network).__name__} is not pruned, so there is no mask of it.")
    mask = {}
    for expert, part in pruned.items():
        known = unpacked(part.config.get("kept_units", {}))
        unknown = sorted(set(part.config.get("pruned_units", {})) - set(known))
        if unknown:
            raise EcoDiffError(
                f"mask_of: this {type(part).__name__} was pruned by an earlier version, which did not write which "
                f"units were kept (of {unknown[0]!r} and {len(unknown) - 1} other sites): prune the original again."
            )
        for name, keep in known.items():
            mask[f"{expert}.{name}".lstrip(".")] = keep
    return mask


def _warn(missing: list[str]) -> None:
    """One warning that names what a pruned model lacks; nothing where it lacks nothing."""
    if missing:
        warnings.warn(
            "prune: the pruned model draws and trains like the original but for this, which is neither config nor "
            f"weight and was not carried over: {'; '.join(missing)}.",
            stacklevel=3,
        )


def check_prunable(denoiser: nn.Module, caller: str) -> None:
    """Raise EcoDiffError, in the name of ``caller``, for a denoiser that `prune` would refuse whatever the mask.

    For those who spend hours on the mask first.
    """
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
        pruned = pruned_like(type(denoiser)).from_config(dict(denoiser.config))
    # The state dict says which tensors to load; where offloading keeps them elsewhere their values are in `tensors`.
    state = {}
    for name, value in denoiser.state_dict().items():
        name = plain_name(name)
        state[name] = tensors[name].detach() if name in tensors else value
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
        _checked_sites(denoiser, mask)  # by the names that it was given
        lacking: list[str] = []

        def smaller_expert(network: nn.Module, part: dict) -> nn.Module:
            smaller, missing = _smaller(network, part)
            lacking.extend(missing)
            return smaller

        return denoiser.each(smaller_expert, mask), lacking
    if not hasattr(denoiser, "config"):
        raise EcoDiffError(f"prune: {type(denoiser).__name__} is not a diffusers model.")
    without_adapters(denoiser, "prune")
    _refuse_quantised(denoiser)
    sites = _checked_sites(denoiser, mask)
    removing = {name: int(keep.sum()) for name, keep in mask.items() if not keep.all()}

    # Same shapes as the original up to here: borrow its tensors, cut them, then copy what is still shared.
    pruned = _unpruned(denoiser, "prune")
    missing = carry_over(denoiser, pruned)
    patched = [name for name, module in pruned.named_modules() if "forward" in vars(module)]
    cut_units(pruned, sites, {name: mask[name].cpu() for name in removing})
    modules = dict(pruned.named_modules())
    for name in patched:
        # A module without units is another one now, in which there is nothing to patch.
        if name in modules and "forward" not in vars(modules[name]):
            missing.append(f"the patched forward of {name}, which has no units left")
    pruned._apply(_own_copy)
    carry_casting(denoiser, pruned)
    before = denoiser.config if isinstance(denoiser, PrunedMixin) else {}
    numbers = before.get("pruned_units", {})
    known = unpacked(before.get("kept_units", {}))
    # Of a site that was pruned before units were remembered, it stays unknown which are left.
    knowable = {name: keep for name, keep in mask.items() if name in known or name not in numbers}
    pruned.register_to_config(pruned_units={**numbers, **removing}, kept_units=packed(composed(known, knowable)))
    trained = {plain_name(name) for name, parameter in denoiser.named_parameters() if parameter.requires_grad}
    for name, parameter in pruned.named_parameters():
        parameter.requires_grad_(name in trained)
    return pruned, missing


def _refuse_quantised(denoiser: nn.Module) -> None:
    """Raise EcoDiffError for weights in packed form, from which rows and columns cannot be cut one by one.

    Gates can be learned on such a model all the same, and prune the original.
    """
    packed_weights = any(type(parameter).__module__.startswith("torchao.") for parameter in denoiser.parameters())
    if packed_weights or getattr(denoiser, "hf_quantizer", None) is not None:
        raise EcoDiffError(
            f"prune: this {type(denoiser).__name__} is quantised: prune the original, and quantise what is left."
        )


def _own_copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


def fold_gates(pipe, gates: Mapping[str, Tensor]):
    """A pipeline (a copy of the denoiser; the rest is shared) whose weights have these gates in them (Eq. 9, 10).

    gates: {site name: float tensor [units]}. The columns that read a unit are multiplied by its gate, so that the
    result generates what the original generates under `apply_gates`, to rounding. Raises EcoDiffError for unknown
    sites, wrong lengths, and sites that no layer reads.
    """
    refuse_elsewhere(find_denoiser(pipe), "fold_gates")
    folded = copy.deepcopy(find_denoiser(pipe))
    sites = find_sites(folded, KINDS)
    check_units(gates, sites, "fold_gates")
    for name, gate in gates.items():
        if not sites[name].readers:
            raise EcoDiffError(f"fold_gates: {name!r} has units that no layer reads: leave this site out.")
        for span in sites[name].readers:
            weight = weight_matrix(folded.get_submodule(span.layer))
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


def pruned_like(cls: type) -> Any:
    """The pruned class for a denoiser's class.

    For a user's subclass of a diffusers class it is a subclass of both, so that the user's own methods act in the
    pruned model as well.
    """
    import diffusers

    if cls.__name__.startswith("Pruned") and issubclass(cls, PrunedMixin):
        return cls
    for base in cls.__mro__:
        if getattr(diffusers, base.__name__, None) is base and issubclass(base, diffusers.ModelMixin):
            pruned = pruned_class(base.__name__)
            if base is cls:
                return pruned
            return type(pruned.__name__, (pruned, cls), {"__module__": "ecodiff"})
    return pruned_class(cls.__name__)  # which says that there is none


def _checked_sites(denoiser: nn.Module, mask: Mapping[str, Tensor]) -> dict[str, Site]:
    """The denoiser's sites.

    Raises EcoDiffError for a name in the mask that is no site, saying why it is none, and for masks of wrong dtype or
    length.
    """
    sites = find_sites(denoiser, KINDS)
    for name, keep in mask.items():
        if name not in sites:
            skipped = skipped_modules(denoiser)
            why = f" ({skipped[name]})" if name in skipped else "; find_sites lists them"
            raise EcoDiffError(f"prune: {name!r} is not a site of this denoiser{why}.")
        if not isinstance(keep, Tensor) or keep.dtype != torch.bool:
            raise EcoDiffError(f"prune: the mask of {name!r} must be a bool tensor, True = keep; make_mask makes one.")
        if tuple(keep.shape) != (sites[name].units,):
            raise EcoDiffError(f"prune: {name!r} has {sites[name].units} units, its mask {list(keep.shape)}.")
        if int(keep.sum()) < sites[name].min_units:
            raise EcoDiffError(
                f"prune: {name!r} must keep at least {sites[name].min_units} unit, since it is not known what its "
                "module returns without any; make_mask sees to that."
            )
    return sites
