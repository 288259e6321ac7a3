"""What pruning costs and saves, counted without weights: parameters, operations and memory, before and after."""

from ecodiff.lazy import names_of

_HOMES = {"counting": ("Cost", "cost", "fit"), "solve": ("Solved", "solve"), "units": ("gb", "parse_bytes", "usable")}

__getattr__, __dir__, __all__ = names_of(__name__, _HOMES)
