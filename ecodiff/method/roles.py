"""The roles of linear layers in a feed-forward (Eq. 10), found by trying and not by name.

Feed-forwards differ in how they name their layers and in what lies between: w1 and w3 beside w2, gate_proj and up_proj
beside down_proj, one layer whose output is split in two, or a plain pair. What makes a hidden neuron removable is the
same for all: some layers write it, one layer reads it, and nothing mixes it with others on the way. Whether this is so
is tried on a small copy of the module with random weights. One neuron that is gated to zero must give what the module
without this neuron gives.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor, nn

# Sizes of the small copy. They differ, so that a layer cannot be taken for another by its width.
_WIDTH, _UNITS = 6, 4


@dataclass(frozen=True)
class Roles:
    """Which layers of a feed-forward write its units, and which one reads them; names relative to the module.

    writers: (layer name, how its rows belong to units).  reader: name of the layer whose column j reads unit j.
    """

    writers: tuple[tuple[str, str], ...]
    reader: str


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

    A candidate has two or three linear layers in all and no other parameters. It must give a tensor for a tensor
    [batch, tokens, channels].
    """
    layers = {name: child for name, child in module.named_modules() if isinstance(child, nn.Linear)}
    others = sum(parameter.numel() for parameter in module.parameters())
    for layer in layers.values():
        others -= sum(parameter.numel() for parameter in layer.parameters(recurse=False))
    if not 2 <= len(layers) <= 3 or others or any(True for _ in module.buffers()):
        return None
    known = type(module), repr(module)
    if known not in _TRIED:
        sizes = [(name, layer.in_features, layer.out_features) for name, layer in layers.items()]
        fitting = (roles for roles in _candidates(sizes) if _one_by_one(module, roles))
        _TRIED[known] = next(fitting, None)
    return _TRIED[known]


# What was tried, by class and print: the blocks of a network have feed-forwards that are alike.
_TRIED: dict[tuple[type, str], Roles | None] = {}


def _candidates(sizes: Sequence[tuple[str, int, int]]) -> Iterator[Roles]:
    """Every assignment of roles that the sizes of the layers allow."""
    for reader, units, _ in sizes:
        writers = [(name, rows) for name, _, rows in sizes if name != reader]
        widths = {columns for name, columns, _ in sizes if name != reader}
        if len(widths) != 1 or units == 0:
            continue
        choices = []
        for name, rows in writers:
            choices.append([(name, layout) for layout, count in LAYOUTS.items() if rows == count * units])
        for chosen in product(*choices):
            yield Roles(tuple(chosen), reader)


def _one_by_one(module: nn.Module, roles: Roles) -> bool:
    """Whether each unit, and all but one, can be removed from a small copy: gated to zero equals cut."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, layout in roles.writers:
        layer = module.get_submodule(name)
        weights[name] = _random_layer(_WIDTH, LAYOUTS[layout] * _UNITS, layer.bias is not None, generator)
    reader = module.get_submodule(roles.reader)
    weights[roles.reader] = _random_layer(_UNITS, _WIDTH + 1, reader.bias is not None, generator)
    x = torch.randn(2, 3, _WIDTH, generator=generator)
    keeps = [torch.arange(_UNITS) != unit for unit in range(_UNITS)]
    keeps.append(torch.arange(_UNITS) == 1)
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            whole = _shell(module, weights)(x)
            for keep in keeps:
                gated = dict(weights)
                gated[roles.reader] = _gated(weights[roles.reader], keep)
                cut = {}
                for name, layout in roles.writers:
                    cut[name] = _cut(weights[name], 0, _rows(layout, keep))
                cut[roles.reader] = _cut(weights[roles.reader], 1, keep)
                masked, removed = _shell(module, gated)(x), _shell(module, cut)(x)
                if masked.shape != removed.shape or not torch.allclose(masked, removed, atol=1e-5):
                    return False
                if torch.allclose(masked, whole, atol=1e-5):  # a unit that does nothing shows nothing
                    return False
    except Exception:  # whatever a module's own code may raise for inputs that are not made for it
        return False
    return True


def _shell(module: nn.Module, layers: Mapping[str, nn.Linear], name: str = "") -> nn.Module:
    """A copy of the module with these layers; hooks, patched methods and weights stay behind."""
    if name in layers:
        return layers[name]
    copy = object.__new__(type(module))
    nn.Module.__init__(copy)
    own = set(vars(copy))
    for key, value in vars(module).items():
        if key not in own and key not in ("forward", "_hf_hook", "_old_forward"):
            copy.__dict__[key] = value
    for child_name, child in module.named_children():
        full = f"{name}.{child_name}" if name else child_name
        copy._modules[child_name] = _shell(child, layers, full)
    return copy.eval()


def _random_layer(columns: int, rows: int, bias: bool, generator: torch.Generator) -> nn.Linear:
    layer = nn.Linear(columns, rows, bias=bias, device="meta")  # so that the global random state stays as it is
    layer.weight = nn.Parameter(torch.randn(rows, columns, generator=generator))
    if bias:
        layer.bias = nn.Parameter(torch.randn(rows, generator=generator))
    return layer


def _rows(layout: str, keep: Tensor) -> Tensor:
    """Which rows of a writer with this layout stay."""
    return torch.cat([keep.repeat_interleave(size) for _, size in rows_of_unit(layout, len(keep))])


def _gated(layer: nn.Linear, keep: Tensor) -> nn.Linear:
    """The layer that reads units with gates: columns of closed ones are zero."""
    gated = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    gated.weight, gated.bias = nn.Parameter(layer.weight * keep), layer.bias
    return gated


def _cut(layer: nn.Linear, dimension: int, keep: Tensor) -> nn.Linear:
    """The layer with some of its rows (dimension 0) or columns (1)."""
    weight = layer.weight[keep] if dimension == 0 else layer.weight[:, keep]
    bias = layer.bias
    if bias is not None and dimension == 0:
        bias = nn.Parameter(bias[keep])
    cut = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    cut.weight, cut.bias = nn.Parameter(weight), bias
    return cut
