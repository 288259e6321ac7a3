"""A denoiser call that keeps nothing but its inputs and runs again in backward (§2.3, Alg. 2).

The first run records no graph at all. In backward the call runs once more, recorded, and one ``torch.autograd.grad``
gives the gradients of its inputs and of the gates together; the graph is gone before the next call's turn. That the
inputs are known beforehand (tensors among the arguments, and the gates that ``apply_gates`` has open) is what makes
this cheaper than ``torch.utils.checkpoint``, which has to find them by recording the first run too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.checkpoint import get_device_states, set_device_states

from ecodiff.errors import EcoDiffError
from ecodiff.pipelines.running import frozen

from .hooks import OpenGates


def recomputed(
    forward: Callable,
    gates: OpenGates,
    *args,
    preserve_rng_state: bool = True,
    settings: Settings | None = None,
    **kwargs,
):
    """``forward(*args, **kwargs)``, whose activations are computed again in backward.

    Gradients reach tensors anywhere among the arguments, and ``gates``. They are those of a call that keeps its
    activations, bit for bit. Autocast, ``settings`` of the denoiser and, with ``preserve_rng_state``, torch's random
    state are those of the first run. A call that gets or returns tensors inside other objects, such as a cache of keys
    and values, keeps its activations: gradients could not pass through these. Raises EcoDiffError, here or in backward,
    if the call reads another tensor that requires gradients, or if something was written into its arguments since.
    """
    leaves, structure = tree_flatten((args, kwargs))
    if any(map(_hides_tensors, leaves)):
        return kept(forward, gates, *args, **kwargs)
    moving = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
    given = list(leaves)
    # One flat list, since an autograd function sees gradients of its direct arguments only: gates that are given, what
    # gates are drawn from, then the tensors among the arguments.
    inputs = [*gates.values, *gates.learned, *(leaves[i] for i in moving)]
    first_argument = len(gates.values) + len(gates.learned)
    shape: dict = {}
    changes = settings.changes() if settings is not None else []
    fixed = [leaf for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and i not in moving]
    versions = [_version(tensor) for tensor in fixed]

    def run(inputs: list[Tensor]) -> list:
        for i, argument in zip(moving, inputs[first_argument:], strict=True):
            leaves[i] = argument
        args, kwargs = tree_unflatten(leaves, structure)
        for i in moving:  # no tensor of the graph stays behind in this closure
            leaves[i] = None
        with gates.replaced(inputs[: len(gates.values)]):
            outputs, shape["of"] = tree_flatten(forward(*args, **kwargs))
        if any(map(_hides_tensors, outputs)):
            raise _Hidden
        return outputs

    def run_again(inputs: list[Tensor]) -> list:
        if [_version(tensor) for tensor in fixed] != versions:
            raise EcoDiffError(
                "The sampling loop wrote into a tensor that it had given to its denoiser, so this call cannot run "
                "again in backward: take checkpoint=False."
            )
        with settings.as_they_were(changes) if settings is not None else nullcontext():
            return run(inputs)

    if not inputs:  # nothing known needs a gradient here: then nothing else may
        outputs, shape["of"] = tree_flatten(forward(*args, **kwargs))
        _refuse_others([output for output in outputs if isinstance(output, Tensor)], inputs)
        return tree_unflatten(outputs, shape["of"])
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)] + inputs  # gates may lie elsewhere than the call
    autocast = [_autocast(kind) for kind in sorted({"cpu", *(tensor.device.type for tensor in tensors)})]
    random = None
    if preserve_rng_state:
        random = (torch.get_rng_state(), *get_device_states(*tensors))
    try:
        outputs = _Recomputed.apply(run, run_again, gates, autocast, random, *inputs)
    except _Hidden:
        args, kwargs = tree_unflatten(given, structure)
        return kept(forward, gates, *args, **kwargs)
    return tree_unflatten(list(outputs), shape["of"])


def _version(tensor: Tensor) -> int:
    """How often something was written into a tensor; torch does not count that for inference tensors."""
    return 0 if tensor.is_inference() else tensor._version


class _Hidden(Exception):
    """A call returned tensors inside an object, so that it cannot be recomputed."""


def _hides_tensors(leaf) -> bool:
    """Whether an object that is no tensor holds some, such as a cache of keys and values."""
    if isinstance(leaf, (Tensor, nn.Module, type)) or not hasattr(leaf, "__dict__") or callable(leaf):
        return False
    waiting, seen = [leaf], 0
    while waiting and seen < 10_000:
        value = waiting.pop()
        seen += 1
        if isinstance(value, Tensor):
            return True
        if isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, (list, tuple)):
            waiting += value
        elif not isinstance(value, (nn.Module, type)) and not callable(value):
            waiting += getattr(value, "__dict__", {}).values()
    return False


class Settings:
    """What is set on the modules of a denoiser beside weights and hooks: attention processors, flags, attributes.

    A loop may change them while it runs and undo that as it ends, as perturbed-attention guidance does with attention
    processors. A call that runs again in backward has to find what it found first. Compared are objects by identity,
    with the attributes of each processor, against what they were as this object was made.
    """

    def __init__(self, denoiser: nn.Module):
        self._before: list[tuple[dict, dict]] = []
        for module in denoiser.modules():
            for place in _places(module):
                self._before.append((place, _entries(place)))

    def changes(self) -> list[dict | None]:
        """What each place holds now, None where that is what it held at first."""
        changed: list[dict | None] = []
        for place, first in self._before:
            now = _entries(place)
            changed.append(now if _differ(now, first) else None)
        return changed

    @contextmanager
    def as_they_were(self, changes: list[dict | None]) -> Iterator[None]:
        """Inside, everything is as it was when ``changes`` were noted; afterwards as it is now."""
        undo = []
        for (place, first), changed in zip(self._before, changes, strict=True):
            then = first if changed is None else changed
            now = _entries(place)
            if _differ(now, then):
                undo.append((place, now))
                _set(place, then)
        try:
            yield
        finally:
            for place, now in reversed(undo):
                _set(place, now)


# Entries of a module's __dict__ that are seen to elsewhere: weights, hooks, modes, and what is wrapped here.
_OURS = {"_parameters", "_buffers", "_modules", "training", "forward", "_gradient_checkpointing_func"}


def _places(module: nn.Module) -> list[dict]:
    """The dictionaries in which a module's settings stand: its attributes, its children, those of its processor."""
    places = [vars(module), module._modules]
    processor = getattr(module, "processor", None)
    if processor is not None and not isinstance(processor, nn.Module) and hasattr(processor, "__dict__"):
        places.append(vars(processor))
    return places


def _entries(place: dict) -> dict:
    return {name: value for name, value in place.items() if name not in _OURS}


def _differ(a: dict, b: dict) -> bool:
    return a.keys() != b.keys() or any(value is not b[name] for name, value in a.items())


def _set(place: dict, then: dict) -> None:
    """Give a dictionary these entries; those of `_OURS` stay."""
    for name in _entries(place):
        if name not in then:
            del place[name]
    place.update(then)


def kept(forward: Callable, gates: OpenGates, *args, **kwargs):
    """``forward(*args, **kwargs)`` with its activations kept.

    Its inputs get a node of their own in this call, so that gradients are summed in the same order as in `recomputed`:
    first inside a call, then over calls.
    """
    with gates.replaced([value.view_as(value) for value in gates.values]):
        args, kwargs = tree_map(_with_a_node, (args, kwargs))
        return forward(*args, **kwargs)


def _with_a_node(leaf):
    if isinstance(leaf, Tensor) and leaf.requires_grad:
        return leaf.view_as(leaf)
    return leaf


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, run, run_again, gates, autocast, random, *inputs):
        ctx.run, ctx.gates, ctx.autocast, ctx.random = run_again, gates, autocast, random
        ctx.save_for_backward(*inputs)
        return tuple(run(list(inputs)))

    @staticmethod
    def backward(ctx, *gradients):
        not_differentiable = (None,) * 5  # run, run_again, gates, autocast, random
        values = len(ctx.gates.values)
        drawn_from = range(values, values + len(ctx.gates.learned))
        inputs = []
        for i, (tensor, needed) in enumerate(zip(ctx.saved_tensors, ctx.needs_input_grad[5:], strict=True)):
            # Copies without a past; only what gates are drawn from is read by the function that draws, as it is.
            if i not in drawn_from:
                tensor = tensor.detach().requires_grad_(needed)
            inputs.append(tensor)
        learned = [tensor for tensor in inputs if tensor.requires_grad]
        with frozen(ctx.gates.denoiser):  # to the end: checkpoints inside the denoiser run it once more
            with torch.enable_grad(), _as_before(ctx.autocast, ctx.random):
                # Not the copies themselves: autocast would cast a leaf once for all its uses, and round their sum.
                outputs = ctx.run([_with_a_node(tensor) for tensor in inputs])
            ends, ends_gradients = [], []
            for output, gradient in zip(outputs, gradients, strict=True):
                if isinstance(output, Tensor) and output.grad_fn:
                    ends.append(output)
                    ends_gradients.append(gradient)
            if not ends:  # a call of one expert, while gates are open on another
                return *not_differentiable, *(None for _ in inputs)
            if not ctx.gates.checked:
                _refuse_others(ends, learned)
                ctx.gates.checked = True
            results = iter(torch.autograd.grad(ends, learned, ends_gradients, allow_unused=True))
        return *not_differentiable, *(next(results) if tensor.requires_grad else None for tensor in inputs)


def _autocast(kind: str) -> dict:
    """The present autocast settings of a kind of device, as arguments of ``torch.autocast``."""
    return {
        "device_type": kind,
        "dtype": torch.get_autocast_dtype(kind),
        "enabled": torch.is_autocast_enabled(kind),
        "cache_enabled": torch.is_autocast_cache_enabled(),
    }


@contextmanager
def _as_before(autocast: list[dict], random: tuple | None) -> Iterator[None]:
    """Inside, autocast is as it was, and so is torch's random state if one was kept."""
    with ExitStack() as stack:
        for settings in autocast:
            stack.enter_context(torch.autocast(**settings))
        if random:
            stack.enter_context(torch.random.fork_rng(random[1]))
            torch.set_rng_state(random[0])
            set_device_states(*random[1:])
        yield


def _refuse_others(outputs: list[Tensor], known: list[Tensor]) -> None:
    """Raise EcoDiffError if the outputs' graph ends in a tensor that is not among the known ones."""
    leaves = {id(tensor) for tensor in known}
    waiting, seen = [output.grad_fn for output in outputs], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)  # only the nodes at a graph's ends have one: tensors like weights
        if variable is not None and id(variable) not in leaves:
            raise EcoDiffError(
                f"A tensor of shape {list(variable.shape)} inside the denoiser requires gradients, and checkpointing "
                "does not know it: set gates with apply_gates (name what drawn gates are made from as learned=), or "
                "take checkpoint=False."
            )
        waiting += [function for function, _ in node.next_functions]


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Inside, autocast is off and gradients can be recorded, whatever the caller has on.

    That is autocast, ``torch.no_grad`` or ``torch.inference_mode``: what is computed here depends on its own settings
    alone.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in sorted({"cpu", device.type}):
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextmanager
def frozen_inside(denoiser: nn.Module) -> Iterator[None]:
    """Inside, the denoiser's own activation checkpointing (``enable_gradient_checkpointing()``) runs its blocks frozen.

    A block that is recomputed runs in backward, when `frozen` may be over: trainable weights would then be recorded,
    and torch would find other tensors than in the first run.
    """
    modules = [m for m in denoiser.modules() if callable(getattr(m, "_gradient_checkpointing_func", None))]
    before = [module._gradient_checkpointing_func for module in modules]

    def wrap(checkpoint):
        def frozen_checkpoint(block, *args, **kwargs):
            def run(*args, **kwargs):
                with frozen(block if isinstance(block, nn.Module) else denoiser):
                    return block(*args, **kwargs)

            return checkpoint(run, *args, **kwargs)

        return frozen_checkpoint

    for module, checkpoint in zip(modules, before, strict=True):
        module._gradient_checkpointing_func = wrap(checkpoint)
    try:
        yield
    finally:
        for module, checkpoint in zip(modules, before, strict=True):
            module._gradient_checkpointing_func = checkpoint
