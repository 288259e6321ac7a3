"""Hooks on a running model, with what makes them reliable: gates, watchers, counters and captures all hang theirs here.

A forward hook can silently do nothing. Code that `torch.compile` has traced does not see hooks that come later, so
inside these contexts the model runs eagerly. And a layer whose weights are read directly, or whose `forward` is called
by name, runs no hooks at all. So each context checks, as it ends, that every hook has run, and raises where one has
not: a gate that multiplied nothing has no effect and no gradient, and a layer that nobody saw has no score.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps

import torch
from torch import Tensor, nn

from ecodiff.errors import EcoDiffError

from .parts import experts

_CAUSES = (
    "Either this run does not reach them (then leave them out), or their weights are used without calling the module, "
    "so that no hook runs: module.forward(...) or module.weight read directly, as in some attention processors, or a "
    "traced or exported copy of the model."
)


@contextmanager
def eagerly() -> Iterator[None]:
    """Inside, compiled modules run as the Python code that they were made from, whichever way they were compiled.

    That holds for ``module.compile()``, ``torch.compile(module)`` and diffusers' ``compile_repeated_blocks()``. Nothing
    is recompiled afterwards: the compiled code is only set aside.
    """
    with torch.compiler.set_stance("force_eager"):
        yield


class Hooks:
    """Forward hooks on layers of one model, and the record of which of them have run.

    Use it through `hooked`. ``before`` and ``after`` add a hook; ``ran`` holds the names of the layers whose hooks ran.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.ran: set[str] = set()
        self._sites: dict[str, str] = {}  # layer -> the site it belongs to, for messages
        self._handles: list = []

    def before(self, layer: str, function: Callable[[Tensor], Tensor | None], site: str | None = None) -> None:
        """Call ``function(input)`` before the layer runs; what it returns, unless None, takes the input's place.

        The input is the layer's first argument, whether it was given by position or by name.
        """

        def hook(module, args, kwargs):
            self.ran.add(layer)
            if args:
                result = function(args[0])
                changed = (result, *args[1:]), kwargs
            else:
                first = next(iter(kwargs))
                result = function(kwargs[first])
                changed = args, {**kwargs, first: result}
            if result is None:  # then the layer is called as it was
                return None
            return changed

        self._add(layer, site, "register_forward_pre_hook", hook)

    def after(self, layer: str, function: Callable[..., Tensor | None], site: str | None = None) -> None:
        """Call ``function(args, kwargs, output)`` after the layer ran; a result other than None replaces the output."""

        def hook(module, args, kwargs, output):
            self.ran.add(layer)
            return function(args, kwargs, output)

        self._add(layer, site, "register_forward_hook", hook)

    def remove(self) -> None:
        """Take all hooks away again."""
        for handle in self._handles:
            handle.remove()

    def check(self, caller: str) -> None:
        """Raise EcoDiffError, naming a site, where a hook has not run since it was added."""
        idle = [layer for layer in self._sites if layer not in self.ran]
        if idle:
            raise never_ran(caller, idle, len(self._sites), self._sites[idle[0]])

    def _add(self, layer: str, site: str | None, register: str, hook) -> None:
        module = self.model.get_submodule(layer)
        hook.of_ecodiff = True  # copies of the model do not get it (`ecodiff.method.carried`)
        self._handles.append(getattr(module, register)(hook, with_kwargs=True))
        self._sites[layer] = layer if site is None else site


@contextmanager
def hooked(model: nn.Module, caller: str, must_run: bool = True) -> Iterator[Hooks]:
    """Inside, hooks can be added to layers of the model, which runs eagerly; on leaving they are removed and checked.

    Args:
        model: the network whose layers are named.
        caller: who asks, as the error's first word.
        must_run: False for callers that allow layers which do not run, or check for themselves (`Hooks.check`).

    Raises EcoDiffError where a hook never ran, unless the block raised something itself.
    """
    hooks = Hooks(model)
    try:
        with eagerly():
            yield hooks
    finally:
        hooks.remove()
    if must_run:
        hooks.check(caller)


def never_ran(caller: str, layers: Iterable[str], of: int, site: str) -> EcoDiffError:
    """The error for hooks that did not run: how many of how many layers, one of them, and what may be the cause."""
    layers = list(layers)
    where = f"{site!r}"
    if layers[0] not in (site, ""):
        where += f" (its layer {layers[0]!r})"
    return EcoDiffError(
        f"{caller}: {len(layers)} of {of} hooked layers never ran while their model was to be observed or gated, such "
        f"as {where}. {_CAUSES}"
    )


@contextmanager
def replaced_forward(module: nn.Module, wrap: Callable[[Callable], Callable], must_run: bool = True) -> Iterator[None]:
    """Inside, ``module.forward`` is ``wrap(module.forward)``, run eagerly; for `Experts` the forward of each.

    A forward that was set on the instance before comes back on leaving.

    Raises EcoDiffError where no wrapped forward was ever called, unless the block raised something itself or
    ``must_run`` is False.
    """
    networks = experts(module)
    before = [network.__dict__.get("forward") for network in networks]
    called: list[bool] = []
    for network, own in zip(networks, before, strict=True):
        network.forward = _noted(wrap(network.forward), own, called)
    try:
        with eagerly():
            yield
    finally:
        for network, own in zip(networks, before, strict=True):
            if own is None:
                del network.forward
            else:
                network.forward = own
    if must_run and not called:
        raise EcoDiffError(
            f"{type(module).__name__} was never called while its forward was wrapped, so nothing was seen or changed: "
            "is another copy of it (traced, exported, wrapped) the one that runs?"
        )


def _noted(forward: Callable, own: Callable | None, called: list[bool]) -> Callable:
    """The same forward, which leaves a note in ``called`` as it runs. ``own``: what was set on the instance before."""

    @wraps(forward)  # pipelines look at the signature
    def noted(*args, **kwargs):
        if not called:
            called.append(True)
        return forward(*args, **kwargs)

    vars(noted)["in_place_of"] = own  # copies of the model get this one (`ecodiff.method.carried`)
    return noted
