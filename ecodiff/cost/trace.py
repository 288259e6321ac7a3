"""What one call of a network costs, counted without weights: operations, bytes saved for backward, peak bytes.

The network runs on meta tensors: shapes, dtypes and storages are those of a real run, nothing is computed and no
memory is used. A dispatch mode sees every operation, forward and backward, and keeps account of every storage from
its making to its last reference. (Networks that mix in tensors of the CPU, and autocast, take ``FakeTensorMode``,
which is slower.) What it cannot see is memory inside a kernel (workspaces of convolutions) and the allocator's
rounding; `tests/test_cost.py` and `ecodiff/lab/benchmarks/full_size.py` compare with real runs.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

from ecodiff.errors import EcoDiffError
from ecodiff.method.hooks import apply_gates
from ecodiff.method.sites import Site

from .watch import Flops, Watch, aten, storage_key


@dataclass(frozen=True)
class Backward:
    """Bytes of one call with gradients, above the weights and the call's inputs.

    held: alive after the forward pass, output included: what stays until this call's backward.
    saved: what autograd saved, each storage once, weights left out (inputs and gates included).
    peak: most alive at once during forward and backward.
    """

    held: int
    saved: int
    peak: int


@dataclass(frozen=True)
class Trace:
    """What one call costs. Bytes are above the weights and inputs; ``inputs`` are those of the call's tensors.

    forward_peak: most bytes alive in a call without gradients.  update: with gradients to gates and input (any call but
    the first of a trajectory).  first_held: held by the first call, whose input needs no gradient.  inner: as update,
    with the denoiser's own activation checkpointing; None where it has none.
    """

    flops: Flops
    inputs: int
    forward_peak: int
    update: Backward | None = None
    first_held: int = 0
    inner: Backward | None = None


@dataclass(frozen=True)
class Given:
    """An argument as a real call had it (tensors, or anything that holds some): traced by its shapes."""

    value: object


def trace(
    network: nn.Module,
    inputs: Mapping,
    *,
    dtype: torch.dtype,
    sites: Mapping[str, Site] | None = None,
    gradient_input: str | None = None,
    inner: bool = True,
    autocast: torch.dtype | None = None,
    method: str = "forward",
) -> Trace:
    """Trace one call of a network, whose weights are never read (meta tensors will do).

    Args:
        network: any module; it is copied without its weights.
        inputs: {argument: shape, (shape, dtype), a plain value, a mapping of such, or `Given`}; shapes are tuples of
            int. Tensors have ``dtype`` unless they say otherwise; given ones have it where they had the network's.
        dtype: of weights and activations.
        sites: gate these and trace backward too. None: forward only.
        gradient_input: the argument that requires a gradient in all calls but the first (the latents).
        inner: trace the denoiser's own activation checkpointing as well.
        autocast: run under autocast with this dtype, the weights staying in ``dtype``.
        method: the module's method to call.

    Raises EcoDiffError where the network does not run on fake tensors.
    """
    options = (inputs, dtype, sites, gradient_input, inner, autocast, method)
    return _without_computing(_trace, network, options, meta=autocast is None)


def outputs(network: nn.Module, inputs: Mapping, *, dtype: torch.dtype):
    """What one call of a network returns, with empty tensors: `trace` for those who need only shapes."""
    return _without_computing(_outputs, network, (inputs, dtype))


def _without_computing(run, network: nn.Module, options: tuple, meta: bool = True):
    """``run`` on meta tensors, or with fake ones where the network mixes in others."""
    try:
        if meta:
            try:
                return run(network, nullcontext(), "meta", *options)
            except (RuntimeError, TypeError, NotImplementedError):
                pass  # try it with fake tensors
        return run(network, FakeTensorMode(allow_non_fake_inputs=True), "cpu", *options)
    except (RuntimeError, TypeError, NotImplementedError, ValueError) as error:
        raise EcoDiffError(
            f"{type(network).__name__} does not run without weights, so its cost cannot be counted: {error}"
        ) from error


def _outputs(network, mode, device, inputs, dtype):
    with mode:
        model, own = without_weights(network, dtype, device), _dtype(network)
        made = {name: _tensor(value, dtype, device, own) for name, value in inputs.items()}
        with torch.no_grad(), torch.device("meta") if device == "meta" else nullcontext():
            return model(**made)


def _trace(network, mode, device, inputs, dtype, sites, gradient_input, inner, autocast, method) -> Trace:
    with mode:
        model, own = without_weights(network, dtype, device), _dtype(network)
        made = {name: _tensor(value, dtype, device, own) for name, value in inputs.items()}
    weights = {storage_key(t) for t in (*model.parameters(), *model.buffers())}
    known = weights | {storage_key(t) for t in tree_leaves(made) if isinstance(t, Tensor)}
    layouts: dict = {}

    @contextmanager
    def functions():
        if device == "meta":
            with torch.device("meta"), _FusedAttention():
                yield
        else:
            yield

    def recomputed(module, *arguments):  # backward switches function modes off
        return checkpoint(module, *arguments, use_reentrant=False, context_fn=lambda: (nullcontext(), functions()))

    @contextmanager
    def running(watch, grad, gates=None):
        with ExitStack() as stack:
            stack.enter_context(mode)
            stack.enter_context(functions())
            stack.enter_context(torch.set_grad_enabled(grad))
            if gates is not None:
                stack.enter_context(apply_gates(model, gates, sites, must_run=False))  # counts what runs
            if autocast is not None:
                stack.enter_context(torch.autocast("cpu", autocast))
            stack.enter_context(watch)
            yield

    def call():
        result = getattr(model, method)(**made)
        return (
            result
            if isinstance(result, Tensor)
            else result[0]
            if isinstance(result, tuple)
            else next(iter(result.values()))
        )

    def with_gradients(first: bool, backward: bool) -> Backward:
        with mode:
            gates = {name: torch.ones(site.units, device=device, requires_grad=True) for name, site in sites.items()}
        watch, saved = Watch(known | {storage_key(t) for t in gates.values()}, layouts=layouts), {}

        def remember(tensor):
            if (key := storage_key(tensor)) not in weights:
                saved[key] = tensor.untyped_storage().nbytes()
            return tensor

        if gradient_input is not None:
            made[gradient_input].requires_grad_(not first)
        with running(watch, True, gates):
            with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
                output = call()
            held = watch.alive
            if backward:
                output.backward(torch.ones_like(output))
        return Backward(held, sum(saved.values()), watch.peak)

    watch = Watch(known, weights, layouts)
    with running(watch, False):
        call()
    update = first = nested = None
    if sites:
        update = with_gradients(first=False, backward=True)
        first = with_gradients(first=True, backward=False).held
        if inner and getattr(model, "_supports_gradient_checkpointing", False):
            model.enable_gradient_checkpointing(recomputed)
            nested = with_gradients(first=False, backward=True)
    sizes = {storage_key(t): t.untyped_storage().nbytes() for t in tree_leaves(made) if isinstance(t, Tensor)}
    return Trace(Flops(**watch.flops), sum(sizes.values()), watch.peak, update, first or 0, nested)


class _FusedAttention(TorchFunctionMode):
    """Meta tensors would take the attention that writes out its scores; real devices take a fused one, as this does."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is nn.functional.scaled_dot_product_attention:
            return self._fused(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _fused(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        if enable_gqa and key.shape[-3] != query.shape[-3]:
            shape = (*query.shape[:-2], *key.shape[-2:])
            key, value = (part.new_empty(shape) for part in (key, value))
        if attn_mask is not None:
            attn_mask = attn_mask.to(query.dtype)
        return aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
        )[0]


def _tensor(value, dtype: torch.dtype, device: str, own: torch.dtype | None = None):
    if isinstance(value, Given):
        return tree_map(
            lambda part: (
                torch.empty(part.shape, dtype=dtype if part.dtype == own else part.dtype, device=device)
                if isinstance(part, Tensor)
                else part
            ),
            value.value,
        )
    if isinstance(value, Mapping):
        return {name: _tensor(part, dtype, device) for name, part in value.items()}
    if isinstance(value, list):
        return [_tensor(part, dtype, device) for part in value]
    if isinstance(value, tuple):
        if value and isinstance(value[-1], torch.dtype):
            value, dtype = value
        return torch.empty(value, dtype=dtype, device=device)
    return value


def _dtype(network: nn.Module) -> torch.dtype | None:
    """Of the weights."""
    return next((p.dtype for p in network.parameters() if p.is_floating_point()), None)


def without_weights(network: nn.Module, dtype: torch.dtype, device: str) -> nn.Module:
    """A copy whose tensors are empty ones on the device; floating-point weights have ``dtype``. Frozen."""

    def empty(tensor: Tensor) -> Tensor:
        kept = dtype if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor.dtype
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=kept, device=device)

    memo: dict[int, object] = {}
    for module in network.modules():
        others = {k: v for k, v in vars(module).items() if isinstance(v, (Tensor, list, tuple, dict)) and k[0] != "_"}
        for tensor in (*module._buffers.values(), *tree_leaves(others)):
            if isinstance(tensor, Tensor):
                memo[id(tensor)] = empty(tensor)
        for tensor in module._parameters.values():
            if tensor is not None:
                memo[id(tensor)] = nn.Parameter(empty(tensor), requires_grad=False)
    return copy.deepcopy(network, memo).eval()


def parameters(network: nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in network.parameters())


def weight_bytes(network: nn.Module) -> int:
    """Bytes of parameters and buffers as they are."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (*network.parameters(), *network.buffers()))
