"""Whether units of a model can really go one by one: tried on the model's own calls before anything is learned.

`find_sites` recognises sites by their layers. What lies between these layers is code of the model: a processor may
reshape by a number that it keeps elsewhere, or add something that has a number for each head. So each kind of module is
run twice with the inputs of a real call, with some units gated to zero and with the same units removed. Where the two
differ, its sites are left out, and the reason is said.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from ecodiff.pipelines.forward_hooks import eagerly
from ecodiff.pipelines.parts import experts

from .hooks import apply_gates
from .pruned import cut_units
from .sites import Site, Span

# Largest difference between masked and removed, as a share of the largest output: rounding in the dtype, and not more.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}
# Modules that hold others and are never called themselves.
_CONTAINERS = (nn.ModuleList, nn.ModuleDict)


class _Enough(Exception):
    """Ends a run of the pipeline once the first call of its denoiser has been seen."""


def failing_sites(denoiser: nn.Module, sites: Mapping[str, Site], run: Callable[[], Any]) -> dict[str, str]:
    """{site name: reason} of the sites whose units cannot be removed as they are masked.

    Args:
        denoiser: the network, with weights.
        sites: what `find_sites` returns for it.
        run: calls the denoiser at least once. It is stopped, by an exception, when the first call is over.

    One site of each class of module and shape is tried: its first unit removed, all but its last unit removed, and, if
    no unit has to stay, all. Sites that the first call does not reach are not tried.
    """
    owners = {name: _owner(denoiser, site) for name, site in sites.items()}
    kinds = {name: _kind(denoiser, site, owners[name]) for name, site in sites.items()}
    first_of_kind: dict[tuple, str] = {}
    for name, kind in kinds.items():
        first_of_kind.setdefault(kind, name)
    calls = _first_calls(denoiser, {owners[name] for name in first_of_kind.values()}, run)

    reasons = {}
    for kind, name in first_of_kind.items():
        owner = owners[name]
        reasons[kind] = _try(denoiser, sites[name], owner, calls[owner]) if owner in calls else None
    failing = {}
    for name, kind in kinds.items():
        reason = reasons[kind]
        if reason is not None:
            failing[name] = reason
    return failing


def _kind(denoiser: nn.Module, site: Site, owner: str) -> tuple:
    """What sites that are tried together have in common."""
    module = denoiser.get_submodule(site.name)
    processor = type(getattr(module, "processor", None)).__name__
    parts = tuple((span.layer[len(owner) :], span.size) for span in site.writers + site.readers + site.selects)
    around = type(denoiser.get_submodule(owner)).__name__
    return around, type(module).__name__, processor, site.kind, site.units, parts


def _owner(denoiser: nn.Module, site: Site) -> str:
    """The module to run: one that holds all layers of a site and, where it can be called, the block around that.

    What matters is what a block makes of an attention. The last joint block of SD3 drops what its attention returns for
    the text, which is another one when heads are gone.
    """
    names = [span.layer.split(".")[:-1] for span in site.writers + site.readers + site.selects]
    names.append(site.name.split("."))
    common = names[0]
    for parts in names[1:]:
        length = 0
        while length < min(len(common), len(parts)) and common[length] == parts[length]:
            length += 1
        common = common[:length]
    owner = ".".join(common)
    around = ".".join(common[:-1])
    if owner == site.name and around and type(denoiser.get_submodule(around)) not in _CONTAINERS:
        return around
    return owner


def _first_calls(denoiser: nn.Module, owners: Iterable[str], run: Callable[[], Any]) -> dict[str, tuple]:
    """{module name: (args, kwargs)} of these modules, as the first call of the denoiser calls them first."""
    calls: dict[str, tuple] = {}

    def noting(name):
        def note(module, args, kwargs):
            # Later steps may write into what this one was given.
            calls.setdefault(name, tree_map_only(Tensor, _own_copy, (args, kwargs)))

        return note

    def stop(module, args, output):
        raise _Enough

    handles = []
    for name in owners:
        hook = denoiser.get_submodule(name).register_forward_pre_hook(noting(name), with_kwargs=True)
        handles.append(hook)
    for network in experts(denoiser):
        handles.append(network.register_forward_hook(stop))
    try:
        with eagerly():
            run()
    except _Enough:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _try(denoiser: nn.Module, site: Site, owner: str, call: tuple) -> str | None:
    """Why the units of this site cannot be removed; None if they can, or if no copy of the module runs at all."""
    module, local = denoiser.get_submodule(owner), _relative(site, owner)
    units = torch.arange(site.units)
    keeps = []
    if site.units > 1:
        keeps += [units > 0, units == site.units - 1]
    if not site.min_units:
        keeps.append(units < 0)
    for keep in keeps:
        try:
            masked, removed = _Copy(module), _Copy(module)
            with torch.no_grad(), apply_gates(masked, {local.name: keep}, {local.name: local}):
                wanted = masked.outputs(call)
        except Exception:
            # Nothing is known of what cannot be copied or run as a copy, such as modules with hooks of offloading, or
            # where a gate has no effect, which those who observe or gate the model itself say with its cause.
            return None
        left = f"with {int(keep.sum())} of its {site.units} units"
        try:
            cut_units(removed, {local.name: local}, {local.name: keep})
            with torch.no_grad(), eagerly():
                given = removed.outputs(call)
        except Exception as error:  # whatever a model's own code may raise for shapes that it does not expect
            lines = str(error).strip().splitlines() or [repr(error)]
            return f"{left} it does not run ({lines[0][:120]})"
        if not _agree(wanted, given):
            return f"{left} it does not return what it returns when they are masked"
    return None


class _Copy(nn.Module):
    """A copy of one module of a denoiser, inside another module, so that it can be replaced as a whole."""

    def __init__(self, owner: nn.Module):
        super().__init__()
        self.owner = copy.deepcopy(owner)

    def outputs(self, call: tuple) -> list[Tensor]:
        """The tensors that the module returns for these arguments."""
        args, kwargs = copy.deepcopy(call)  # some modules write into what they are given
        return [leaf for leaf in tree_leaves(self.owner(*args, **kwargs)) if isinstance(leaf, Tensor)]


def _relative(site: Site, owner: str) -> Site:
    """The site by the names that its parts have in a `_Copy` of the module that holds it."""

    def local(name: str) -> str:
        inside = name[len(owner) :].lstrip(".")
        return f"owner.{inside}" if inside else "owner"

    def spans(given: tuple[Span, ...]) -> tuple[Span, ...]:
        return tuple(replace(span, layer=local(span.layer)) for span in given)

    return replace(
        site,
        name=local(site.name),
        writers=spans(site.writers),
        readers=spans(site.readers),
        selects=spans(site.selects),
    )


def _agree(wanted: list[Tensor], given: list[Tensor]) -> bool:
    if [tensor.shape for tensor in wanted] != [tensor.shape for tensor in given]:
        return False
    for a, b in zip(wanted, given, strict=True):
        if a.numel() == 0:
            continue
        if not a.is_floating_point():
            if not torch.equal(a, b):
                return False
            continue
        largest = a.abs().max().item()
        if (a.float() - b.float()).abs().max().item() > _TOLERANCE.get(a.dtype, 0.05) * largest + 1e-12:
            return False
    return True


def _own_copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()
