"""Checks of numbers that a user gives: each returns the number, or raises an EcoDiffError that says what to give."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping

from ecodiff.errors import EcoDiffError


def checked_seed(value, where: str) -> int:
    """The seed as an int. Raises EcoDiffError, beginning with ``where``, for anything that is no whole number.

    A fraction would otherwise be cut off, so that 0.2 and 0.7 would silently be one seed.
    """
    try:
        seed = operator.index(value)
    except (TypeError, RuntimeError, ValueError) as error:  # tensors raise the latter two
        raise EcoDiffError(f"{where}: the seed {value!r} is not a whole number; give an int such as 0.") from error
    if not -(2**63) <= seed < 2**64:
        raise EcoDiffError(f"{where}: the seed {seed} does not fit into 64 bits, which is what torch takes.")
    return seed


def checked_guidance(value: float | None, where: str) -> None:
    """Raise EcoDiffError for a guidance scale that is no finite number (None, the pipeline's default, is right).

    A NaN is neither above nor below 1, so that a pipeline would silently switch guidance off.
    """
    if value is None:
        return
    try:
        finite = math.isfinite(value)
    except TypeError as error:
        raise EcoDiffError(f"{where}: guidance_scale={value!r} is not a number.") from error
    if not finite:
        raise EcoDiffError(f"{where}: guidance_scale={value} is not finite: give a number such as 5.0.")


def checked_call(call: Mapping, where: str) -> None:
    """Raise EcoDiffError where an argument of a pipeline's call is a float that is not finite."""
    for name, value in call.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise EcoDiffError(f"{where}: {name}={value} is not finite: give a number, or leave it out.")
