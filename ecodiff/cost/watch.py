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
    """Floating-point operations, 2 for each multiply-add: of linear layers, convolutions, attention's two products."""

    linear: int
    convolution: int
    attention: int

    @property
    def paper(self) -> int:
        """Linear layers and convolutions, attention products left out, as in the paper's Table 1."""
        return self.linear + self.convolution

    @property
    def total(self) -> int:
        """All of them, attention's products included."""
        return self.linear + self.convolution + self.attention

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.linear + other.linear, self.convolution + other.convolution, self.attention + other.attention)

    def __mul__(self, factor: float) -> Flops:
        return Flops(round(self.linear * factor), round(self.convolution * factor), round(self.attention * factor))


def flops_while(model: nn.Module, run: Callable[[], object]) -> Flops:
    """Operations of all calls of a model while ``run()`` runs, counted as they happen.

    This is for a model whose calls differ, such as one that reuses features. Where they are all alike, ``trace`` counts
    one of them without weights and without computing anything.
    """
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
    """Counts operations, and the bytes of the storages that are alive, now (``alive``) and at most (``peak``).

    known: keys (see `storage_key`) of storages that do not count, because they are there in any case.
    weights: keys of the model's weights, which tell a batched product of a linear layer from one of attention.
    layouts: a memory that several watches may share: what an operation makes of meta tensors follows from their
        layouts alone, and a network of equal blocks repeats the same operations hundreds of times.
    """

    def __init__(self, known: set[int], weights: Set[int] = frozenset(), layouts: dict | None = None):
        super().__init__()
        self._weights = weights
        self._layouts = {} if layouts is None else layouts
        self.alive = self.peak = 0
        self.flops = dict.fromkeys(("linear", "convolution", "attention"), 0)
        # Keys of the known storages and of those alive; the latter with the weak reference that tells of their end.
        self._seen = dict.fromkeys(known)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = self._run(func, args, kwargs)
        # Most operations return one tensor: tree_leaves, which is slow, is left to the others.
        values = (out,) if isinstance(out, Tensor) else tree_leaves(out)
        for value in values:
            if isinstance(value, Tensor):
                self._count(value)

        packet = func._overloadpacket
        if packet in _LINEAR:
            self.flops["linear"] += flop_registry[packet](*args, **kwargs, out_val=out)
        elif packet in _CONVOLUTION:
            self.flops["convolution"] += flop_registry[packet](*args, **kwargs, out_val=out)
        elif packet in _FUSED:
            query, key, value = args[:3]
            self.flops["attention"] += sdpa_flop_count(query.shape, key.shape, value.shape)
        elif packet in _BATCHED:
            kind = self._kind_of_batched(args)
            self.flops[kind] += flop_registry[packet](*args, **kwargs, out_val=out)
        return out

    def _kind_of_batched(self, args) -> str:
        """Whose product this is: PyTorch turns a linear layer into one too, where its input is not contiguous."""
        for part in args:
            if isinstance(part, Tensor) and storage_key(part) in self._weights:
                return "linear"
        return "attention"

    def _run(self, func, args, kwargs):
        """The operation's result; from memory where the operation makes new tensors out of meta tensors."""
        if not _makes_new(func):
            return func(*args, **kwargs)
        layout = _layout((args, kwargs))
        if layout is None:
            return func(*args, **kwargs)

        question = (func, layout)
        recipe = self._layouts.get(question, _UNKNOWN)
        if recipe is _UNKNOWN:
            out = func(*args, **kwargs)
            self._layouts[question] = _recipe(out)
            return out
        if recipe is None:
            return func(*args, **kwargs)
        # Faster than the operation, which would work out the same layout again.
        return _made(recipe)

    def _count(self, tensor: Tensor) -> None:
        """Count the tensor's storage as alive from now until its last reference goes."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        # A view shares the storage of what it views, which counts once.
        if key in self._seen:
            return
        size = storage.nbytes()

        def gone(_, key=key, size=size):
            # The address may be given to another storage at once, so that it has to be forgotten.
            self._seen.pop(key, None)
            self.alive -= size

        self._seen[key] = weakref.ref(storage, gone)
        self.alive += size
        self.peak = max(self.peak, self.alive)


# None is an answer, too: that an operation has no recipe.
_UNKNOWN = object()


@cache
def _makes_new(func) -> bool:
    """Whether all that an operation returns is new: no view of an argument, nothing written in place."""
    schema = func._schema
    return not schema.is_mutable and all(value.alias_info is None for value in (*schema.arguments, *schema.returns))


def _layout(value):
    """What of an argument decides the result, as something hashable; None where a tensor is not a plain meta tensor."""
    # Subclasses such as FakeTensor have rules of their own.
    if isinstance(value, Tensor):
        if type(value) not in (Tensor, nn.Parameter) or not value.is_meta:
            return None
        return (value.shape, value.stride(), value.dtype)
    if isinstance(value, (tuple, list)):
        parts = tuple(_layout(part) for part in value)
        if None in parts:
            return None
        return parts
    if isinstance(value, dict):
        return _layout(tuple(value.items()))
    return (type(value), value)  # with its type, since 1 == 1.0 == True, and the result's dtype may differ


def _recipe(out):
    """What `_made` needs to make such a result again; None where it holds more than plain tensors of their own."""
    if isinstance(out, Tensor):
        shape, stride = tuple(out.shape), out.stride()
        if not out.is_meta or out.storage_offset() != 0:
            return None
        # A result may be part of a larger storage, which its shape and strides do not show.
        again = torch.empty_strided(shape, stride, dtype=out.dtype, device="meta")
        if again.untyped_storage().nbytes() != out.untyped_storage().nbytes():
            return None
        return (Tensor, shape, stride, out.dtype)
    if out is None:
        return (None,)
    if isinstance(out, (tuple, list)):
        parts = [_recipe(part) for part in out]
        if None in parts:
            return None
        return (type(out), *parts)
    return None


def _made(recipe):
    """A result like the one that the recipe was taken from."""
    kind, *parts = recipe
    if kind is Tensor:
        shape, stride, dtype = parts
        return torch.empty_strided(shape, stride, dtype=dtype, device="meta")
    if kind is None:
        return None
    return kind([_made(part) for part in parts])


def storage_key(tensor: Tensor) -> int:
    """What tells the tensor's storage from all others that are alive: its address. Views of one tensor share it."""
    return tensor.untyped_storage()._cdata
