"""The experiments behind the tables: which cells each needs, measuring them, and reading what is recorded."""

from ecodiff.lazy import names_of

_HOMES = {
    "measure": ("measured",),
    "plan": (
        "ADAPTED",
        "DEV",
        "MAIN",
        "METHODS",
        "QUOTED",
        "SCHNELL",
        "SD2",
        "SDXL",
        "SEEDS",
        "STUDIES",
        "Study",
        "base",
        "cells",
        "changed",
        "check",
        "is_flux",
        "judging",
        "l1",
        "learning",
        "planned",
        "smaller",
        "tuned_l1",
    ),
    "results": (
        "GFLOP",
        "PAIRED",
        "in_words",
        "minus",
        "paired",
        "progress",
        "recorded",
        "table",
    ),
}

__getattr__, __dir__, __all__ = names_of(__name__, _HOMES)
