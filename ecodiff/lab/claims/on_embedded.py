"""Decisions from recorded rows of the embedded models. A place is a row of a study: ("main", "learned, 20%").

Rows are compared seed by seed and image by image, where both are recorded. Where nothing is, the decision names
the command that would measure it. With ECODIFF_RECORDS=off there are no rows.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace

from ecodiff.errors import EcoDiffError
from ecodiff.lab import studies
from ecodiff.lab.identities import identity
from ecodiff.lab.studies.cell import Cell
from ecodiff.lab.studies.plan import DEV, SCHNELL, SD2, SDXL
from ecodiff.lab.studies.results import find
from ecodiff.metrics.intervals import SMALLEST_EFFECT, Interval, difference, mean_interval
from ecodiff.storage import records
from ecodiff.storage.paths import data_dir

from . import rules
from .rules import (
    COUNTED,
    DISAGREE,
    MISSING,
    NOT_COUNTED,
    NOT_REPRODUCED,
    REPRODUCED,
    UNDECIDED,
    Decision,
)

FAMILY = {SDXL: "SDXL", SD2: "Stable Diffusion 2", DEV: "FLUX.1-dev", SCHNELL: "FLUX.1-schnell"}
"""The embedded models, and what each stands for."""
FLUX = (DEV, SCHNELL)
AT_FULL_SIZE = {
    REPRODUCED: COUNTED,
    NOT_REPRODUCED: NOT_COUNTED,
    DISAGREE: DISAGREE,
    UNDECIDED: UNDECIDED,
}
"""What a rule for rows says of the embedded family, and of a published checkpoint."""
HUB = {
    SDXL: "stabilityai/stable-diffusion-xl-base-1.0",
    SD2: "stabilityai/stable-diffusion-2-base",
    DEV: "black-forest-labs/FLUX.1-dev",
    SCHNELL: "black-forest-labs/FLUX.1-schnell",
}
LEARNED, ORIGINAL = ("main", "learned, 20%"), ("main", "original")
EQUAL = ("parameters", "learned, 20%")
BOTH = ("ssim", "quality")
"""Closeness to the original, and what an image shows (``quality``)."""
WORDS = {"ssim": "SSIM", "facts": "all facts right", "object": "object named", "found": "all objects found"}
Place = tuple[str, str]
FLOOR = 4
"""Shares of right images below so many smallest effects are too low to lose one."""


def trained(model: str) -> bool:
    """Whether an embedded model is there."""
    return (data_dir() / "models" / model / "model_index.json").is_file()


def readable(model: str) -> bool:
    """Whether there can be rows of a model."""
    return records.enabled() and (trained(model) or _measured(model))


def _measured(checkpoint: str) -> bool:
    """Whether any cell of a published checkpoint is recorded; only then is it loaded, to look for others."""
    return any(row["config"]["protocol"]["model"] == checkpoint for row in records.rows("compare"))


def on(model: str, label: str = "") -> str:
    """An embedded model with what it stands for, or a checkpoint, in words."""
    name = f"`{model}`"
    if model in FAMILY:
        name += f" (small, for {FAMILY[model]})"
    if label:
        name += f": {label}"
    return name


def command(model: str, study: str) -> str:
    """The command that measures the rows of a study; it trains the model first where it is not there."""
    measure = f"python -m ecodiff study {study} --model {model}"
    if model in FAMILY and not trained(model):
        return f"python -m ecodiff zoo train {model} && {measure}"
    return measure


def real(model: str, study: str, rule: Callable[[str], Decision]) -> Decision:
    """The decision by the same study on the checkpoint that an embedded model stands for.

    It is that of ``rule``, called with the checkpoint's id, where the rows are recorded; else it is open and names the
    command that records them.
    """
    checkpoint = HUB[model]
    if readable(checkpoint):
        decision = rule(checkpoint)
        if decision.verdict in AT_FULL_SIZE:
            return replace(decision, verdict=AT_FULL_SIZE[decision.verdict])
    return rules.checkpoint(FAMILY[model], command(checkpoint, study))


def recorded(model: str, *places: Place, seeds: int = studies.SEEDS) -> list[tuple[dict, ...]]:
    """Values of these rows, a tuple for each seed for which all are recorded.

    Raises EcoDiffError for a row that the study does not have.
    """
    seeds_recorded = []
    for seed in range(seeds):
        values = tuple(_values(model, place, seed) for place in places)
        if all(values):
            seeds_recorded.append(values)
    return seeds_recorded


def _values(model: str, place: Place, seed: int) -> dict | None:
    cell = _cell(model, place, seed)
    if cell is None or not readable(model):
        return None
    return find(cell, identity(model))


def _cell(model: str, place: Place, seed: int) -> Cell | None:
    """The cell of a row; None for a seed that the study does not measure of it, EcoDiffError for no such row."""
    study, row = place
    rows = studies.cells(study, model, seed)
    if row not in rows and row not in studies.cells(study, model):  # some rows have seed 0 alone
        raise EcoDiffError(f"Study {study!r} of {model} has no row {row!r}.")
    return rows.get(row)


def varied(model: str, first: Place, second: Place) -> tuple[str, ...]:
    """The fields in which two rows differ.

    Raises EcoDiffError where there are none, and where the studies of the rows do not say that they vary them: such a
    comparison would not test what its claim says.
    """
    differing = studies.changed(_cell(model, first, 0), _cell(model, second, 0))
    if not differing:
        raise EcoDiffError(f"{first} and {second} of {model} are the same cell: comparing them tests nothing.")
    stated = {*studies.STUDIES[first[0]].varies, *studies.STUDIES[second[0]].varies}
    others = [name for name in differing if name not in stated]
    if others:
        raise EcoDiffError(
            f"{first} and {second} of {model} differ in {', '.join(others)}, which no study says it varies."
        )
    return tuple(differing)


def quality(values: Sequence[tuple[dict, ...]]) -> str:
    """The measure of what an image shows that all these rows have.

    That is the facts by the judge where they are recorded, else the object by the probe, else closeness to the
    original's image.
    """
    rows = [row for seed in values for row in seed]
    for measure in ("facts", "object"):
        if all(row.get(measure) for row in rows):
            return measure
    return "ssim"


def differences(values: Sequence[tuple[dict, dict]], measures: Sequence[str]) -> dict[str, Interval]:
    """Paired differences first - second of these measures; "quality" stands for ``quality``."""
    names = [quality(values) if name == "quality" else name for name in measures]
    intervals = {}
    for name in dict.fromkeys(names):  # "quality" may be SSIM, which is then compared once
        first = [a[name] for a, _ in values]
        second = [b[name] for _, b in values]
        intervals[name] = difference(first, second)
    return intervals


def in_words(intervals: dict[str, Interval], values: Sequence[tuple[dict, ...]]) -> str:
    """Intervals {measure: interval} as text, with the number of images and seeds behind them."""
    parts = []
    for name, d in intervals.items():
        scale, digits, unit = 100, 1, " of 100"  # shares of images
        if name == "ssim":
            scale, digits, unit = 1, 3, ""
        ends = f"{scale * d.low:+.{digits}f} to {scale * d.high:+.{digits}f}"
        parts.append(f"{WORDS.get(name, name)} {scale * d.mean:+.{digits}f}{unit} ({ends})")
    return f"{', '.join(parts)}; {number_of(values)}"


def number_of(values: Sequence[tuple[dict, ...]]) -> str:
    """How many images and seeds, as text."""
    images = sum(len(first["ssim"]) for first, *_ in values)
    plural = "s" if len(values) > 1 else ""
    return f"{images} images, {len(values)} seed{plural}"


def _decide(
    rule: Callable,
    model: str,
    first: Place,
    second: Place,
    measures: Sequence[str],
    label: str,
    least: float = 0.0,
) -> Decision:
    """The decision by a rule for intervals.

    It stays undecided where the rule says "reproduced" but less than the share ``least`` of the second row's images is
    right: there is too little to lose.
    """
    fields = varied(model, first, second)
    values = recorded(model, first, second)
    if not values:
        return missing(model, first[0], label)
    intervals = differences(values, measures)
    verdict = rule(list(intervals.values()))
    evidence = f"{first[1]} minus {second[1]}: {in_words(intervals, values)}"
    right = 1.0
    for name in intervals:
        if name != "ssim":
            hits = [hit for _, row in values for hit in row[name]]
            right = min(right, statistics.mean(hits))
    if verdict == REPRODUCED and right < least:
        verdict = UNDECIDED
        evidence += f"; {second[1]} itself is right in {100 * right:.1f} of 100 only"
    return Decision(on(model, label), verdict, evidence, varies=fields)


def missing(model: str, study: str, label: str = "") -> Decision:
    """The decision on what is not recorded, with the command that would measure it."""
    return Decision(on(model, label), MISSING, command=command(model, study))


def better(model: str, first: Place, second: Place, measures: Sequence[str] = BOTH, label: str = "") -> Decision:
    """The decision on "the first row is better": more by some measure, less by none, each by the smallest effect."""
    return _decide(rules.better, model, first, second, measures, label)


def kept(model: str, first: Place, second: Place, measures: Sequence[str] = ("quality",), label: str = "") -> Decision:
    """The decision on "the first row loses nothing against the second", or less than the smallest effect.

    It stays undecided where the second is right so rarely that there is hardly more than that to lose, unless something
    else is lost.
    """
    least = FLOOR * SMALLEST_EFFECT
    return _decide(rules.kept, model, first, second, measures, label, least)


def lower_fid(model: str, first: Place, second: Place, label: str = "") -> Decision:
    """The decision on "the first row's FID is lower", by Student's interval over seeds: a FID is one number a seed."""
    fields = varied(model, first, second)
    values = [(a, b) for a, b in recorded(model, first, second) if "fid" in a and "fid" in b]
    if not values:
        return missing(model, first[0], label)
    d = mean_interval([a["fid"] - b["fid"] for a, b in values])
    ends = "one seed has no interval"
    if len(values) > 1:
        ends = f"{d.low:+.1f} to {d.high:+.1f}"
    evidence = f"FID, {first[1]} minus {second[1]}: {d.mean:+.1f} ({ends}); {number_of(values)}"
    return Decision(on(model, label), rules.lower(d), evidence, varies=fields)


def command_of_updates(model: str = SDXL) -> str:
    """The command that measures the rows of ``updates``."""
    return f"papermill notebooks/06_memory_and_time.ipynb out.ipynb -p model {model}"


def updates(model: str = SDXL) -> dict[int, dict[str, dict]]:
    """Recorded mask updates of an embedded model as it is now (``benchmark mask-update``): {T: {variant: values}}."""
    if not readable(model):
        return {}
    rows = records.rows("mask_step")
    if not rows:  # then the model need not be identified, which hashes its weights
        return {}
    weights = identity(model).denoiser
    by_steps = {}
    for row in rows:
        if row["config"]["weights"] == weights:
            by_steps[row["config"]["T"]] = {values["variant"]: values for values in row["values"]["variants"]}
    return by_steps
