"""The book as one PDF: a book of two small pages, joined and printed; and a whole one that ECODIFF_BOOK names."""

import os
import re
import shutil
from pathlib import Path

import pytest
import yaml

from ecodiff.errors import EcoDiffError
from ecodiff.lab.book import build, pdf
from ecodiff.storage.paths import root

HEAD = """<html><head><link rel="stylesheet" href="{up}_static/custom.css?v=1">
<script>window.MathJax = {{"options": {{"processHtmlClass": "mathjax_process|math|output_area"}}}}</script>
</head><body><article class="bd-article">"""
FIRST = """<section id="welcome"><h1>Welcome<a class="headerlink" href="#welcome">#</a></h1>
<p>See <a href="notebooks/01_one.html#limits">the limits</a>, <a href="notebooks/01_one.html">the chapter</a>,
<a href="genindex.html">the index</a> and <a href="https://example.org/x">a page elsewhere</a>.</p></section>"""
SECOND = (
    r"""<section id="one"><h1>1. One</h1>
<section id="limits"><h2>1.1. Limits<a class="headerlink" href="#limits">#</a></h2>
<p><a href="../index.html#welcome">Back</a>. <span class="math">\(a_1 = 2\)</span></p>
<img class="only-dark" src="../_images/dark.png" alt="dark"><img src="../_images/light.png" alt="light">
<details class="admonition hide above-input"><summary>Show</summary><div class="cell_input">folded = 1</div></details>
<details class="admonition hide above-input"><summary>Show</summary><div class="cell_input">more = 2</div>
<div class="cell_output">what came out</div></details>
<details class="sd-dropdown"><summary>Solution</summary>The answer.</details>
<table class="table"><tr>"""
    + "<td>a_long_name_in_a_wide_table</td>" * 9
    + "</tr></table></section></section>"
)
CITATION = {
    "title": "A title",
    "version": "0.1.0",
    "repository-code": "https://example.org/code",
    "authors": [{"name": "All of us"}],
    "references": [
        {"title": "Old & new", "authors": [{"family-names": "Author", "given-names": "Ann"}], "year": 2024,
         "journal": "arXiv", "url": "https://example.org/1"},
        {"title": "Newer", "authors": [{"family-names": "Author", "given-names": "Ann"}], "year": 2026,
         "collection-title": "ICLR", "url": "https://example.org/2"},
    ],
}  # fmt: skip
TOC = {"root": "index", "parts": [{"caption": "The part", "chapters": [{"file": "notebooks/01_one"}]}]}


@pytest.fixture
def project(tmp_path):
    """A folder with what `pdf.join` reads: sources in it, the built pages in ``out/html``."""
    pages = tmp_path / "out" / "html"
    (pages / "notebooks").mkdir(parents=True)
    (pages / "index.html").write_text(HEAD.format(up="") + FIRST)
    (pages / "notebooks" / "01_one.html").write_text(HEAD.format(up="../") + SECOND)
    shutil.copytree(root() / "book" / "_static", pages / "_static")
    (tmp_path / "book").mkdir()
    (tmp_path / "book" / "_toc.yml").write_text(yaml.safe_dump(TOC))
    (tmp_path / "CITATION.cff").write_text(yaml.safe_dump(CITATION))
    (tmp_path / "_config.yml").write_text("title: A book\n")
    return tmp_path


def joined(project) -> str:
    return pdf.join(project / "out" / "html", project)


def test_links_lead_to_places_on_the_one_page(project):
    text = joined(project)
    inside = set(re.findall(r'href="#([^"]+)"', text))
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert {"01_one--limits", "01_one", "index--welcome"} <= inside <= set(ids)
    assert len(ids) == len(set(ids))
    assert 'href="https://example.org/x"' in text and "genindex" not in text and "the index" in text
    assert 'src="../html/_images/light.png"' in text and text.count("custom.css") == 1


def test_folded_code_and_what_screens_need_are_left_out_and_the_rest_is_open(project):
    text = joined(project)
    for gone in ("folded = 1", "more = 2", "Show", "headerlink", "dark.png"):
        assert gone not in text, gone
    assert "what came out" in text and "The answer." in text
    assert re.search(r'<details class="sd-dropdown" open="">', text)


def test_the_title_and_the_contents_stand_in_front(project):
    text = joined(project)
    front, contents, *chapters = text.split("<article")[1:]
    assert "Old &amp; new" in front and front.index("Newer") < front.index("Old &amp; new") and "Ann Author" in front
    places = re.findall(r'<span>([^<]+)</span><span data-page-of="([^"]+)">', contents)
    assert places == [("Welcome", "index"), ("1. One", "01_one"), ("1.1. Limits", "01_one--limits")]
    assert "The part" in contents and "The answer." in chapters[1]


def test_a_link_without_a_target_is_named(project):
    page = project / "out" / "html" / "index.html"
    page.write_text(page.read_text().replace("#limits", "#nowhere"))
    with pytest.raises(EcoDiffError, match="notebooks/01_one#nowhere on index"):
        joined(project)


def test_what_is_needed_is_named_before_anything_is_written(project, monkeypatch):
    monkeypatch.setenv("CHROMIUM", "no-such-program")
    with pytest.raises(EcoDiffError, match="Chromium or Chrome, and neither is on PATH"):
        pdf.build_pdf(project / "out", project)
    shutil.rmtree(project / "out" / "html")
    with pytest.raises(EcoDiffError, match="`make book` first"):
        pdf.build_pdf(project / "out", project)
    assert not (project / "out" / "book.pdf").exists()


def faults(reader) -> list[str]:
    """What is wrong with links and bookmarks of a PDF, as sentences."""
    found, jumps = [], 0
    targets = reader.named_destinations.keys()
    for number, page in enumerate(reader.pages, 1):
        for note in page.get("/Annots", []):
            note = note.get_object()
            action = note.get("/A", {})
            address, target = str(action.get("/URI", "")), note.get("/Dest", action.get("/D"))
            if address:
                if not address.startswith(("https://", "http://", "mailto:")) or "127.0.0.1" in address:
                    found.append(f"page {number} links to {address}")
            elif isinstance(target, str) and target not in targets and target.removeprefix("/") not in targets:
                found.append(f"page {number} links to {target}, which is nowhere")
            elif target is not None:
                jumps += 1
    if not jumps:
        found.append("no link jumps")
    if not reader.outline:
        found.append("there are no bookmarks")
    return found


def titles(outline) -> list[str]:
    """Titles of all bookmarks, in their order."""
    found = []
    for entry in outline:
        found += titles(entry) if isinstance(entry, list) else [entry.title]
    return found


needs_browser = pytest.mark.skipif(pdf.find_browser() is None, reason="no Chromium here: install Debian's `chromium`")


@needs_browser
@pytest.mark.slow
def test_chromium_prints_it_with_bookmarks_page_numbers_and_links(project):
    from pypdf import PdfReader

    shutil.copytree(root() / "book" / "_extra" / "mathjax", project / "out" / "html" / "mathjax")
    (project / "out" / "html" / "_images").mkdir()
    shutil.copy(root() / "book" / "_static" / "before-after.png", project / "out" / "html" / "_images" / "light.png")
    reader = PdfReader(pdf.build_pdf(project / "out", project))
    pages = [page.extract_text() for page in reader.pages]
    assert len(pages) == 4  # title, contents, and a chapter on each of the two
    assert not faults(reader)
    assert titles(reader.outline) == ["Welcome", "1. One", "1.1. Limits"]
    assert re.search(r"Welcome\s*3\b", pages[1]) and re.search(r"1\.1\. Limits\s*4\b", pages[1]), pages[1]
    assert pages[3].count("a_long_name") == 9 and "\\(" not in pages[3]
    assert [path.name for path in (project / "out").iterdir() if "tmp" in path.name] == []


BOOK = os.environ.get("ECODIFF_BOOK")


@needs_browser
@pytest.mark.skipif(not BOOK, reason="ECODIFF_BOOK names no built book (the folder html of make book)")
def test_the_pdf_of_the_whole_book():
    """Every chapter is there and every link leads somewhere. (`build_pdf` refuses formulas that are not set.)"""
    from pypdf import PdfReader

    reader = PdfReader(Path(BOOK).with_name("book.pdf"))
    assert not faults(reader)
    bookmarks = titles(reader.outline)
    for source in build.sources():
        heading = re.search(r"^# (.+)$", source.read_text(encoding="utf-8"), re.M)[1]
        assert [title for title in bookmarks if title.endswith(heading)], heading
