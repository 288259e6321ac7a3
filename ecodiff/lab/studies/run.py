"""What `python -m ecodiff study` does: what is missing, how long that takes, measuring it, and measuring again."""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

from ecodiff.errors import EcoDiffError
from ecodiff.lab import studies
from ecodiff.lab.identities import identity
from ecodiff.pipelines.identity import Identity
from ecodiff.storage import records
from ecodiff.storage.fingerprint import key
from ecodiff.storage.paths import embedded

from .cell import Cell, apart, describe_cell
from .plan import cells, planned
from .results import find, gates_file


def seeds_of(names: Sequence[str], model: str, most: int | None = None) -> dict[str, int]:
    """How many seeds of each study to measure on a model. No ``names``: the plan, at most ``most`` seeds of each.
    Studies that are named: ``most`` seeds, or left out those of the plan, or one."""
    if names:
        return {name: most or planned(name, model) or 1 for name in names}
    plan = {name: min(planned(name, model), most or planned(name, model)) for name in studies.STUDIES}
    return {name: seeds for name, seeds in plan.items() if seeds}


def missing(seeds: Mapping[str, int], model: str) -> list[tuple[str, str, Cell]]:
    """Cells of these studies, {study: seeds}, that are not recorded, (study, row, cell): seed 0 of all studies, then
    seed 1, ... Each cell once."""
    todo, known = [], set()
    asked = [
        (study, *item)
        for seed in range(max(seeds.values(), default=0))
        for study, number in seeds.items()
        if seed < number
        for item in cells(study, model, seed).items()
    ]
    of = identity(model)
    for study, row, cell in asked:
        name = key(describe_cell(of, cell))
        if name not in known and find(cell, of) is None:
            todo.append((study, row, cell))
        known.add(name)
    return todo


def verify(pipe, names: Sequence[str], model: str, number: int, seed: int) -> list[str]:
    """Measure ``number`` recorded cells of these studies again, drawn by ``seed``, and compare; a sentence each.

    Gates are those that are kept; scores and pictures are made anew. Raises EcoDiffError where a mean of SSIM or of a
    share differs by more than 0.02, parameters or operations by more than 1 %: another processor rounds otherwise, and
    a picture or a unit near a threshold may fall to its other side.
    """
    from .measure import Kept, measure_cell

    of = Identity.of(pipe)
    found = [
        (study, row, cell) for study in names for row, cell in cells(study, model).items() if find(cell, of) is not None
    ]
    lines = []
    for study, row, cell in random.Random(seed).sample(found, min(number, len(found))):
        before = find(cell, of)
        after = measure_cell(pipe, cell, Kept(gates=True, images=False))
        means = {
            name: [statistics.mean(values[name]) for values in (before, after)]
            for name in ("ssim", "object", "found", "facts", "colour")
            if before.get(name)
        }
        wrong = {name: pair for name, pair in means.items() if abs(pair[0] - pair[1]) > 0.02}
        counts = {name: [before[name], after[name]] for name in ("parameters", "gflop") if name in before}
        wrong |= {name: pair for name, pair in counts.items() if abs(pair[0] - pair[1]) > 0.01 * pair[1]}
        for name, (then, now) in wrong.items():
            raise EcoDiffError(
                f"{study}, {row}: {name} is {now:,.3f} now and was recorded as {then:,.3f}; measure it again with "
                f"ECODIFF_RECOMPUTE=1 python -m ecodiff study {study} --model {model}."
            )
        lines.append(f"{study}, {row}: as recorded (SSIM {statistics.mean(after['ssim']):.3f})")
    return lines


def _estimate(todo: Sequence) -> float:
    """Seconds, from the longest that recorded cells of the same method took, on the same model where there are any.

    The longest one found no scores kept. A cell that finds its learned mask kept takes what others take.
    """
    took: dict[str, list[float]] = {}
    rows, models = records.rows("compare"), {cell.protocol.model for _, _, cell in todo}
    for row in [row for row in rows if row["config"]["protocol"]["model"] in models] or rows:
        took.setdefault(apart(row["config"]["method"])[0], []).append(row["seconds"])

    def seconds(cell: Cell) -> float:
        method = apart(cell.method)[0]
        if method == "learned" and gates_file(cell).is_file():
            method = "original"
        return max(took.get(method, [180.0 if method == "learned" else 45.0]))

    return sum(seconds(cell) for _, _, cell in todo)


def run(options: argparse.Namespace) -> int:
    for name, least in (("seeds", 1), ("verify", 1), ("minutes", 0)):
        if (value := getattr(options, name)) is not None and value < least:
            raise EcoDiffError(f"--{name} {value:g}: give {least} or more.")
    names, end = options.studies, time.monotonic() + 60 * options.minutes
    models = embedded() if options.model == "all" else [options.model]
    if not models:
        raise EcoDiffError("No embedded pipeline is trained here: run python -m ecodiff zoo train all.")
    for name in names:
        cells(name, models[0])
    if options.verify:
        from ecodiff.pipelines.loading import load_once

        found = [
            line
            for model in models
            for line in verify(load_once(model), names or list(studies.STUDIES), model, options.verify, options.draw)
        ]
        print("\n".join(found) or "nothing is recorded")
        return 0
    todo, seconds = [], 0.0
    for model in models:
        seeds = seeds_of(names, model, options.seeds)
        left = missing(seeds, model)
        if options.list:
            _list(seeds, left)
        took = _estimate(left)
        print(f"{model}: {len(left)} cells to go, about {took / 60:.0f} minutes", flush=True)
        todo, seconds = todo + left, seconds + took
    if len(models) > 1:
        print(f"together {len(todo)} cells, about {seconds / 3600:.1f} hours", flush=True)
    place = {study: number for number, study in enumerate(studies.STUDIES)}
    todo.sort(key=lambda item: (item[2].seed, place[item[0]]))
    if options.list:
        return 0

    def told(done: int, study: str, row: str, cell: Cell, ssim: float, took: float) -> None:
        where = f"{cell.protocol.model}, " if len(models) > 1 else ""
        print(
            f"[{done}/{len(todo)}] {where}{study}, {row}, seed {cell.seed}: SSIM {ssim:.3f}, {took:.0f} s", flush=True
        )

    left = _measure_all(todo, end, told)
    if left:
        print(f"{left} cells left; run again to go on")
    return 0


def _measure_all(todo: Sequence, end: float, told: Callable) -> int:
    """Measure cells until all are there or time is up; how many are left."""
    for done, (study, row, cell) in enumerate(todo):
        if time.monotonic() > end:
            return len(todo) - done
        told(done + 1, study, row, cell, *_measured(cell))
    return 0


def _measured(cell: Cell) -> tuple[float, float]:
    """Measure a cell; its mean SSIM and the seconds it took."""
    from . import measure  # whoever only lists waits for no torch

    started = time.perf_counter()
    values = measure.run(cell)
    return statistics.mean(values["ssim"]), time.perf_counter() - started


def _list(seeds: Mapping[str, int], todo: Sequence) -> None:
    for name, number in seeds.items():
        left = [item for item in todo if item[0] == name]
        minutes = _estimate(left) / 60
        title = studies.STUDIES[name].title
        print(f"{name:12} {title:52} seeds {number}, {len(left):3} cells to go, {minutes:4.0f} minutes")
