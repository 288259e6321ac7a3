"""Decisions from recorded rows of the embedded models. A place is a row of a study: ("main", "learned, 20%").

Rows are compared seed by seed and picture by picture, where both are recorded. Where nothing is, the decision names
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
"""Shares of right pictures below so many smallest effects are too low to lose one."""


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
    name = f"`{model}` (small, for {FAMILY[model]})" if model in FAMILY else f"`{model}`"
    return name + (f": {label}" if label else "")


def command(model: str, study: str) -> str:
    """What measures the rows of a study, the training of the model first where it is not there."""
    train = "" if trained(model) or model not in FAMILY else f"python -m ecodiff zoo train {model} && "
    return f"{train}python -m ecodiff study {study} --model {model}"


def real(model: str, study: str, rule: Callable[[str], Decision]) -> Decision:
    """The same study on the checkpoint that an embedded model stands for: ``rule`` of its id where its rows are
    recorded, else the command that records them."""
    checkpoint = HUB[model]
    if readable(checkpoint) and (decision := rule(checkpoint)).verdict in AT_FULL_SIZE:
        return replace(decision, verdict=AT_FULL_SIZE[decision.verdict])
    return rules.checkpoint(FAMILY[model], command(checkpoint, study))


def recorded(model: str, *places: Place, seeds: int = studies.SEEDS) -> list[tuple[dict, ...]]:
    """Values of these rows for each seed for which all are recorded; EcoDiffError for a row that the study lacks."""
    found = []
    for seed in range(seeds):
        values = tuple(_values(model, place, seed) for place in places)
        found += [values] if all(values) else []
    return found


def _values(model: str, place: Place, seed: int) -> dict | None:
    cell = _cell(model, place, seed)
    if cell is None or not readable(model):
        return None
    return find(cell, identity(model))


def _cell(model: str, place: Place, seed: int) -> Cell | None:
    """The cell of a row; None for a seed that the study does not measure of it, EcoDiffError for no such row."""
    study, row = place
    rows = studies.cells(study, model, seed)
    if row not in rows and row not in studies.cells(study, model):
        raise EcoDiffError(f"Study {study!r} of {model} has no row {row!r}.")
    return rows.get(row)


def varied(model: str, first: Place, second: Place) -> tuple[str, ...]:
    """The fields in which two rows differ. Raises EcoDiffError where there are none, and where their studies do not say
    that they vary them: such a comparison would not test what its claim says."""
    found = studies.changed(_cell(model, first, 0), _cell(model, second, 0))
    if not found:
        raise EcoDiffError(f"{first} and {second} of {model} are the same cell: comparing them tests nothing.")
    stated = {name for study, _ in (first, second) for name in studies.STUDIES[study].varies}
    if others := [name for name in found if name not in stated]:
        raise EcoDiffError(
            f"{first} and {second} of {model} differ in {', '.join(others)}, which no study says it varies."
        )
    return tuple(found)


def quality(values: Sequence[tuple[dict, ...]]) -> str:
    """The measure of what a picture shows: facts by the judge where recorded, else the object by the probe, else
    closeness to the original's picture."""
    return next((m for m in ("facts", "object") if all(v.get(m) for seed in values for v in seed)), "ssim")


def differences(values: Sequence[tuple[dict, dict]], measures: Sequence[str]) -> dict[str, Interval]:
    """Paired differences first - second of these measures; "quality" stands for ``quality``."""
    names = dict.fromkeys(quality(values) if name == "quality" else name for name in measures)
    return {name: difference([a[name] for a, _ in values], [b[name] for _, b in values]) for name in names}


def told(found: dict[str, Interval], values: Sequence[tuple[dict, ...]]) -> str:
    """Intervals as text."""
    parts = []
    for name, d in found.items():
        scale, digits, unit = (1, 3, "") if name == "ssim" else (100, 1, " of 100")
        ends = f"{scale * d.low:+.{digits}f} to {scale * d.high:+.{digits}f}"
        parts.append(f"{WORDS.get(name, name)} {scale * d.mean:+.{digits}f}{unit} ({ends})")
    return f"{', '.join(parts)}; {number_of(values)}"


def number_of(values: Sequence[tuple[dict, ...]]) -> str:
    """How many pictures and seeds."""
    pictures = sum(len(first["ssim"]) for first, *_ in values)
    return f"{pictures} pictures, {len(values)} seed{'s' if len(values) > 1 else ''}"


def _decide(
    rule: Callable,
    model: str,
    first: Place,
    second: Place,
    measures: Sequence[str],
    label: str,
    least: float = 0.0,
) -> Decision:
    """By a rule for intervals. What it takes for reproduced cannot be told where less than the share ``least`` of the
    second row's images is right."""
    differs = varied(model, first, second)
    values = recorded(model, first, second)
    if not values:
        return missing(model, first[0], label)
    found = differences(values, measures)
    outcome, evidence = rule(list(found.values())), f"{first[1]} minus {second[1]}: {told(found, values)}"
    shares = [statistics.mean(hit for _, seed in values for hit in seed[name]) for name in found if name != "ssim"]
    right = min(shares, default=1)
    if outcome == REPRODUCED and right < least:
        outcome, evidence = UNDECIDED, f"{evidence}; {second[1]} itself is right in {100 * right:.1f} of 100 only"
    return Decision(on(model, label), outcome, evidence, varies=differs)


def missing(model: str, study: str, label: str = "") -> Decision:
    """Not recorded, and what would measure it."""
    return Decision(on(model, label), MISSING, command=command(model, study))


def better(model: str, first: Place, second: Place, measures: Sequence[str] = BOTH, label: str = "") -> Decision:
    """Is the first row better than the second? More by some measure, less by none, each by the smallest effect."""
    return _decide(rules.better, model, first, second, measures, label)


def kept(model: str, first: Place, second: Place, measures: Sequence[str] = ("quality",), label: str = "") -> Decision:
    """Does the first row lose nothing against the second, or less than the smallest effect? Undecided where the second
    is right so rarely that there is hardly more than that to lose, unless something else is lost."""
    least = FLOOR * SMALLEST_EFFECT
    return _decide(rules.kept, model, first, second, measures, label, least)


def lower_fid(model: str, first: Place, second: Place, label: str = "") -> Decision:
    """Is the first row's FID lower? Student's interval over seeds, since a FID is one number per seed."""
    differs = varied(model, first, second)
    values = [seed for seed in recorded(model, first, second) if all("fid" in v for v in seed)]
    if not values:
        return missing(model, first[0], label)
    d = mean_interval([a["fid"] - b["fid"] for a, b in values])
    ends = f"{d.low:+.1f} to {d.high:+.1f}" if len(values) > 1 else "one seed has no interval"
    evidence = f"FID, {first[1]} minus {second[1]}: {d.mean:+.1f} ({ends}); {number_of(values)}"
    return Decision(on(model, label), rules.lower(d), evidence, varies=differs)


def command_of_updates(model: str = SDXL) -> str:
    """What measures the rows of ``updates``."""
    return f"papermill notebooks/06_memory_and_time.ipynb out.ipynb -p model {model}"


def updates(model: str = SDXL) -> dict[int, dict[str, dict]]:
    """Recorded mask updates of an embedded model as it is now (``benchmark mask-update``): {T: {variant: values}}."""
    if not readable(model) or not (rows := records.rows("mask_step")):
        return {}
    weights = identity(model).denoiser
    mine = [row for row in rows if row["config"]["weights"] == weights]
    return {row["config"]["T"]: {v["variant"]: v for v in row["values"]["variants"]} for row in mine}
