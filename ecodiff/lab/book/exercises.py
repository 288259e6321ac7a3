"""Checks of the exercises: is a reader's answer right, and where it is not, what is worth a look?

A chapter's cell ends with ``check("ex-rerun", answer)``. The right answer is computed, with the answers that readers
often give in its place, by the function of the same name in ``answers.py``; chapters hand it what it needs of theirs.
``book/exercises.yaml`` has the tolerances and the sentences. So no chapter holds an answer, and nothing is computed
before a reader has one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cache
from numbers import Real
from typing import Any

import yaml

from ecodiff.errors import EcoDiffError
from ecodiff.storage.paths import root

UNANSWERED = "not answered yet. Put your answer in the place of `...`."
LARGEST = 1e300
"""What is larger is no answer; NaN is not smaller, either."""
POINTS = "points"
"""What a function in ``answers.py`` calls the arguments at which answers that are functions are compared."""


def check(label: str, *answers: Any, **values: Any) -> None:
    """Print for each answer to an exercise whether it is right, or what to look at.

    ``label`` is the exercise's, such as ``"ex-rerun"``; an answer of ``...`` counts as not given. ``values`` are names
    of the chapter from which the right answer is computed. Whatever the answers are, nothing is raised.
    """
    print("\n".join(feedback(label, answers, values)))


@cache
def known() -> dict[str, list[dict]]:
    """What ``book/exercises.yaml`` says: the parts of each exercise that has a check, by its label."""
    return yaml.safe_load((root() / "book" / "exercises.yaml").read_text(encoding="utf-8"))


def right_and_wrong(label: str, values: dict[str, Any]) -> dict[str, Any]:
    """What `answers` computes for an exercise: right answers and usual wrong ones by their names."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # libraries warn of notebooks without widgets, as they are imported
        from . import answers  # here, since a page whose exercises are open waits for no torch

    return getattr(answers, label.replace("-", "_"))(**values)


def feedback(label: str, answers: Sequence[Any], values: dict[str, Any]) -> list[str]:
    """One sentence or two about each answer."""
    if label not in known():
        return [f"There is no check of {label!r}: the first argument is the label of an exercise, such as 'ex-rerun'."]
    parts = known()[label]
    if len(answers) != len(parts):
        return [f"{label} asks for {len(parts)} answers, and {len(answers)} were given: leave `...` for an open one."]
    names = [part.get("asks", label) for part in parts]
    if all(_is_missing(answer) for answer in answers):
        return [f"{label}: {UNANSWERED}"]
    try:
        found = right_and_wrong(label, values)
    except EcoDiffError as error:
        return [f"{label}: {error}"]
    except Exception as error:  # a chapter that was run with other parameters may lack what is needed
        why = f"{type(error).__name__}: {error}"
        return [f"{label} cannot be checked with the parameters of this run ({why})."]
    lines = []
    for name, part, answer in zip(names, parts, answers, strict=True):
        lines.append(f"{name}: {_judged(answer, part, found)}")
    return lines


def _judged(answer: Any, part: dict, found: dict[str, Any]) -> str:
    """What is to be said about one answer."""
    right, tolerance = found[part["right"]], part.get("tolerance", 0)
    if _is_missing(answer):
        return UNANSWERED
    try:
        if callable(right):
            given, right = _values(answer, found[POINTS]), _values(right, found[POINTS])
        else:
            given = _read(answer, right)
    except _Unreadable as error:
        return str(error)
    if _agrees(given, right, tolerance):
        within = f" (within {tolerance:g})" if tolerance else ""
        return f"right{within}."
    for name, sentence in part.get("wrong", {}).items():
        usual = found[name]
        if callable(usual):
            usual = _values(usual, found[POINTS])
        if _agrees(given, usual, tolerance):
            return f"not right. {sentence}"
    return f"not right. {_usual_slip(given, right, tolerance)}{part['look']}"


class _Unreadable(ValueError):
    """An answer that is of another kind than what is asked for."""


def _is_missing(answer: Any) -> bool:
    """Whether an answer is still the starter code's, as a whole or in part."""
    if isinstance(answer, set | frozenset | list | tuple):
        return any(_is_missing(one) for one in answer)
    return answer is ... or answer is None or (isinstance(answer, str) and answer.strip() == "...")


def _read(answer: Any, right: Any) -> Any:
    """The answer as a value of the kind of the right one; raises _Unreadable where it is of another kind."""
    if isinstance(right, str):
        if not isinstance(answer, str):
            raise _Unreadable(f"a word in quotation marks is asked for, and {_named(answer)} was given.")
        return answer.strip().lower()
    if isinstance(right, frozenset):
        if not isinstance(answer, set | frozenset | list | tuple):
            raise _Unreadable(f"several numbers are asked for, such as {{1, 2}}, and {_named(answer)} was given.")
        return frozenset(_number(one) for one in answer)
    return _number(answer)


def _number(answer: Any) -> float:
    """A number: Python's, or an array or tensor of one element."""
    shape = getattr(answer, "shape", None)
    if shape is not None and hasattr(answer, "item"):
        if any(length != 1 for length in shape):
            raise _Unreadable(f"one number is asked for, and an array of shape {tuple(shape)} was given.")
        answer = answer.item()
    if isinstance(answer, bool) or not isinstance(answer, Real):
        raise _Unreadable(f"a number is asked for, and {_named(answer)} was given.")
    if not -LARGEST < answer < LARGEST:
        raise _Unreadable(f"a finite number is asked for, and {_named(answer)} was given: look where it comes from.")
    return float(answer)


def _named(answer: Any) -> str:
    """A value as a sentence names it: its beginning, and its type."""
    text = " ".join(repr(answer).split())
    if len(text) > 40:
        text = text[:37] + "..."
    return f"{text} ({type(answer).__name__})"


def _values(function: Any, points: Sequence[tuple]) -> list[float]:
    """What a function returns at each point; raises _Unreadable where that is no number."""
    if not callable(function):
        raise _Unreadable(f"a function is asked for, and {_named(function)} was given.")
    values = []
    for point in points:
        at = ", ".join(f"{value:g}" if isinstance(value, Real) else str(value) for value in point)
        try:
            value = function(*point)
        except Exception as error:  # whatever a reader's function does
            raise _Unreadable(f"your function fails at ({at}): {type(error).__name__}: {error}.") from None
        if _is_missing(value):
            raise _Unreadable(UNANSWERED)
        try:
            values.append(_number(value))
        except _Unreadable as error:
            raise _Unreadable(f"at ({at}) {error}") from None
    return values


def _agrees(given: Any, expected: Any, tolerance: float) -> bool:
    if isinstance(expected, list):
        return all(abs(a - b) <= tolerance for a, b in zip(given, expected, strict=True))
    if isinstance(expected, str | frozenset):
        return given == expected
    return abs(given - float(expected)) <= tolerance


def _usual_slip(given: Any, right: Any, tolerance: float) -> str:
    """What any number can be that is nearly right: with the other sign, a share in place of per cent."""
    slips: dict[str, Callable[[float], float]] = {
        "The sign is the other one. ": _negative,
        "This is per cent, and a share between 0 and 1 is asked for. ": _as_share,
        "This is a share between 0 and 1, and per cent are asked for. ": _as_per_cent,
    }
    if isinstance(given, float) and right:
        for sentence, undone in slips.items():
            if _agrees(undone(given), right, tolerance):
                return sentence
    return ""


def _negative(value: float) -> float:
    return -value


def _as_share(value: float) -> float:
    return value / 100


def _as_per_cent(value: float) -> float:
    return 100 * value
