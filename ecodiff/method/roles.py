"""The roles of linear layers in a feed-forward (Eq. 10), found by trying and not by name.

Feed-forwards differ in how they name their layers and in what lies between: w1 and w3 beside w2, gate_proj and up_proj
beside down_proj, one layer whose output is split in two, or a plain pair. What makes a hidden neuron removable is the
same for all: some layers write it, one layer reads it, and nothing mixes it with others on the way. Whether this is so
is tried on a small copy of the module with random weights. One neuron that is gated to zero must give what the module
without this neuron gives.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from .layers import EmptiedLayer, columns_of, cut_layer, is_depthwise, is_pointwise

# Units of the small copy. What surrounds them has its own width.
_UNITS = 4
# A model may be loaded in another dtype and on another device while its layers are tried.
_PLAIN: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}


@dataclass(frozen=True)
class Roles:
    """Which layers of a feed-forward write its units, and which one reads them; names relative to the module.

    writers: (layer name, how its rows belong to units); a depthwise convolution, which passes units on, is one of them.
    reader: name of the layer whose column j reads unit j.  without: whether the module runs without any unit.
    """

    writers: tuple[tuple[str, str], ...]
    reader: str
    without: bool = True


# How the rows of a writer belong to units: row j; rows j and j + units (a gated activation whose layer is split in two
# halves); or rows 2j and 2j + 1.
LAYOUTS = {"plain": 1, "halves": 2, "pairs": 2}


def rows_of_unit(layout: str, units: int) -> list[tuple[int, int]]:
    """The rows of units as (offset of the first unit, rows a unit) of a writer with this layout."""
    if layout == "halves":
        return [(0, 1), (units, 1)]
    return [(0, LAYOUTS[layout])]


def feed_forward_roles(module: nn.Module) -> Roles | None:
    """The roles of the layers of a module if it is a feed-forward whose neurons can go one by one, else None.

    A candidate has two or three linear layers (or convolutions of one place), perhaps depthwise convolutions between
    them, and little else. It must give a tensor for a tensor of tokens or of pictures.
    """
    layers = _layers(module)
    linear = [layer for layer in layers.values() if not is_depthwise(layer)]
    if not 2 <= len(linear) <= 3 or not _little_else(module, layers) or any(True for _ in module.buffers()):
        return None
    known = type(module), repr(module)
    if known not in _TRIED:
        fitting = (_proved(module, roles) for roles in _candidates(layers))
        _TRIED[known] = next((roles for roles in fitting if roles is not None), None)
    return _TRIED[known]


def has_sizes_of_feed_forward(module: nn.Module) -> bool:
    """Whether a module holds little else than linear layers, of which one could read what the others write."""
    layers = _layers(module)
    linear = all(isinstance(layer, nn.Linear) for layer in layers.values())
    return linear and len(layers) >= 2 and _little_else(module, layers) and any(True for _ in _candidates(layers))


def _little_else(module: nn.Module, layers: Mapping[str, nn.Module]) -> bool:
    """Whether these few layers have most of the parameters of a module."""
    own = 0
    for layer in layers.values():
        own += sum(parameter.numel() for parameter in layer.parameters(recurse=False))
    others = sum(parameter.numel() for parameter in module.parameters()) - own
    return len(layers) <= 4 and 2 * others <= own


def _layers(module: nn.Module) -> dict[str, nn.Module]:
    """{name: layer} of the layers of a module that may write units, pass them on or read them."""
    layers = {}
    for name, child in module.named_modules():
        if is_pointwise(child) or is_depthwise(child):
            layers[name] = child
    return layers


# What was tried, by class and print: the blocks of a network have feed-forwards that are alike.
_TRIED: dict[tuple[type, str], Roles | None] = {}


def _candidates(layers: Mapping[str, nn.Module]) -> Iterator[Roles]:
    """Every assignment of roles that the sizes of the layers allow."""
    for reader, reading in layers.items():
        units = columns_of(reading)
        writers = {name: layer for name, layer in layers.items() if name != reader}
        widths = {columns_of(layer) for layer in writers.values() if not is_depthwise(layer)}
        if is_depthwise(reading) or len(widths) != 1 or units == 0:
            continue
        choices = []
        for name, layer in writers.items():
            rows = len(layer.weight)
            choices.append([(name, layout) for layout, count in LAYOUTS.items() if rows == count * units])
        for chosen in product(*choices):
            yield Roles(tuple(chosen), reader)


def _proved(module: nn.Module, roles: Roles) -> Roles | None:
    """The roles if each unit, and all but one, can be removed from a small copy: gated to zero equals cut."""
    generator = torch.Generator().manual_seed(0)
    weights: dict[str, nn.Module] = {}
    width = 0
    for name, layout in roles.writers:
        layer = module.get_submodule(name)
        if not is_depthwise(layer):
            width = columns_of(layer)
        weights[name] = random_layer(layer, columns_of(layer), LAYOUTS[layout] * _UNITS, generator)
    reader = module.get_submodule(roles.reader)
    weights[roles.reader] = random_layer(reader, _UNITS, len(reader.weight), generator)
    units = torch.arange(_UNITS, device="cpu")
    for call in _calls(width, reader, generator):
        if all(_gated_is_cut(module, roles, weights, units != unit, call) for unit in range(_UNITS)):
            if _gated_is_cut(module, roles, weights, units == 1, call):
                return replace(roles, without=_gated_is_cut(module, roles, weights, units < 0, call))
    return None


def _calls(width: int, reader: nn.Module, generator: torch.Generator) -> list[tuple]:
    """Arguments that a feed-forward of this width may be called with: tokens; pictures and films in any order."""
    if isinstance(reader, nn.Linear):
        return [(random_tensor((2, 3, width), generator),)]
    places = (3,) * len(reader.kernel_size)
    shapes = [(2, width, *places), (2, *places, width), (2, 2, *places, width)]
    calls: list[tuple] = [(random_tensor(shape, generator),) for shape in shapes]
    # Tokens of a film, and its frames, height and width.
    calls.append((random_tensor((2, 18, width), generator), (2, 3, 3)))
    return calls


def _gated_is_cut(module: nn.Module, roles: Roles, weights: Mapping[str, nn.Module], keep: Tensor, call: tuple) -> bool:
    """Whether a copy in which units are gated gives what a copy without them gives, and not what the whole one does."""
    gated, cut = dict(weights), dict(weights)
    gated[roles.reader] = _gated(weights[roles.reader], keep)
    entries = {name: (0, _rows(layout, keep)) for name, layout in roles.writers}
    entries[roles.reader] = 1, keep
    for name, (dimension, left) in entries.items():
        cut[name] = copy.deepcopy(weights[name])
        cut_layer(cut[name], dimension, left)
        if not left.any():
            cut[name] = EmptiedLayer(cut[name])
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            whole, masked, removed = (shell(module, layers)(*copy.deepcopy(call)) for layers in (weights, gated, cut))
        if masked.shape != removed.shape or not torch.allclose(masked, removed, rtol=1e-4, atol=1e-4):
            return False
        return not torch.allclose(masked, whole, rtol=1e-4, atol=1e-4)  # a unit that does nothing shows nothing
    except Exception:  # whatever a module's own code may raise for inputs that are not made for it
        return False


def bare(made: nn.Module, module: nn.Module) -> nn.Module:
    """``made``, as `__new__` gave it, with a module's attributes; its parameters, children and hooks stay behind."""
    nn.Module.__init__(made)
    own = set(vars(made))
    for key, value in vars(module).items():
        if key not in own and key not in ("forward", "_hf_hook", "_old_forward"):
            made.__dict__[key] = value
    return made


def shell(module: nn.Module, layers: Mapping[str, nn.Module], name: str = "") -> nn.Module:
    """A copy of the module on the CPU with these layers; hooks, patched methods and weights stay behind.

    Parameters of other parts, such as norms, are ones.
    """
    if name in layers:
        return layers[name]
    small = bare(object.__new__(type(module)), module)
    for key, parameter in module._parameters.items():
        small._parameters[key] = None if parameter is None else nn.Parameter(torch.ones(parameter.shape, **_PLAIN))
    for key, buffer in module._buffers.items():
        if buffer is not None and buffer.is_meta:
            buffer = torch.zeros_like(buffer, device="cpu")
        small._buffers[key] = None if buffer is None else buffer.detach().cpu()
    for child_name, child in module._modules.items():
        full = f"{name}.{child_name}" if name else child_name
        small._modules[child_name] = None if child is None else shell(child, layers, full)
    return small.eval()


def random_tensor(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Random numbers on the CPU, whatever dtype and device a model is being loaded to."""
    return torch.randn(shape, generator=generator, **_PLAIN)


def random_layer(like: nn.Module, columns: int, rows: int, generator: torch.Generator) -> nn.Module:
    """A layer of the same kind with so many columns and rows; the global random state stays as it is."""
    if isinstance(like, nn.Linear):
        layer: nn.Module = nn.Linear(columns, rows, bias=like.bias is not None, device="meta")
    else:
        depthwise = is_depthwise(like)
        layer = type(like)(
            rows if depthwise else columns,
            rows,
            like.kernel_size,
            like.stride,
            like.padding,
            like.dilation,
            groups=rows if depthwise else 1,
            bias=like.bias is not None,
            device="meta",
        )
    size = layer.weight.shape[1:].numel() ** 0.5  # so that what units add is of the size of one
    # Not by assignment, which makes meta tensors of all parameters while a model is being loaded.
    weight = random_tensor(layer.weight.shape, generator) / max(size, 1)
    layer._parameters["weight"] = nn.Parameter(weight)
    if layer.bias is not None:
        layer._parameters["bias"] = nn.Parameter(random_tensor((rows,), generator))
    return layer


def _rows(layout: str, keep: Tensor) -> Tensor:
    """Which rows of a writer with this layout stay."""
    return torch.cat([keep.repeat_interleave(size) for _, size in rows_of_unit(layout, len(keep))])


def _gated(layer: nn.Module, keep: Tensor) -> nn.Module:
    """The layer that reads units with gates: columns of closed ones are zero."""
    gated = copy.deepcopy(layer)
    with torch.no_grad():
        gated.weight[:, ~keep] = 0
    return gated
