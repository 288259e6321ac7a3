"""Recorded rows: found without a model, and shown as tables, differences and sentences. `measure` measures them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from ecodiff.lab.identities import identity
from ecodiff.metrics.intervals import EFFECTS, Interval, difference, nested_interval
from ecodiff.pipelines.identity import Identity
from ecodiff.storage import records
from ecodiff.storage.fingerprint import key
from ecodiff.storage.paths import data_dir

from .cell import Cell, describe_cell, describe_learning
from .plan import SEEDS, cells, planned


def interval_text(per_seed: Sequence[Sequence[float]], scale: float = 1.0, digits: int | None = None) -> str:
    """Mean over all seeds' values with its 95 % interval (bootstrap over seeds and images) as text, such as
    "0.812 (0.798 to 0.825)"; with three digits, or one for values that are scaled up, unless ``digits`` says so."""
    values = [[scale * value for value in seed_values] for seed_values in per_seed if seed_values]
    if not values:
        return "–"
    interval = nested_interval(values)
    if digits is None:
        digits = 1 if scale > 1 else 3
    return f"{interval.mean:.{digits}f} ({interval.low:.{digits}f} to {interval.high:.{digits}f})"


def verdict(cells: Mapping[str, Sequence[Mapping[str, Sequence[float]]]], ours: str = "learned") -> str:
    """Sentences that say, from the paired intervals, whether ``ours`` keeps more than each other method."""
    lines = []
    for other in cells:
        if other == ours:
            continue
        for measure, words in (("ssim", "SSIM"), ("object", "objects named")):
            first = [cell.get(measure, []) for cell in cells[ours]]
            second = [cell.get(measure, []) for cell in cells[other]]
            if not first[0]:
                continue
            d = difference(first, second)
            shown = f"{d.mean:+.3f}, 95 % interval {d.low:+.3f} to {d.high:+.3f}"
            lines.append(f"- {words}, {ours} against {other}: {d.word} (paired difference {shown}).")
    return "\n".join(lines)


def find(cell: Cell, of: Identity | None = None) -> dict | None:
    """The recorded values of a cell (see `measure.run`), or None. Loads no model and needs no torch.

    ``of``: what the model is, where its id in the protocol does not say.
    """
    return _values(describe_cell(of or identity(cell.protocol.model), cell), "compare")


def find_removed(cell: Cell, of: Identity | None = None) -> dict[str, dict] | None:
    """How many units of each site a cell's mask removes (see `measure.removed_units`), or None."""
    return _values(describe_removed(of or identity(cell.protocol.model), cell), "removed_units")


def find_sparing(cell: Cell, sites: Sequence[str], of: Identity | None = None) -> dict | None:
    """The recorded values of a cell that spares these sites (see `measure.sparing`), or None."""
    return _values(describe_sparing(of or identity(cell.protocol.model), cell, sites), "spared")


def _values(described: dict, name: str) -> dict | None:
    row = records.find(described, name=name)
    if row is None:
        return None
    return row["values"]


def describe_removed(model: Identity, cell: Cell) -> dict:
    """What a cell's mask depends on: no image that is judged."""
    described = describe_cell(model, cell)
    for judging in ("protocol", "judge", "vae"):
        del described[judging]
    return {**described, "what": "removed_units", "version": 1}


def describe_sparing(model: Identity, cell: Cell, sites: Sequence[str]) -> dict:
    """What the values of a cell that spares sites depend on."""
    return {**describe_cell(model, cell), "spared": sorted(sites)}


def gates_file(cell: Cell, of: Identity | None = None) -> Path:
    """Where the gates of a cell of learned masks are kept once they are learned."""
    return file_of_gates(describe_learning(of or identity(cell.protocol.model), cell))


def file_of_gates(learning: Mapping) -> Path:
    """The file of the gates of a run of learning: its name is the hash of all that the run depends on."""
    return data_dir() / "results" / "gates" / f"{key(learning)[:16]}.safetensors"


def as_it_is(cell: Cell) -> Cell:
    """The cell without any change: what `recorded` and `measured` adjust cells by unless told otherwise."""
    return cell


def chosen(study: str, model: str, seeds: int, only: Sequence[str]) -> Iterator[tuple[int, str, Cell]]:
    """The cells of a study, (seed, row, cell), seed by seed; ``only`` names the rows, where these are not all."""
    for seed in range(seeds):
        for name, cell in cells(study, model, seed).items():
            if not only or name in only:
                yield seed, name, cell


def recorded(
    study: str,
    model: str,
    seeds: int = SEEDS,
    *,
    only: Sequence[str] = (),
    adjust: Callable[[Cell], Cell] = as_it_is,
    of: Identity | None = None,
) -> dict[str, list[dict]]:
    """What is recorded of a study, {row: values of each seed}; rows without seed 0 are left out. Loads no model.

    Seeds are those from 0 to the first that is missing, so that place s of every row is seed s.
    ``only``: these rows. ``adjust`` changes each cell first, such as to fewer images. ``of``: what the model is,
    where its id does not say.
    """
    rows: dict[str, list[dict]] = {}
    for seed, name, cell in chosen(study, model, seeds, only):
        if len(rows.get(name, [])) < seed:  # an earlier seed is missing
            continue
        values = find(adjust(cell), of)
        if values:
            rows.setdefault(name, []).append(values)
    return rows


def progress(found: Mapping[str, Sequence], study: str, model: str, seeds: int = SEEDS) -> str:
    """A sentence on how much of a study is recorded, and the command that measures the rest; empty if all is.

    Of what the plan has, with no more than ``seeds`` seeds; one seed where it has nothing.
    """
    seeds = min(seeds, planned(study, model) or 1)
    have = sum(min(len(row), seeds) for row in found.values())
    all_cells = sum(len(cells(study, model, seed)) for seed in range(seeds))
    if have >= all_cells:
        return ""
    command = f"python -m ecodiff study {study} --model {model}"
    return f"{have} of {all_cells} cells of this table are recorded for {model}; `{command}` measures the others."


MEASURES = {  # column of a table -> what of a cell, scale, digits
    "SSIM to the original": ("ssim", 1, 3),
    "object named (%)": ("object", 100, 1),
    "all objects found (%)": ("found", 100, 1),
    "motion right (%)": ("motion", 100, 1),
    "all facts right (%)": ("facts", 100, 1),
    "background right (%)": ("colour", 100, 0),
    "CLIP score": ("clip", 1, 1),
}
GFLOP = "GFLOP per image"  # the denoiser's, all calls
SET_MEASURES = {"FID": ("fid", 1, 0), "KID x 1000": ("kid", 1000, 1)}


def table(rows: Mapping[str, Sequence[dict]], measures: Sequence[str]) -> list[dict[str, str]]:
    """Recorded rows as a table of texts: mean and 95 % interval over pictures and seeds (bootstrap); for FID and KID
    the mean over seeds with the lowest and the highest."""
    lines = []
    for name, per_seed in rows.items():
        line = {"": name, "parameters": f"{per_seed[0]['parameters'] / 1e6:.2f} M", "seeds": str(len(per_seed))}
        for column in measures:
            line[column] = _shown(column, per_seed)
        lines.append(line)
    return lines


PAIRED = {
    "ssim": ("SSIM", 1, 3),
    "facts": ("facts right", 100, 1),
    "object": ("objects named", 100, 1),
    "motion": ("motions right", 100, 1),
}
"""Measures that are compared image by image -> words, scale, digits.

SSIM to the original is close to what learning optimises; the facts are what an image is asked to show."""


def minus(rows: Mapping[str, Sequence[dict]], row: str, reference: str | None, measure: str = "ssim") -> str:
    """A measure of a row minus that of another, paired by image over the seeds that both have, with its 95 % interval.

    A dash for the reference itself and where it is not recorded."""
    d = paired(rows, row, reference, measure)
    if d is None:
        return "–"
    _, scale, digits = PAIRED[measure]
    return f"{scale * d.mean:+.{digits}f} ({scale * d.low:+.{digits}f} to {scale * d.high:+.{digits}f})"


def in_words(rows: Mapping[str, Sequence[dict]], reference: str | None, measure: str = "ssim") -> str:
    """Which rows have more of a measure than the reference, which less, and for which the 95 % interval says that no
    difference matters or decides nothing; empty where there is nothing to compare."""
    groups: dict[str, list[str]] = {word: [] for word in EFFECTS}
    _, scale, digits = PAIRED[measure]
    for row in rows:
        d = paired(rows, row, reference, measure)
        if d is not None:
            groups[d.word].append(f"{row} ({scale * d.mean:+.{digits}f})")
    return "; ".join(f"{word}: {', '.join(names)}" for word, names in groups.items() if names)


def paired(
    rows: Mapping[str, Sequence[dict]], row: str, reference: str | None, measure: str = "ssim"
) -> Interval | None:
    """The paired difference of a measure, a row minus the reference, over the seeds that both have; None for the
    reference itself, and where one of them does not have the measure."""
    if row == reference:
        return None
    ours, theirs = [], []
    for first, second in zip(rows[row], rows.get(reference, []), strict=False):  # up to the last seed that both have
        if first.get(measure) and second.get(measure):
            ours.append(first[measure])
            theirs.append(second[measure])
    return difference(ours, theirs) if ours else None


def _shown(column: str, per_seed: Sequence[dict]) -> str:
    """One entry of ``table``."""
    if column == GFLOP:
        counted = [cell["gflop"] for cell in per_seed if "gflop" in cell]
        if not counted:
            return "–"
        return f"{statistics.mean(counted):.2f}"
    if column in SET_MEASURES:
        name, scale, digits = SET_MEASURES[column]
        values = [scale * cell[name] for cell in per_seed if name in cell]
        if not values:
            return "–"
        if len(values) == 1:  # one seed has no range
            return f"{values[0]:.{digits}f}"
        return f"{statistics.mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"
    name, scale, digits = MEASURES[column]
    return interval_text([cell.get(name, []) for cell in per_seed], scale, digits)
