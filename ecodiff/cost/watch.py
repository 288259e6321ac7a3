"""What every operation of a network costs, watched while it runs: operations, and bytes that are kept."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Set
from dataclasses import dataclass
from functools import cache, wraps

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from ecodiff.pipelines.forward_hooks import replaced_forward

aten = torch.ops.aten


_LINEAR = {aten.mm, aten.addmm, aten._addmm_activation, aten.addmv, aten.mv}


_CONVOLUTION = {aten.convolution, aten._convolution, aten.cudnn_convolution, aten._slow_conv2d_forward}


# Products of two activations: fused attention, or the batched products of processors that write it out.
_FUSED = {
    aten._scaled_dot_product_flash_attention_for_cpu,
    aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_efficient_attention,
    aten._scaled_dot_product_cudnn_attention,
}


_BATCHED = {aten.bmm, aten.baddbmm}


@dataclass(frozen=True)
class Flops:
    """Floating-point operations, 2 a multiply-add: of linear layers, of convolutions, of attention's two products."""

    linear: int
    convolution: int
    attention: int

    @property
    def paper(self) -> int:
        """Linear layers and convolutions, attention products left out, as in the paper's Table 1."""
        return self.linear + self.convolution

    @property
    def total(self) -> int:
        return self.linear + self.convolution + self.attention

    def __mul__(self, factor: float) -> Flops:
        return Flops(*(round(value * factor) for value in (self.linear, self.convolution, self.attention)))


def flops_while(model: nn.Module, run: Callable[[], object]) -> Flops:
    """Operations of all calls of a model while ``run()`` runs, counted as they happen: for a model whose calls differ,
    such as one with feature reuse. ``trace`` needs neither weights nor the calls' arithmetic."""
    watch = Watch(set(), {storage_key(tensor) for tensor in (*model.parameters(), *model.buffers())})

    def wrap(forward):
        @wraps(forward)
        def counting(*args, **kwargs):
            with watch:
                return forward(*args, **kwargs)

        return counting

    with replaced_forward(model, wrap):
        run()
    return Flops(**watch.flops)


class Watch(TorchDispatchMode):
    """Counts operations, and the bytes of storages that are alive, now and at most; ``known`` ones do not count.

    ``layouts`` is a memory that several watches may share: what an operation makes of meta tensors follows from their
    layouts alone, and a network of equal blocks asks the same question hundreds of times.
    """

    def __init__(self, known: set[int], weights: Set[int] = frozenset(), layouts: dict | None = None):
        super().__init__()
        self._weights = weights
        self._layouts = {} if layouts is None else layouts
        self.alive = self.peak = 0
        self.flops = dict.fromkeys(("linear", "convolution", "attention"), 0)
        self._seen = dict.fromkeys(known)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, packet = kwargs or {}, func._overloadpacket
        out = self._run(func, args, kwargs)
        for value in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(value, Tensor):
                self._count(value)
        if packet in _LINEAR:
            self.flops["linear"] += flop_registry[packet](*args, **kwargs, out_val=out)
        elif packet in _CONVOLUTION:
            self.flops["convolution"] += flop_registry[packet](*args, **kwargs, out_val=out)
        elif packet in _FUSED:
            self.flops["attention"] += sdpa_flop_count(*(part.shape for part in args[:3]))
        elif packet in _BATCHED:  # a linear layer too, where its input is not contiguous
            kind = (
                "linear"
                if any(isinstance(part, Tensor) and storage_key(part) in self._weights for part in args)
                else "attention"
            )
            self.flops[kind] += flop_registry[packet](*args, **kwargs, out_val=out)
        return out

    def _run(self, func, args, kwargs):
        """The operation's result; from memory where the operation makes new tensors out of meta tensors."""
        if not _makes_new(func) or (asked := _layout((args, kwargs))) is None:
            return func(*args, **kwargs)
        question = (func, asked)
        if (known := self._layouts.get(question, _UNKNOWN)) is _UNKNOWN:
            out = func(*args, **kwargs)
            self._layouts[question] = _recipe(out)
            return out
        return func(*args, **kwargs) if known is None else _made(known)

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return
        size = storage.nbytes()

        def gone(_, key=key, size=size):
            self._seen.pop(key, None)
            self.alive -= size

        self._seen[key] = weakref.ref(storage, gone)
        self.alive += size
        self.peak = max(self.peak, self.alive)


_UNKNOWN = object()


@cache
def _makes_new(func) -> bool:
    """Whether all that an operation returns is new: no view of an argument, nothing written in place."""
    schema = func._schema
    return not schema.is_mutable and all(value.alias_info is None for value in (*schema.arguments, *schema.returns))


def _layout(value):
    """What of an argument decides the result, as something hashable; None where a tensor is not a plain meta tensor."""
    if isinstance(value, Tensor):
        if type(value) not in (Tensor, nn.Parameter) or not value.is_meta:
            return None
        return (value.shape, value.stride(), value.dtype)
    if isinstance(value, (tuple, list)):
        parts = tuple(_layout(part) for part in value)
        return None if None in parts else parts
    if isinstance(value, dict):
        return _layout(tuple(value.items()))
    return (type(value), value)


def _recipe(out):
    """What `_made` needs to make such a result again; None where it holds more than plain tensors of their own."""
    if isinstance(out, Tensor):
        shape, stride = tuple(out.shape), out.stride()
        again = torch.empty_strided(shape, stride, dtype=out.dtype, device="meta")
        plain = out.is_meta and out.storage_offset() == 0
        same = plain and again.untyped_storage().nbytes() == out.untyped_storage().nbytes()
        return (Tensor, shape, stride, out.dtype) if same else None
    if out is None:
        return (None,)
    if isinstance(out, (tuple, list)):
        parts = [_recipe(part) for part in out]
        return None if None in parts else (type(out), *parts)
    return None


def _made(recipe):
    kind, *parts = recipe
    if kind is Tensor:
        return torch.empty_strided(parts[0], parts[1], dtype=parts[2], device="meta")
    return None if kind is None else kind([_made(part) for part in parts])


def storage_key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
