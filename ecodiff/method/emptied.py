"""What stands in the place of parts that have lost all units: their output layer's bias, and no weight without entries.

Quantisation, exporters and attention slicing look for linear layers and attentions, and fail at weights of size zero.
What an attention without heads returns is its processor's business: one output, or one for pictures and one for text,
with a residual or without. This is found by running it (`form_of`), never by the name of a processor.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor, nn

from .layers import EmptiedLayer
from .roles import bare, random_layer, random_tensor, shell

# Layers that read the heads of an attention, in the order in which attentions return what these layers write.
OUTPUT_LAYERS = ("to_out", "to_add_out", "out_layer", "img_attn_proj", "txt_attn_proj")


class EmptiedAttention(nn.Module):
    """An attention without heads: nothing is attended to, the output layers add their bias.

    Returns what the attention's own processor would. `emptied` makes it a subclass of the attention's class, too, so
    that what looks for attentions (perturbed guidance, lists of processors) still finds it.
    """

    of: type  # the attention's class
    outputs: int

    def __reduce_ex__(self, protocol):
        return _new, (self.of,), self.__dict__

    def forward(self, hidden_states, encoder_hidden_states=None, *args, **kwargs):
        names = [name for name in OUTPUT_LAYERS if getattr(self, name, None) is not None]
        no_channels = hidden_states[..., :0]
        if not names:  # a parallel block, whose proj_out reads what is left
            return no_channels
        pictures = hidden_states.ndim == 4  # channels first
        if pictures:
            no_channels = hidden_states.movedim(1, -1)[..., :0]
        output = self._read(names[0], no_channels)
        if pictures:
            output = output.movedim(-1, 1)
        if getattr(self, "residual_connection", False):
            output = output + hidden_states
        output = output / getattr(self, "rescale_output_factor", 1.0)
        if self.outputs == 1 or encoder_hidden_states is None:
            return output
        context = encoder_hidden_states[..., :0]
        return output, self._read(names[1], context) if len(names) > 1 else context

    def _read(self, name: str, x: Tensor) -> Tensor:
        layer = getattr(self, name)
        if isinstance(layer, (nn.ModuleList, nn.Sequential)):  # a linear layer and a dropout
            for part in layer:
                x = part(x)
            return x
        return layer(x)

    def fuse_projections(self, fuse: bool = True) -> None:
        """Do nothing: there are no projections to fuse."""

    def unfuse_projections(self) -> None:
        """Do nothing: there are no projections to unfuse."""

    def set_attention_slice(self, slice_size) -> None:
        """Do nothing: there are no heads to take in slices."""

    def set_use_memory_efficient_attention_xformers(self, *args, **kwargs) -> None:
        """Do nothing: nothing is attended to."""


def emptied(attention: nn.Module, outputs: int) -> EmptiedAttention:
    """What takes the place of an attention whose heads are all gone; ``outputs``: what `form_of` says of it."""
    module = bare(_new(type(attention)), attention)
    for name in (*OUTPUT_LAYERS, "processor"):
        part = getattr(attention, name, None)
        if isinstance(part, nn.Module):
            setattr(module, name, part)
    module.outputs = outputs
    return module.train(attention.training)


@cache
def _emptied_class(cls: type) -> type:
    name = "Emptied_" + f"{cls.__module__}.{cls.__qualname__}".replace(".", "_")
    made = type(name, (EmptiedAttention, cls), {"__module__": __name__, "of": cls})
    if cls.__module__.startswith("diffusers."):
        globals()[name] = made  # as any class of a library, it is what an import of its name gives
    return made


def _new(cls: type) -> nn.Module:
    return object.__new__(_emptied_class(cls))


def is_emptied(module: nn.Module) -> bool:
    """Whether this stands in the place of a part that has lost all units."""
    return isinstance(module, (EmptiedLayer, EmptiedAttention))


def form_of(attention: nn.Module) -> int:
    """How many outputs an attention without heads returns, 1 or 2; 0 where `EmptiedAttention` cannot stand in for it.

    The attention runs with layers that write zeros in the place of queries, keys and values, on small inputs on the
    CPU. Without heads it must return the same.
    """
    processor = type(getattr(attention, "processor", None))
    known = type(attention), processor, repr(attention), getattr(attention, "residual_connection", None)
    if known not in _FORMS:
        _FORMS[known] = next((outputs for outputs in (1, 2) if _stands_in(attention, outputs)), 0)
    return _FORMS[known]


# What was tried, by what attentions that are alike have in common.
_FORMS: dict[tuple, int] = {}


class _Zeros(nn.Module):
    """A layer that writes zeros: queries, keys and values of heads that are not there."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        if x.shape[-1] != self.in_features:
            raise ValueError(f"{x.shape[-1]} channels for a layer of {self.in_features}")
        return x.new_zeros(*x.shape[:-1], self.out_features)


def _stands_in(attention: nn.Module, outputs: int) -> bool:
    """Whether the attention and what would stand in its place return the same wherever the attention runs."""
    generator = torch.Generator().manual_seed(0)
    layers: dict[str, nn.Module] = {}
    widths = []
    for name, layer in attention.named_modules():
        if not isinstance(layer, nn.Linear):
            continue
        if name.split(".")[0] in OUTPUT_LAYERS:
            layers[name] = EmptiedLayer(random_layer(layer, 1, layer.out_features, generator))
        else:
            layers[name] = _Zeros(layer)
            widths.append((name, layer.in_features))
    if not widths:
        return False
    width = widths[0][1]
    joint = [columns for name, columns in widths if name.startswith("add_")]
    context = next((columns for name, columns in widths if name.startswith(("add_", "to_k", "to_v"))), width)
    x = random_tensor((2, 4, width), generator)
    text = random_tensor((2, 3, context), generator)
    pictures = x.movedim(1, -1).unflatten(-1, (2, 2))

    compared = set()
    for inputs in ((x,), (x, text), (pictures,), (pictures, text)):
        same = _same_for(attention, layers, outputs, inputs)
        if same is False:
            return False
        if same:
            compared.add(len(inputs) + inputs[0].ndim)
    # With layers for a text of its own it must have been seen with a text.
    return bool(compared & {5, 6}) if joint else bool(compared)


def _same_for(attention: nn.Module, layers: Mapping[str, nn.Module], outputs: int, inputs: tuple) -> bool | None:
    """Whether both return the same for these inputs; None where the attention itself does not run."""
    names = ("hidden_states", "encoder_hidden_states")
    if len(inputs) == 2 and not _takes_text(attention):
        return None
    call = {name: value.clone() for name, value in zip(names, inputs, strict=False)}
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            probe = shell(attention, layers)
            if hasattr(attention, "processor"):  # a copy, since a processor of the user's may take notes of its calls
                probe.processor = copy.deepcopy(attention.processor)
            wanted = probe(**call)
    except Exception:  # whatever a processor may raise for inputs that are not made for it
        return None
    call = {name: value.clone() for name, value in zip(names, inputs, strict=False)}
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            given = emptied(shell(attention, layers), outputs)(**call)
    except Exception:
        return False
    if isinstance(wanted, Tensor) or isinstance(given, Tensor):
        wanted, given = (wanted,), (given,)
    if len(wanted) != len(given):
        return False
    return all(_agree(one, other) for one, other in zip(wanted, given, strict=True))


def _takes_text(attention: nn.Module) -> bool:
    """Whether the attention's processor has an argument for a text; diffusers warns of those that it has not."""
    processor = getattr(attention, "processor", None) or attention.forward
    return "encoder_hidden_states" in inspect.signature(processor).parameters


def _agree(wanted, given) -> bool:
    """Whether two outputs are the same; what has no channels stands for zeros, which no output layer has read."""
    if not isinstance(wanted, Tensor) or not isinstance(given, Tensor) or wanted.shape[:-1] != given.shape[:-1]:
        return False
    if given.shape[-1] == 0:
        return not wanted.any()
    return wanted.shape == given.shape and torch.allclose(wanted, given, atol=1e-5)
