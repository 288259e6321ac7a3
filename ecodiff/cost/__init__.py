"""What pruning costs and saves, counted without weights: parameters, operations and memory, before and after."""

from ..lazy import names_of

__getattr__, __dir__, __all__ = names_of(
    __name__, dict.fromkeys(("cost", "Cost", "keep_last_for", "parse_bytes", "usable", "gb"), "counting")
)
