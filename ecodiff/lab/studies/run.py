"""What `python -m ecodiff study` does: what is missing, how long that takes, measuring it, and measuring again."""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from ecodiff import processes
from ecodiff.errors import EcoDiffError
from ecodiff.lab import studies
from ecodiff.lab.identities import identity
from ecodiff.pipelines.identity import Identity
from ecodiff.storage import records
from ecodiff.storage.files import write_whole
from ecodiff.storage.fingerprint import key
from ecodiff.storage.paths import embedded
from ecodiff.storage.provenance import commit

from .cell import Cell, apart, describe_cell
from .plan import cells, planned
from .results import find, gates_file


def seeds_of(names: Sequence[str], model: str, most: int | None = None) -> dict[str, int]:
    """How many seeds of each study to measure on a model, {study: seeds}.

    Without ``names`` it is the plan, with at most ``most`` seeds of each study. Studies that are named have ``most``
    seeds; without that number, those of the plan, or one.
    """
    if names:
        return {name: most or planned(name, model) or 1 for name in names}
    seeds = {}
    for name in studies.STUDIES:
        number = planned(name, model)
        if most:
            number = min(number, most)
        if number:
            seeds[name] = number
    return seeds


def missing(seeds: Mapping[str, int], model: str, part: int = 0, parts: int = 1) -> list[tuple[str, str, Cell]]:
    """Cells of these studies, {study: seeds}, that are not recorded, (study, row, cell): seed 0 of all studies, then
    seed 1, ... Each cell once.

    ``part``: one of so many ``parts``, from 0. Which cells are in a part does not depend on what is recorded, so that
    jobs that begin at different times share the cells. Cells that need the same scores are in the same part.
    """
    todo, known = [], set()
    groups: dict[str, int] = {}
    of = identity(model)
    for seed in range(max(seeds.values(), default=0)):
        for study, number in seeds.items():
            if seed >= number:
                continue
            for row, cell in cells(study, model, seed).items():
                described = describe_cell(of, cell)
                name = key(described)
                group = groups.setdefault(_scores_of(described), len(groups))
                if group % parts == part and name not in known and find(cell, of) is None:
                    todo.append((study, row, cell))
                known.add(name)
    return todo


def _scores_of(described: Mapping) -> str:
    """A name for the scores that a cell needs: made once, they serve all its ratios."""
    if "learned" in described:
        return key(described["learned"])
    method, _ = apart(described["method"])
    return key({name: described.get(name) for name in ("seed", "calibration", "scores of")} | {"method": method})


def verify(pipe, names: Sequence[str], model: str, number: int, seed: int) -> list[dict]:
    """Measure ``number`` recorded cells of these studies again, drawn by ``seed``, and compare.

    Returns for each what was measured, ``study``, ``row``, ``model`` and the row's ``key``, and ``differs``: a sentence
    for each value that is another one now, by more than 0.02 for a mean of SSIM or of a share, by more than 1 % for
    parameters or operations. Another processor rounds otherwise, and an image or a unit near a threshold may fall to
    its other side. Gates are those that are kept; scores and images are made anew.
    """
    from .measure import Kept, measure_cell

    of = Identity.of(pipe)
    recorded = []
    for study in names:
        for row, cell in cells(study, model).items():
            if find(cell, of) is not None:
                recorded.append((study, row, cell))
    outcomes = []
    for study, row, cell in random.Random(seed).sample(recorded, min(number, len(recorded))):
        after = measure_cell(pipe, cell, Kept(gates=True, images=False))
        differs = []
        for name, then, now in _differences(find(cell, of), after):
            differs.append(f"{name} is {now:,.3f} now and was recorded as {then:,.3f}")
        outcomes.append(
            {"study": study, "row": row, "model": model, "key": key(describe_cell(of, cell)), "differs": differs}
        )
    return outcomes


def report_verified(outcomes: Sequence[Mapping], file: str | None) -> None:
    """Print what `verify` found and how many of the outputs came out again, and write both to ``file`` as JSON.

    Raises EcoDiffError, after all of this, where one differs.
    """
    reproduced = [outcome for outcome in outcomes if not outcome["differs"]]
    for outcome in outcomes:
        told = "; ".join(outcome["differs"]) or "as recorded"
        print(f"{outcome['study']}, {outcome['row']}, {outcome['model']}: {told}")
    print(f"{len(reproduced)} of {len(outcomes)} outputs reproduced, of those that were drawn and measured again here")
    if file:
        content = {"reproduced": len(reproduced), "of": len(outcomes), "commit": commit(), "outputs": list(outcomes)}
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, (json.dumps(content, indent=1) + "\n").encode())
    wrong = [outcome for outcome in outcomes if outcome["differs"]]
    if wrong:
        raise EcoDiffError(
            f"{len(wrong)} outputs differ from what is recorded; measure them again, such as with "
            f"ECODIFF_RECOMPUTE=1 python -m ecodiff study {wrong[0]['study']} --model {wrong[0]['model']}."
        )


def _differences(before: Mapping, after: Mapping) -> Iterator[tuple[str, float, float]]:
    """What differs by more than rounding does, (name, before, after): see ``verify``."""
    for name in ("ssim", "object", "found", "facts", "colour"):
        if before.get(name):
            then, now = statistics.mean(before[name]), statistics.mean(after[name])
            if abs(then - now) > 0.02:
                yield name, then, now
    for name in ("parameters", "gflop"):
        if name in before and abs(before[name] - after[name]) > 0.01 * after[name]:
            yield name, before[name], after[name]


def estimate(todo: Sequence) -> float:
    """Seconds, from the longest that recorded cells of the same method took, on the same model where there are any.

    The longest one found no scores kept. A cell that finds its learned mask kept takes what others take.
    """
    models = {cell.protocol.model for _, _, cell in todo}
    all_rows = records.rows("compare")
    rows = [row for row in all_rows if row["config"]["protocol"]["model"] in models]
    longest: dict[str, float] = {}
    for row in rows or all_rows:
        method, _ = apart(row["config"]["method"])
        longest[method] = max(longest.get(method, 0.0), row["seconds"])
    total = 0.0
    for _, _, cell in todo:
        method, _ = apart(cell.method)
        if method == "learned" and gates_file(cell).is_file():
            method = "original"
        unknown = 180.0 if method == "learned" else 45.0  # nothing of the kind is recorded yet
        total += longest.get(method, unknown)
    return total


def run(options: argparse.Namespace) -> int:
    """Do what the command was asked to; returns its exit status."""
    for name, least in (("seeds", 1), ("verify", 1), ("minutes", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise EcoDiffError(f"--{name} {value:g}: give {least} or more.")
    if options.verify and (options.part != (1, 1) or processes.count() > 1):
        raise EcoDiffError("--verify draws cells of all parts: leave --part and the launcher out.")
    number, of = options.part
    rank, count = processes.work_alone()
    part, parts = (number - 1) * count + rank, of * count
    names, end = options.studies, time.monotonic() + 60 * options.minutes
    models = [options.model]
    if options.model == "all":
        models = embedded()
    if not models:
        raise EcoDiffError("No embedded pipeline is trained here: run python -m ecodiff zoo train all.")
    for name in names:
        cells(name, models[0])  # raises for a study that is none, before anything is measured
    if options.verify:
        from ecodiff.pipelines.loading import load_once

        outcomes = []
        for model in models:
            outcomes += verify(load_once(model), names or list(studies.STUDIES), model, options.verify, options.draw)
        report_verified(outcomes, options.report)
        return 0
    todo, seconds = [], 0.0
    for model in models:
        seeds = seeds_of(names, model, options.seeds)
        left = missing(seeds, model, part, parts)
        if options.list:
            _list(seeds, left)
        took = estimate(left)
        whose = f"part {part + 1}/{parts}, " if parts > 1 else ""
        print(f"{whose}{model}: {len(left)} cells to go, about {took / 60:.0f} minutes", flush=True)
        todo, seconds = todo + left, seconds + took
    if len(models) > 1:
        print(f"together {len(todo)} cells, about {seconds / 3600:.1f} hours", flush=True)
    place = {study: number for number, study in enumerate(studies.STUDIES)}
    todo.sort(key=lambda item: (item[2].seed, place[item[0]]))
    if options.list:
        return 0

    def report(done: int, study: str, row: str, cell: Cell, ssim: float, took: float) -> None:
        where = f"{cell.protocol.model}, " if len(models) > 1 else ""
        print(
            f"[{done}/{len(todo)}] {where}{study}, {row}, seed {cell.seed}: SSIM {ssim:.3f}, {took:.0f} s", flush=True
        )

    number_left = _measure_all(todo, end, report)
    if number_left:
        print(f"{number_left} cells left; run again to go on")
    return 0


def _measure_all(todo: Sequence, end: float, report: Callable) -> int:
    """Measure cells until all are there or time is up; returns how many are left."""
    for done, (study, row, cell) in enumerate(todo):
        if time.monotonic() > end:
            return len(todo) - done
        report(done + 1, study, row, cell, *_measured(cell))
    return 0


def _measured(cell: Cell) -> tuple[float, float]:
    """Measure a cell; returns its mean SSIM and the seconds that it took."""
    from . import measure  # whoever only lists waits for no torch

    started = time.perf_counter()
    values = measure.run(cell)
    return statistics.mean(values["ssim"]), time.perf_counter() - started


def _list(seeds: Mapping[str, int], todo: Sequence) -> None:
    """Print a line for each study: what of it is left, and how long that takes."""
    for name, number in seeds.items():
        left = [item for item in todo if item[0] == name]
        minutes = estimate(left) / 60
        title = studies.STUDIES[name].title
        print(f"{name:12} {title:52} seeds {number}, {len(left):3} cells to go, {minutes:4.0f} minutes")
