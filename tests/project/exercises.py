"""The exercises of the chapters, and the code of a chapter run up to what an exercise asks for.

``exercises.yaml`` says for each exercise how its solution is checked; ``test_exercises.py`` does it.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import yaml

from ecodiff.lab.book import build

BLOCK = re.compile(r"^:::\{(?P<kind>exercise|solution)\}(?P<of>[^\n]*)\n(?P<body>.*?)^:::$", re.M | re.S)
LABEL = re.compile(r"^:label: *(\S+)$", re.M)
OPTION = re.compile(r"^:\w+:.*\n", re.M)
GIVEN = re.compile(r"-p (?P<name>\w+) (?P<value>[^\s`]+)")
# Words by which an exercise asks for the chapter, or a part of it, to be run with something changed.
RUNS = re.compile(r"\b[Rr]erun\b|\bRun this (chapter|page|notebook)\b|(?<![\w-])-[py] \w+")


@dataclass(frozen=True)
class Exercise:
    """An exercise of a chapter with its solution, both as MyST text."""

    label: str
    notebook: Path
    text: str
    solution: str
    starter: str
    """The code cell between the two, which calls the check; empty where there is none."""

    @property
    def given(self) -> list[tuple[str, str]]:
        """Parameters that exercise and solution name as ``-p name value``."""
        return [(match["name"], match["value"]) for match in GIVEN.finditer(self.text + self.solution)]

    @property
    def runs(self) -> bool:
        """Whether it asks for a run with something changed."""
        return bool(RUNS.search(self.text + self.solution))


def exercises() -> dict[str, Exercise]:
    """Every exercise of every chapter by its label. Fails for one without exactly one solution."""
    found = {}
    for source in build.sources():
        texts, solutions = {}, {}
        for block in BLOCK.finditer(source.read_text(encoding="utf-8")):
            body = OPTION.sub("", block["body"]).strip()
            if block["kind"] == "exercise":
                label = LABEL.search(block["body"])[1]
                assert label not in texts, f"{source.name}: two exercises are labelled {label}"
                texts[label] = body
            else:
                label = block["of"].strip()
                assert label not in solutions, f"{source.name}: two solutions of {label}"
                solutions[label] = body
        assert texts.keys() == solutions.keys(), f"{source.name}: exercises and solutions do not match"
        for label, text in texts.items():
            found[label] = Exercise(label, source, text, solutions[label], starter_of(source, label))
    return found


def starter_of(source: Path, label: str) -> str:
    """The cell that checks an exercise. Fails for one that is checked twice."""
    codes = [cell.source for cell in cells_of(source) if f'check("{label}"' in cell.source]
    assert len(codes) <= 1, f"{source.name}: {label} is checked in {len(codes)} cells"
    return "".join(codes)


def handed_over(exercise: Exercise) -> tuple[int, list[ast.keyword]]:
    """How many answers the starter code gives to the check, and the chapter's values that it hands over."""
    for node in ast.walk(ast.parse(exercise.starter)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "check":
            return len(node.args) - 1, node.keywords
    raise AssertionError(f"{exercise.label} has no check")


def values_for(exercise: Exercise, names: dict) -> dict:
    """The chapter's values that the check of an exercise needs, from the names that its code has defined."""
    values = {}
    for keyword in handed_over(exercise)[1]:
        value = eval(compile(ast.Expression(keyword.value), exercise.label, "eval"), names)
        values |= value if keyword.arg is None else {keyword.arg: value}
    return values


@lru_cache(maxsize=1)
def checks() -> dict:
    """What ``exercises.yaml`` says."""
    return yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))


@cache
def own_parameters(source: Path) -> dict[str, object]:
    """Names and default values of a chapter's parameters, parsed once."""
    return build.parameters(source)


@cache
def cells_of(source: Path) -> tuple:
    """A chapter's cells, parsed once."""
    return tuple(build.read(source).cells)


def run_cells(source: Path, parameters: dict, cells: list[str], starter: str = "") -> dict:
    """The names that a chapter's code defines when it is run with other parameters.

    What runs is the cell of parameters, the code that follows it before any text (imports, and what the whole chapter
    needs), then the named cells: each is named by a piece of its source that no other cell has. The starter code of an
    exercise comes last.
    """
    every = cells_of(source)
    first = next(i for i, cell in enumerate(every) if "parameters" in cell.metadata.get("tags", []))
    names = {"__name__": source.stem}
    exec(every[first].source, names)
    unknown = parameters.keys() - own_parameters(source).keys()
    assert not unknown, f"{source.name} has no parameters {sorted(unknown)}"
    names |= parameters
    after = first + 1
    while every[after].cell_type == "code":
        exec(every[after].source, names)
        after += 1
    rest = []
    for cell in every[after:]:
        if cell.cell_type == "code" and "exercise" not in cell.metadata.get("tags", []):
            rest.append(cell.source)
    for piece in cells:
        named = [code for code in rest if piece in code]
        assert len(named) == 1, f"{source.name}: {len(named)} code cells have {piece!r}"
        exec(named[0], names)
    exec(first_imports(source), names)
    exec(starter, names)
    return names


def first_imports(source: Path) -> str:
    """Imports of a chapter's starter code: a reader goes from the top, and a later cell may use them."""
    lines = []
    for cell in cells_of(source):
        if "exercise" in cell.metadata.get("tags", []):
            lines += [line for line in cell.source.splitlines() if line.startswith(("from ", "import "))]
    return "\n".join(lines)


def number(text: str) -> float:
    """The number that a text such as "−0.024" or "12.5 %" states."""
    return float(text.replace("−", "-").replace(",", "").removesuffix("%").strip())
