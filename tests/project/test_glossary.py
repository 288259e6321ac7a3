"""Terms of the glossary in the chapters: the first use is a link, and nothing else changes."""

import re

import nbformat
import pytest

from ecodiff.lab.book import build, glossary
from ecodiff.storage.paths import root

TERMS = glossary.definitions(root() / "book" / "glossary.md")


def linked(*texts, terms=("gate", "mask", "row", "unit")):
    page = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(text) for text in texts])
    glossary.link_first_uses(page, list(terms))
    return [cell.source for cell in page.cells]


def test_only_the_first_use_is_a_link():
    assert linked("A gate, and a gate.", "A gate.") == ["A {term}`gate`, and a gate.", "A gate."]


def test_plurals_and_capitals_lead_to_the_term():
    assert linked("Gates and masks.") == ["{term}`Gates <gate>` and {term}`masks <mask>`."]


def test_a_link_of_the_source_counts_as_the_first_use():
    text = "{term}`Masks <mask>` and a mask, {term}`gate` and a gate."
    assert linked(text) == [text]


@pytest.mark.parametrize(
    "text",
    [
        "# A gate",
        "`gate`",
        "``a gate``",
        "```python\ngate = 1\n```",
        "$gate$ and $$\ngate\n$$",
        "[a gate](x.md)",
        "{ref}`the gate <sec-gate>`",
        "| gate | mask |",
        "(sec-gate)=",
        "<a href='gate'>",
        "https://example.org/gate",
        "```{math}\ngate\n```",
        ":::{figure} gate.svg\n:alt: a gate\n\nThe caption of a gate.\n:::",
        ":::{solution} ex-gate\n:class: dropdown\nA gate.\n:::",
        ":::{note} A gate\n:class: gate\n:::",
        "gateway",
        "a row of a table",
        "ten units of work",
    ],
)
def test_what_is_no_running_text_stays(text):
    assert linked(text) == [text]


def test_text_after_and_inside_boxes_is_linked():
    box = ":::{note} Title\n:class: tip\n- A gate.\n:::\nThen a mask."
    assert linked(box) == [":::{note} Title\n:class: tip\n- A {term}`gate`.\n:::\nThen a {term}`mask`."]


def test_of_two_terms_that_begin_together_the_longer_one_is_linked():
    assert linked("a table set", terms=("table", "table set")) == ["a {term}`table set`"]


@pytest.mark.parametrize("source", build.sources(), ids=lambda source: source.stem)
def test_links_change_no_word_of_a_chapter(source):
    page = build.read(source)
    before = [cell.source for cell in page.cells]
    glossary.link_first_uses(page, list(TERMS))
    for text, cell in zip(before, page.cells, strict=True):
        assert without_links(cell.source) == without_links(text)


def without_links(text):
    return re.sub(r"\{term\}`([^`<]+?)(?: <[^>`]*>)?`", r"\1", text)


def test_every_term_is_used_in_a_chapter_or_on_another_page():
    unused = set(TERMS)
    for source in build.sources():
        page = build.read(source)
        glossary.link_first_uses(page, list(TERMS))
        for cell in page.cells:
            unused -= set(re.findall(r"\{term\}`(?:[^`<]*<)?([^`>]+)>?`", cell.source))
    for other in (root() / "book").glob("*.md"):
        if other.name != "glossary.md":
            text = other.read_text(encoding="utf-8")
            unused -= {term for term in unused if re.search(rf"\b{term}s?\b", text, re.I)}
    assert unused == set()


def test_definitions_are_plain_text():
    assert len(TERMS) > 30
    assert [text for text in TERMS.values() if re.search(r"[`{}*<]", text)] == []
    assert "CONSTANTS" not in glossary.script(TERMS) and '"hard-concrete"' in glossary.script(TERMS)
