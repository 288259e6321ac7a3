"""Errata: what in the paper its own printed numbers or formulas contradict, each with the computation shown.

Every erratum is a function without arguments that computes anew, from `ecodiff.lab.paper` or from the formulas as
printed. What no computation decides (wording, missing references, intent) is left out. ``VERSIONS`` compares the
preprint with the published version, of which the numbers are second-hand; the others are about the preprint alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .algebra import ALGEBRA
from .arithmetic import ARITHMETIC
from .shown import Erratum, Line
from .versions import VERSIONS

ERRATA: tuple[Callable[[], Erratum], ...] = (*ARITHMETIC, *ALGEBRA, *VERSIONS)


def check(errata: Sequence[Callable[[], Erratum]] = ERRATA) -> list[Erratum]:
    """Compute them all, in order."""
    return [erratum() for erratum in errata]


__all__ = ["ALGEBRA", "ARITHMETIC", "ERRATA", "VERSIONS", "Erratum", "Line", "check"]
