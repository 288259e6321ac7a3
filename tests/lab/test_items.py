"""The paper, item by item: nothing is left out or there twice, and links lead to what is there."""

import re

import pytest

from ecodiff.lab import claims
from ecodiff.lab.claims import items, page, rules
from ecodiff.lab.errata import Erratum, Line
from ecodiff.storage.paths import root

ALL = [item for group in items.ITEMS.values() for item in group]
SOURCE = (root() / "notebooks" / "14_item_by_item.md").read_text(encoding="utf-8")
SOURCES = "\n".join(path.read_text(encoding="utf-8") for path in sorted((root() / "notebooks").glob("*.md")))


def test_every_table_figure_equation_and_algorithm_is_there_once():
    names = [item.name for item in ALL]
    assert len(names) == len(set(names))
    for kind, last in (("Table", 12), ("Figure", 15), ("Equation", 19), ("Algorithm", 2)):
        assert [name for name in names if name.startswith(kind)] == [f"{kind} {n}" for n in range(1, last + 1)]
    assert {item.name for item in items.LATER} == set(items.PUBLISHED_PLACES.values())


@pytest.mark.parametrize("item", [*items.TABLES, *items.FIGURES, *items.ALGORITHMS, *items.LATER], ids=lambda i: i.slug)
def test_an_item_has_a_heading_of_its_name_alone(item):
    """A search for "Table 7" ranks such a heading first."""
    stub = f"({item.slug})=\n### {item.name}\n\n```{{glue:md}} {item.slug}\n:format: myst\n```\n"
    assert SOURCE.count(stub) == 1 and SOURCE.count(f"### {item.name}\n") == 1


@pytest.mark.parametrize("item", ALL, ids=lambda item: item.slug)
def test_an_item_leads_to_what_is_there(item):
    assert (root() / "notebooks" / f"{item.chapter}.md").is_file()
    for label in item.labels:
        assert re.search(rf"{label}\b(?!-)", SOURCES), label
    assert item.shows.endswith(".") and item.command.split(" ")[0] in ("python", "papermill", "")


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("App. G.2, K.3, Tables 4, 9", {"Table 4", "Table 9"}),
        ("App. G.2, M, Fig. 7, 9, 14, 15", {"Figure 7", "Figure 9", "Figure 14", "Figure 15"}),
        ("§2.3, App. G.1, Fig. 8a", {"Figure 8"}),
        ("App. D, Eq. 18-19", {"Equation 18", "Equation 19"}),
        ("Alg. 1, line 6", {"Algorithm 1"}),
        ("Eq. 4, Fig. 4", {"Equation 4", "Figure 4"}),
        ("Table 8: SDXL at 25%", {"Table 8"}),
        ("Published version (read second-hand), main table; Tables 1, 7", {"Published main table"}),
        ("§3.2", set()),
    ],
)
def test_a_place_names_items(place, expected):
    assert items.named(place) == expected


def claim(where, *decisions):
    return rules.Claim(where, "It is.", "Test.", (), decisions, "it_is")


def test_a_word_counts_only_decisions_about_the_item():
    good = rules.Decision("Table 4, SDXL", rules.PRINTED, "1")
    bad = rules.Decision("Table 9, FLUX", rules.NOT_PRINTED, "1")
    small = rules.Decision("`m` (small, for SDXL)", rules.UNDECIDED, "1")
    four, nine = items.TABLES[3], items.TABLES[8]
    both = [("1", claim("Tables 4, 9", good, bad))]
    assert items.judge(four, both, ()).word == rules.HOLDS and items.judge(nine, both, ()).word == rules.FAILS
    verdict = items.judge(four, [("1", claim("Tables 4, 9", good, bad, small))], ())
    assert (verdict.word, verdict.scale) == (rules.MIXED, "paper's numbers, small models")
    erratum = Erratum("Table 4", "Wrong.", (Line("x", "1", "2", False),))
    assert items.judge(four, (), [erratum]).word == rules.FAILS
    assert items.judge(four, (), ()).word == items.SHOWN
    assert "{ref}`1 <claim-it-is>`" in items.text(four, verdict) and page.badge(rules.MIXED) in items.text(
        four, verdict
    )


def test_the_claims_name_no_item_that_is_not_there(monkeypatch):
    monkeypatch.setenv("ECODIFF_RECORDS", "off")
    names = {item.name for item in ALL}
    for one in claims.check([*claims.CLAIMS, *claims.PUBLISHED], presets=()):
        assert items.named(one.where) <= names, one.where
