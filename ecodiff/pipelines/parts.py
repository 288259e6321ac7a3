"""The parts of a pipeline: its denoiser, under whatever name; several experts as one; its own sampling loop."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import nn

from ecodiff.errors import EcoDiffError

_DENOISER_NAMES = ("unet", "transformer")
# Of pipelines that have none of these: priors, and decoders of images from a prior's embeddings.
_OTHER_NAMES = ("prior", "decoder")
_FURTHER_EXPERT = re.compile(r"(unet|transformer)_\w+")


class Experts(nn.Module):
    """The denoisers of a pipeline that has several, such as the two of Wan 2.2, as one network.

    The sampling loop calls one of them at each step, so a call belongs to one expert; sites, gates, scores and masks
    are those of all. Modules of the first expert have the names that they have in it, as in a pipeline with one
    denoiser. Names of all others begin with their component's: "transformer_2.blocks.0.attn1".
    """

    def __init__(self, networks: Mapping[str, nn.Module]):
        super().__init__()
        for name, network in networks.items():
            self.add_module(name, network)

    def __eq__(self, other) -> bool:  # made anew at each look, so that it cannot outlive a change of the pipeline
        return isinstance(other, Experts) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def _identity(self) -> tuple:
        return tuple((name, id(network)) for name, network in self._modules.items())

    @property
    def config(self):
        """The first expert's."""
        return experts(self)[0].config

    @property
    def dtype(self) -> torch.dtype:
        """The first expert's."""
        return next(experts(self)[0].parameters()).dtype

    def named_modules(self, memo=None, prefix: str = "", remove_duplicate: bool = True) -> Iterator:
        """All modules, those of the first expert by the names that they have in it."""
        (first, *_) = self._modules
        start = f"{prefix}." if prefix else ""
        for name, module in super().named_modules(memo, prefix, remove_duplicate):
            inside = name.removeprefix(start)
            if inside == first or inside.startswith(f"{first}."):
                inside = inside[len(first) + 1 :]
                name = start + inside if inside else prefix  # the expert itself has the name of the whole
            yield name, module

    def get_submodule(self, target: str) -> nn.Module:
        """The module of a name as ``named_modules`` gives it."""
        first, *others = self._modules
        if target.partition(".")[0] in others:
            return super().get_submodule(target)
        return self._modules[first].get_submodule(target)

    def each(self, function: Callable[[nn.Module, dict], nn.Module], named: Mapping = {}) -> Experts:  # noqa: B006
        """Experts made by ``function(expert, its part of named)``; ``named`` is a mapping from names of modules."""
        first, *others = self._modules
        parts: dict[str, dict] = {name: {} for name in self._modules}
        for name, value in named.items():
            owner, _, inside = name.partition(".")
            if owner in others:
                parts[owner][inside] = value
            else:
                parts[first][name] = value
        return Experts({name: function(network, parts[name]) for name, network in self._modules.items()})

    def forward(self, *args, **kwargs):
        raise EcoDiffError(f"The pipeline calls one denoiser at a time: call one of {', '.join(self._modules)}.")


def experts(network: nn.Module) -> list[nn.Module]:
    """The networks that the loop calls: a denoiser by itself, or all of `Experts`."""
    if isinstance(network, Experts):
        return list(network.children())
    return [network]


def plain_module(module):
    """A module without the wrapper that ``torch.compile(module)`` puts around it; anything else as it is."""
    return getattr(module, "_orig_mod", module)


def plain_name(name: str) -> str:
    """The name of a module or tensor without the wrappers of parts that were compiled by ``torch.compile(part)``.

    It is what the module is called in the model before that, and still an address: `get_submodule` looks through the
    wrappers.
    """
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def named_experts(network: nn.Module) -> dict[str, nn.Module]:
    """`experts` by the names under which ``network.get_submodule`` finds them: "" for the first, or the only one."""
    names = [""]
    if isinstance(network, Experts):
        names += list(network._modules)[1:]
    return dict(zip(names, experts(network), strict=True))


def denoisers(pipe) -> dict[str, nn.Module]:
    """The networks that the sampling loop calls at its steps, {name of the component: network}.

    There is one in most pipelines, and two in Wan 2.2. Where it has a name of its own, ``pipe.denoiser_name = "net"``
    says which component it is. Raises EcoDiffError where there is none under a name that is known here.
    """
    named = getattr(pipe, "denoiser_name", None)
    if named is not None:
        network = getattr(pipe, named, None)
        if not isinstance(network, nn.Module):
            raise EcoDiffError(
                f"{type(pipe).__name__}: denoiser_name says {named!r}, which is no network of this pipeline."
            )
        return {named: plain_module(network)}
    components = getattr(pipe, "components", None) or {}
    further = [name for name in components if _FURTHER_EXPERT.fullmatch(name)]
    found = {}
    for name in (*_DENOISER_NAMES, *further):
        network = getattr(pipe, name, None)
        if isinstance(network, nn.Module):
            found[name] = plain_module(network)
    for name in _OTHER_NAMES:
        network = getattr(pipe, name, None)
        # Networks that are no pipelines, such as a VAE, may have a part of such a name.
        if not found and name in components and isinstance(network, nn.Module):
            found[name] = plain_module(network)
    if not found:
        networks = []
        for name, part in components.items():
            if isinstance(part, nn.Module) and hasattr(part, "config"):
                networks.append(f"{name} ({type(part).__name__})")
        raise EcoDiffError(
            f"{type(pipe).__name__} has no denoiser that is known here: expected a component called "
            f"{' or '.join(_DENOISER_NAMES)}, but its networks are {', '.join(networks) or 'none'}. Say which it is by "
            'pipe.denoiser_name = "its name".'
        )
    # Without a boundary, Wan's loop never leaves the first expert.
    if len(found) > 1 and getattr(pipe, "config", {}).get("boundary_ratio", 0) is None:
        name = next(iter(found))
        return {name: found[name]}
    return found


def denoiser(pipe) -> nn.Module:
    """The network that predicts noise, velocity or flow; the one that is pruned. `Experts` where there are several."""
    found = denoisers(pipe)
    if len(found) > 1:
        return Experts(found)
    return next(iter(found.values()))


def one_denoiser(pipe, caller: str) -> nn.Module:
    """`denoiser` for what works on one network; raises EcoDiffError for a pipeline with several."""
    found = denoisers(pipe)
    if len(found) > 1:
        raise EcoDiffError(
            f"{caller}: {type(pipe).__name__} has several denoisers ({', '.join(found)}), and {caller} works on one "
            "only: take a pipeline with one denoiser."
        )
    return next(iter(found.values()))


def with_denoiser(pipe, network: nn.Module):
    """A pipeline of the same class with ``network`` as its denoiser; all other components are shared.

    Where ``pipe`` offloads whole components, the new one does so, too.
    """
    parts = {**pipe.components, **dict(zip(denoisers(pipe), experts(network), strict=True))}
    arguments = list(inspect.signature(type(pipe).__init__).parameters)[1:]  # without self
    # What is no component, such as Wan's boundary between its experts, is in the configuration.
    given = {key: parts.get(key, pipe.config.get(key)) for key in arguments if key in {*parts, *pipe.config}}
    result = type(pipe)(**given)
    result._progress_bar_config = dict(getattr(pipe, "_progress_bar_config", {}))
    if getattr(pipe, "denoiser_name", None) is not None:
        result.denoiser_name = pipe.denoiser_name
    if getattr(pipe, "_all_hooks", None):
        result.enable_model_cpu_offload(device=pipe._offload_device)
    return result


def sampling_loop(pipe):
    """The pipeline's own ``__call__`` without its ``torch.no_grad``: a function of the pipeline and its arguments.

    Any other decorator stays: what it does belongs to the loop.
    """
    call = type(pipe).__call__
    return inspect.unwrap(call, stop=lambda inner: getattr(inner, "__code__", None) is not _NO_GRAD)


_NO_GRAD = torch.no_grad()(lambda: None).__code__
"""The code of whatever a context of torch decorates."""
