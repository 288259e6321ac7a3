"""The experiments behind the tables: which cells each needs, measuring them, and reading what is recorded."""

from ...lazy import names_of

_PLAN = (
    "ADAPTED",
    "DEV",
    "GFLOP",
    "MAIN",
    "METHODS",
    "PAIRED",
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
    "in_words",
    "is_flux",
    "judging",
    "l1",
    "learning",
    "minus",
    "paired",
    "planned",
    "progress",
    "recorded",
    "smaller",
    "table",
    "tuned_l1",
)

__getattr__, __dir__, __all__ = names_of(__name__, dict.fromkeys(_PLAN, "plan"))
