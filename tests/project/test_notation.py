"""The list of symbols against the chapters: each is used where it is said to be, and no two are mistaken."""

import re
from dataclasses import fields, is_dataclass
from pydoc import locate

import pytest
from test_names import is_there

from ecodiff.lab.book import build, notation
from ecodiff.storage.paths import root

LIST = root() / "book" / "notation.yaml"
SYMBOLS, APART = notation.read(LIST)
CHAPTERS = {source.stem[3:]: source for source in build.sources()}
KNOWN = {"z", "α", "g", "k", "m", "n", "f"}
"""Letters with several meanings in the book or the paper, which readers have stumbled over."""
each = pytest.mark.parametrize("symbol", SYMBOLS, ids=lambda symbol: f"{symbol.latex} {symbol.meaning[:20]}")


@each
def test_a_symbol_is_used_in_its_chapters(symbol):
    absent = [
        name
        for name in symbol.chapters
        if name not in CHAPTERS or not notation.is_used(symbol, CHAPTERS[name].read_text(encoding="utf-8"))
    ]
    assert absent == [], f"{symbol.latex} ({symbol.meaning}) does not occur there"


@each
def test_the_first_chapter_of_a_symbol_comes_first(symbol):
    order = list(CHAPTERS)
    assert symbol.chapters[0] == min(symbol.chapters, key=order.index)


@each
def test_a_name_in_the_package_is_there(symbol):
    if symbol.package:
        name = f"ecodiff.{symbol.package}"
        assert is_there(name) or is_field(name), symbol.package


def is_field(dotted: str) -> bool:
    """Whether a dotted name is a field of a dataclass, which the class itself has no attribute of without a default."""
    owner, _, name = dotted.rpartition(".")
    value = locate(owner)
    return is_dataclass(value) and name in {field.name for field in fields(value)}


def test_no_chapter_writes_two_things_alike():
    assert notation.clashes(SYMBOLS) == []


def test_known_clashes_are_told_apart():
    shared = notation.shared_letters(SYMBOLS)
    assert KNOWN <= set(APART)
    assert KNOWN - set(shared) <= {"f", "m"}, "these have one meaning each, which is said"
    unexplained = {}
    for letter, entries in shared.items():
        alike = len({entry.latex for entry in entries}) < len(entries)
        if alike and letter not in APART:
            unexplained[letter] = [entry.meaning for entry in entries]
    assert unexplained == {}


def test_a_clash_is_reported():
    one = notation.Symbol("z", "gate", "0 to 1", ["a", "b"])
    other = notation.Symbol("z", "latent", "real", ["b"])
    elsewhere = notation.Symbol("z", "depth", "real", ["c"])
    indexed = notation.Symbol("z_t", "latent", "real", ["b"])
    assert notation.clashes([one, other, elsewhere, indexed]) == ["z: gate / latent, both in b"]
    assert list(notation.shared_letters([one, indexed])) == ["z"]


def test_a_symbol_is_no_part_of_another():
    text = "The $z_T$ of $\\hat z_0$, and $\\zeta$.\n\n```{math}\n:label: eq\nP(z>0) + g (x)\n```\n"

    def used(latex):
        return notation.is_used(notation.Symbol(latex, "", "", []), text)

    assert used("z_T") and used("\\hat z_0") and used("P(z > 0)") and used("g(x)") and used("z")
    assert not used("z_t") and not used("T_j") and not used("eta") and not used("f")


def test_the_page_has_every_symbol_and_links_that_exist():
    titles = {source.stem[3:]: f"{source.stem}.ipynb" for source in CHAPTERS.values()}
    page = notation.page(LIST, titles)
    assert all(f"| ${symbol.latex}$ |" in page for symbol in SYMBOLS)
    linked = set(re.findall(r"\(notebooks/(\S+)\)", page))
    assert linked <= set(titles.values())
    assert "{include} _notation.md" in (root() / "book" / "notation.md").read_text(encoding="utf-8")
