"""The book's symbols: the page on notation, and which letters stand for more than one thing.

The list is ``book/notation.yaml``, which says what its fields are. Chapters are named there by their files without the
number, so that the list stays right when chapters move.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

GREEK = {"\\alpha": "α", "\\beta": "β", "\\gamma": "γ", "\\delta": "δ", "\\zeta": "ζ", "\\lambda": "λ", "\\tau": "τ",
         "\\epsilon": "ε"}  # fmt: skip
MATHS = re.compile(r"\{math\}.*?^```|\$\$.+?\$\$|\$[^$\n]+\$", re.S | re.M)
# What is not a symbol's own letter: accents, fonts and operators of LaTeX.
MARKS = re.compile(r"\\(hat|bar|log|mathcal)(?![A-Za-z])")


@dataclass(frozen=True)
class Symbol:
    """One entry of the list. ``chapters``: names of files without the number, the first use first."""

    latex: str
    meaning: str
    range: str
    chapters: Sequence[str]
    plain: str = ""
    package: str = ""
    paper: str = ""

    @property
    def letter(self) -> str:
        """The letter without accents, indices and arguments; a calligraphic letter counts as one of its own."""
        if self.latex.startswith("\\mathcal"):
            return self.latex
        bare = MARKS.sub("", self.latex).strip()
        if bare.startswith("P("):
            return "P"
        command = re.match(r"\\[A-Za-z]+", bare)
        return GREEK.get(command[0], command[0]) if command else bare[0]


def read(path: Path) -> tuple[list[Symbol], dict[str, str]]:
    """The symbols of a list, and how letters with several meanings are told apart, {letter: sentences}."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    return [Symbol(**entry) for entry in content["symbols"]], content["apart"]


def shared_letters(symbols: Sequence[Symbol]) -> dict[str, list[Symbol]]:
    """{letter: its entries} for each letter that stands for more than one thing."""
    by_letter: dict[str, list[Symbol]] = {}
    for symbol in symbols:
        by_letter.setdefault(symbol.letter, []).append(symbol)
    return {letter: entries for letter, entries in by_letter.items() if len(entries) > 1}


def clashes(symbols: Sequence[Symbol]) -> list[str]:
    """A line for each pair of entries that are written alike in one chapter: nothing there tells them apart."""
    lines = []
    for i, one in enumerate(symbols):
        for other in symbols[i + 1 :]:
            both = set(one.chapters) & set(other.chapters)
            if one.latex == other.latex and both:
                lines.append(f"{one.latex}: {one.meaning} / {other.meaning}, both in {', '.join(sorted(both))}")
    return lines


def maths(text: str) -> str:
    """All formulas of a chapter's source, one a line."""
    return "\n".join(match[0] for match in MATHS.finditer(text))


def is_used(symbol: Symbol, text: str) -> bool:
    """Whether a chapter's source has the symbol, in a formula or, where it may stand there, in prose."""
    return (bool(symbol.plain) and symbol.plain in text) or _occurs(symbol.latex, maths(text))


def _occurs(latex: str, formulas: str) -> bool:
    """Whether formulas have this symbol as such: not inside a word or a command, and a bare letter without an index."""
    pieces = re.findall(r"\\[A-Za-z]+|\S", latex)
    start = r"(?<![A-Za-z\\])" if pieces[0].isalpha() else ""
    end = r"(?![A-Za-z])" if pieces[-1][-1].isalpha() else ""
    if len(pieces) == 1 and latex.isalpha():
        end = r"(?![A-Za-z_])"
    return re.search(start + r"\s*".join(map(re.escape, pieces)) + end, formulas) is not None


def page(path: Path, titles: Mapping[str, str]) -> str:
    """The tables of the page (MyST). ``titles``: {name of a chapter without its number: name of its page}."""
    symbols, apart = read(path)
    heads = ["Symbol", "Meaning", "Range", "First used in", "In the package", "Where the paper writes otherwise"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for symbol in symbols:
        first = f"[](notebooks/{titles[symbol.chapters[0]]})"
        package = f"`{symbol.package}`" if symbol.package else ""
        cells = [f"${symbol.latex}$", symbol.meaning, symbol.range, first, package, symbol.paper]
        lines.append("| " + " | ".join(cells) + " |")
    shared = ["| Letter | Its meanings | How to tell them apart |", "|---|---|---|"]
    for letter, entries in shared_letters(symbols).items():
        if letter in apart:
            meanings = "; ".join(f"${entry.latex}$: {entry.meaning}" for entry in entries)
            shared.append(f"| {letter} | {meanings} | {apart[letter]} |")
    return "\n".join(["## Symbols", "", *lines, "", "## One letter, several meanings", "", *shared, ""])
