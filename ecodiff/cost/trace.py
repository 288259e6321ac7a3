"""What one call of a network costs, counted without weights: operations, bytes saved for backward, peak bytes.

The network runs on meta tensors: shapes, dtypes and storages are those of a real run, nothing is computed and no
memory is used. A dispatch mode sees every operation, forward and backward, and keeps account of every storage from
its making to its last reference. (Networks that mix in tensors of the CPU, and autocast, take ``FakeTensorMode``,
which is slower.) What it cannot see is memory inside a kernel (workspaces of convolutions) and the allocator's
rounding; `tests/cost/test_cost.py` and `ecodiff/lab/benchmarks/full_size.py` compare with real runs.
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
    """Bytes of one call with gradients, above the weights and the call's inputs."""

    held: int  # alive after the forward pass, output included: what stays until this call's backward
    saved: int  # what autograd saved, each storage once, weights left out (inputs and gates included)
    peak: int  # most alive at once during forward and backward


@dataclass(frozen=True)
class Trace:
    """What one call costs; bytes are above the weights and inputs."""

    flops: Flops
    inputs: int  # bytes of the call's tensors
    forward_peak: int  # most bytes alive in a call without gradients
    update: Backward | None = None  # with gradients to gates and input: any call but the first of a trajectory
    first_held: int = 0  # held by the first call, whose input needs no gradient
    inner: Backward | None = None  # as update, with the denoiser's own activation checkpointing; None if it has none


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
    """What one call of a network returns, with tensors that are empty: `trace` for those who need only shapes."""
    return _without_computing(_outputs, network, (inputs, dtype))


def _without_computing(run, network: nn.Module, options: tuple, meta: bool = True):
    """``run`` on meta tensors, or with fake ones where the network mixes in others."""
    try:
        if meta:
            try:
                return run(network, nullcontext(), "meta", *options)
            except (RuntimeError, TypeError, NotImplementedError):
                pass  # fake tensors run more: they know their device, so that they may meet tensors of the CPU
        return run(network, FakeTensorMode(allow_non_fake_inputs=True), "cpu", *options)
    except (RuntimeError, TypeError, NotImplementedError, ValueError) as error:
        raise EcoDiffError(
            f"{type(network).__name__} does not run without weights, so its cost cannot be counted: {error}"
        ) from error


def _outputs(network, mode, device, inputs, dtype):
    with mode:
        model, arguments = _made_empty(network, inputs, dtype, device)
        with torch.no_grad(), _functions_on(device):
            return model(**arguments)


def _trace(network, mode, device, inputs, dtype, sites, gradient_input, inner, autocast, method) -> Trace:
    with mode:
        model, arguments = _made_empty(network, inputs, dtype, device)
    weights = set(_storages([*model.parameters(), *model.buffers()]))
    input_storages = _storages(tree_leaves(arguments))
    known = weights | set(input_storages)
    layouts: dict = {}  # shared by all watches, since the same operations come again in each run

    @contextmanager
    def running(watch, grad, gates=None):
        with ExitStack() as stack:
            stack.enter_context(mode)
            stack.enter_context(_functions_on(device))
            stack.enter_context(torch.set_grad_enabled(grad))
            if gates is not None:
                # Some sites may not run in this call; what runs is counted, so that no hook has to.
                stack.enter_context(apply_gates(model, gates, sites, must_run=False))
            if autocast is not None:
                stack.enter_context(torch.autocast("cpu", autocast))
            stack.enter_context(watch)  # last, so that it sees what all the others make of the network's operations
            yield

    def recomputed(module, *module_inputs):
        # Backward switches function modes off, so the second forward pass has to enter them again.
        def contexts():
            return nullcontext(), _functions_on(device)

        return checkpoint(module, *module_inputs, use_reentrant=False, context_fn=contexts)

    def with_gradients(first: bool, backward: bool) -> Backward:
        with mode:
            gates = {name: torch.ones(site.units, device=device, requires_grad=True) for name, site in sites.items()}
        watch = Watch(known | set(_storages(gates.values())), layouts=layouts)
        saved: dict[int, int] = {}

        def remember(tensor):
            key = storage_key(tensor)
            if key not in weights:
                saved[key] = tensor.untyped_storage().nbytes()
            return tensor

        def unchanged(tensor):
            return tensor

        if gradient_input is not None:
            # A trajectory begins at noise, which depends on no gate.
            for latents in tree_leaves(arguments[gradient_input]):  # some denoisers take a list, a sample each
                latents.requires_grad_(not first)
        with running(watch, True, gates):
            with torch.autograd.graph.saved_tensors_hooks(remember, unchanged):
                predictions = _predictions(getattr(model, method)(**arguments))
            held = watch.alive
            if backward:
                torch.autograd.backward(predictions, [torch.ones_like(tensor) for tensor in predictions])
        return Backward(held, sum(saved.values()), watch.peak)

    watch = Watch(known, weights, layouts)
    with running(watch, False):
        _predictions(getattr(model, method)(**arguments))
    update = nested = None
    first_held = 0
    if sites:
        update = with_gradients(first=False, backward=True)
        first_held = with_gradients(first=True, backward=False).held
        if inner and getattr(model, "_supports_gradient_checkpointing", False):
            # Last, because the model is not switched back.
            model.enable_gradient_checkpointing(recomputed)
            nested = with_gradients(first=False, backward=True)
    return Trace(Flops(**watch.flops), sum(input_storages.values()), watch.peak, update, first_held, nested)


def _made_empty(network: nn.Module, inputs: Mapping, dtype: torch.dtype, device: str) -> tuple[nn.Module, dict]:
    """A copy of the network and the arguments of its call, all tensors of both empty."""
    own = _dtype(network)
    model = without_weights(network, dtype, device)
    return model, {name: _tensor(value, dtype, device, own) for name, value in inputs.items()}


def _storages(values) -> dict[int, int]:
    """{key: bytes} of the storages of all tensors among the values, each storage once."""
    return {storage_key(value): value.untyped_storage().nbytes() for value in values if isinstance(value, Tensor)}


def _predictions(result) -> list[Tensor]:
    """The tensors in what a denoiser or a decoder returns: of a tuple or of an output's fields those of the first.

    There is one, or where a denoiser takes a list of samples, one a sample.
    """
    if isinstance(result, tuple):
        result = result[0]
    elif isinstance(result, Mapping):
        result = next(iter(result.values()))
    return tree_leaves(result)


@contextmanager
def _functions_on(device: str):
    """Inside, functions do on meta tensors what they do on a real device; nothing is changed for fake tensors."""
    if device != "meta":
        yield
        return
    # Networks make tensors of their own, such as embeddings of positions; these have to be meta tensors as well.
    with torch.device("meta"), _FusedAttention():
        yield


class _FusedAttention(TorchFunctionMode):
    """Meta tensors would take the attention that writes out its matrix of weights; a real device takes a fused one, and
    so do they inside this mode."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is nn.functional.scaled_dot_product_attention:
            return self._fused(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _fused(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        # Grouped queries: several heads of queries share one of keys and values, which the kernel wants repeated.
        if enable_gqa and key.shape[-3] != query.shape[-3]:
            shape = (*query.shape[:-2], *key.shape[-2:])
            key, value = key.new_empty(shape), value.new_empty(shape)
        if attn_mask is not None:
            attn_mask = attn_mask.to(query.dtype)
        return aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
        )[0]


def _tensor(value, dtype: torch.dtype, device: str, own: torch.dtype | None = None):
    """An argument as `trace` describes it, with empty tensors in the place of shapes and of given tensors.

    own: the dtype of the network's weights; given tensors that had it get ``dtype``, others keep their own.
    """
    if isinstance(value, Given):

        def empty_like(part):
            if not isinstance(part, Tensor):
                return part
            kept = part.dtype
            if kept == own:
                kept = dtype
            return torch.empty(part.shape, dtype=kept, device=device)

        return tree_map(empty_like, value.value)
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
    """The dtype of the network's first floating-point weight; None where it has none."""
    for parameter in network.parameters():
        if parameter.is_floating_point():
            return parameter.dtype
    return None


def without_weights(network: nn.Module, dtype: torch.dtype, device: str) -> nn.Module:
    """A frozen copy whose tensors are empty ones on the device; its floating-point weights have ``dtype``."""

    def empty(tensor: Tensor) -> Tensor:
        own = tensor.dtype
        if tensor.is_floating_point() and own != torch.float64:  # in float64 some models keep tables of frequencies
            own = dtype
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=own, device=device)

    # deepcopy takes what its memo holds under an object's id as the copy: so no weight is ever read or copied.
    memo: dict[int, object] = {}
    for module in network.modules():
        # Some modules keep tensors as plain attributes, or in lists and dicts, where no buffer shows them.
        attributes = [value for name, value in vars(module).items() if not name.startswith("_")]
        for tensor in (*module._buffers.values(), *tree_leaves(attributes)):
            if isinstance(tensor, Tensor):
                memo[id(tensor)] = empty(tensor)
        for tensor in module._parameters.values():
            if tensor is not None:
                memo[id(tensor)] = nn.Parameter(empty(tensor), requires_grad=False)
    return copy.deepcopy(network, memo).eval()


def parameters(network: nn.Module) -> int:
    """The number of parameters."""
    return sum(parameter.numel() for parameter in network.parameters())


def weight_bytes(network: nn.Module) -> int:
    """Bytes of parameters and buffers in the dtypes that they have."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (*network.parameters(), *network.buffers()))
