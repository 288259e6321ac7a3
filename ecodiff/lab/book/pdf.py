"""The whole book as one PDF, printed by Chromium from the HTML that has been built.

`join` puts the articles of all pages, in the order of ``book/_toc.yml``, on one page behind a title and a table of
contents. Every reference becomes a link inside that page, and one without a target raises EcoDiffError. Code that the
pages fold is left out; whatever else they fold is opened. `build_pdf` lets MathJax set the formulas, makes what is too
wide fit the paper, and prints twice: the first print tells on which page each chapter begins.
"""

from __future__ import annotations

import html
import os
import posixpath
import re
import shutil
import tempfile
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml
from bs4 import BeautifulSoup, Tag

from ecodiff.errors import EcoDiffError
from ecodiff.storage.files import write_whole
from ecodiff.storage.paths import root

from .citable import authors

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
MACOS = "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"
# A browser that opens nothing but files of this machine, in a container or not.
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PAPER = {"format": "A4", "margin": {"top": "18mm", "bottom": "18mm", "left": "17mm", "right": "17mm"}}
WIDTH = 665  # of what is printed: 210 mm without the margins, in CSS pixels of 1/96 inch
FOOT = '<div style="width: 100%; font-size: 8px; text-align: center"><span class="pageNumber"></span></div>'
PAGE = """<!doctype html>
<html lang="en" data-theme="light" data-mode="light">
<head>
<meta charset="utf-8">
<title>{title}</title>
{styles}
{mathjax}
<script defer src="../html/mathjax/tex-svg.js"></script>
</head>
<body class="printed-book">
{body}
</body>
</html>
"""
SCREEN_ONLY = "a.headerlink, a.viewcode-link, .only-dark, script[type='text/x-thebe-config']"
# What is wider than the paper shrinks until it fits. Elements are those that scroll on a screen.
FIT = """width => {
  const scrolling = "table, .math mjx-container, .highlight, .ecodiff-interactive, img, svg[role=img]";
  for (const element of document.querySelectorAll(scrolling)) {
    const room = element.parentElement.closest("table") ? Infinity : element.parentElement.clientWidth || width;
    const wide = Math.max(element.scrollWidth, element.getBoundingClientRect().width);
    if (wide > room + 1) element.style.zoom = Math.max(room / wide - 0.005, 0.1);
  }
}"""
# The lines of the table of contents: (title, place, whether it is a section of the chapter before it).
LISTED = """() => [...document.querySelectorAll(".printed-contents a")].map(line =>
  [line.firstChild.textContent, line.hash.slice(1), line.classList.contains("printed-section")])"""
# Sentences about what still reaches over the edge of the paper.
CUT = """width => [...document.querySelectorAll("article *")]
  .filter(e => !e.closest("svg, mjx-assistive-mml") && e.getBoundingClientRect().right > width + 2)
  .map(e => `${e.tagName.toLowerCase()} in ${e.closest("article").id}: ${(e.textContent || "").trim().slice(0, 40)}`)"""


def find_browser() -> str | None:
    """The Chromium or Chrome of this machine: what CHROMIUM names, else the first one on PATH; None without any."""
    named = os.environ.get("CHROMIUM")
    if named:
        return shutil.which(named)
    for name in (*BROWSERS, MACOS):
        found = shutil.which(name)
        if found:
            return found
    return None


def build_pdf(out: Path, base: Path | None = None) -> Path:
    """Print the book in ``out/html`` to ``out/book.pdf``, with bookmarks, page numbers and links that jump.

    Raises EcoDiffError where the HTML has not been built, no Chromium is there, or a reference has no target.
    """
    base = base or root()
    folder = (out / "html").resolve()
    if not (folder / "index.html").exists():
        raise EcoDiffError(f"The PDF is printed from {out / 'html'}, which has not been built: `make book` first.")
    program = find_browser()
    if program is None:
        raise EcoDiffError(
            "The PDF is printed by Chromium or Chrome, and neither is on PATH: install one (Debian: "
            "`apt install chromium`), or set CHROMIUM to the program."
        )
    text = join(folder, base)
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        page = Path(scratch, "book.html")
        page.write_text(text, encoding="utf-8")
        write_whole(out / "book.pdf", _printed(page, program))
    return out / "book.pdf"


def _printed(file: Path, program: str) -> bytes:
    """A page as PDF. Contents get their page numbers from a first print."""
    from playwright.sync_api import Error, sync_playwright

    printing = {**PAPER, "print_background": True, "display_header_footer": True}
    printing |= {"header_template": "<span></span>", "footer_template": FOOT}
    with sync_playwright() as driver:
        try:
            chromium = driver.chromium.launch(executable_path=program, args=FLAGS)
            page = chromium.new_page(viewport={"width": WIDTH, "height": 900})
            page.set_default_timeout(300_000)  # of a busy machine
            page.emulate_media(media="print", color_scheme="light")
            page.goto(file.as_uri())
            page.wait_for_function("window.MathJax?.startup?.promise")
            page.evaluate("MathJax.startup.promise")
            unset = page.evaluate("document.querySelectorAll('.math:not(:has(mjx-container))').length")
            if unset:
                raise EcoDiffError(f"The PDF was not printed: MathJax left {unset} formulas as they are in the source.")
            page.evaluate("Promise.all([...document.images].map(image => image.decode().catch(() => 0)))")
            page.evaluate(FIT, WIDTH)
            cut = page.evaluate(CUT, WIDTH)
            if cut:
                raise EcoDiffError(f"The PDF was not printed: the paper would cut {len(cut)} elements, first {cut[0]}.")
            numbers = page_numbers(page.pdf(**printing))
            page.evaluate(
                "numbers => document.querySelectorAll('[data-page-of]').forEach("
                "place => place.textContent = numbers[place.dataset.pageOf] ?? '')",
                numbers,
            )
            listed = page.evaluate(LISTED)
            return bookmarked(page.pdf(**printing, tagged=True), listed)
        except Error as error:
            raise EcoDiffError(f"{program} did not print the book: {error.message.splitlines()[0]}") from None


def page_numbers(pdf: bytes) -> dict[str, int]:
    """Name of each target of a link -> its page, counted from 1."""
    from pypdf import PdfReader

    reader = PdfReader(BytesIO(pdf))
    numbers = {}
    for name, place in reader.named_destinations.items():
        number = reader.get_destination_page_number(place)
        if number is not None:
            numbers[unquote(name.removeprefix("/"))] = number + 1
    return numbers


def bookmarked(pdf: bytes, listed: list[tuple[str, str, bool]]) -> bytes:
    """The PDF with a bookmark for each line of its table of contents.

    Chromium's own bookmarks lose the space where a title breaks, and say a title twice that moved to the next page.
    """
    from pypdf import PdfWriter

    numbers = page_numbers(pdf)
    writer = PdfWriter(clone_from=BytesIO(pdf))
    chapter = None
    for title, place, is_section in listed:
        mark = writer.add_outline_item(
            title=title, page_number=numbers[place] - 1, parent=chapter if is_section else None
        )
        if not is_section:
            chapter = mark
    written = BytesIO()
    writer.write(written)
    return written.getvalue()


def join(folder: Path, base: Path) -> str:
    """All pages of the HTML in ``folder`` as one page, whose own place is a folder beside it.

    Raises EcoDiffError naming every reference whose target is nowhere.
    """
    parts = contents(yaml.safe_load((base / "book" / "_toc.yml").read_text(encoding="utf-8")))
    articles: dict[str, Tag] = {}
    styles: dict[str, None] = {}
    mathjax = ""
    for _, names in parts:
        for name in names:
            soup = BeautifulSoup((folder / f"{name}.html").read_text(encoding="utf-8"), "html.parser")
            articles[name] = _plain(soup.select_one("article.bd-article"))
            for link in soup.select("link[rel=stylesheet]"):
                styles[_resolved(name, link["href"])] = None
            for script in soup.select("head script:not([src]), body > script:not([src])"):
                if "window.MathJax" in script.text:  # says where formulas are looked for
                    mathjax = str(script)
    places = {name: {element["id"] for element in article.find_all(id=True)} for name, article in articles.items()}
    missing = []
    for name, article in articles.items():
        missing += _link(article, name, places)
    if missing:
        raise EcoDiffError(f"The PDF would have links that lead nowhere: {', '.join(sorted(set(missing)))}.")
    for name, article in articles.items():
        _prefix(article, name)
    front = _front(yaml.safe_load((base / "CITATION.cff").read_text(encoding="utf-8")))
    body = [front, _table_of_contents(parts, articles), *map(str, articles.values())]
    sheets = [f'<link rel="stylesheet" href="../html/{path}">' for path in styles]
    title = html.escape(yaml.safe_load((base / "_config.yml").read_text(encoding="utf-8"))["title"])
    return PAGE.format(title=title, styles="\n".join(sheets), mathjax=mathjax, body="\n".join(body))


def contents(toc: Mapping) -> list[tuple[str, list[str]]]:
    """The pages of a ``_toc.yml`` in their order: [(caption of a part, [page, ...]), ...]; the first is the root."""
    parts = [("", [toc["root"]])]
    for part in toc.get("parts", [{"chapters": toc.get("chapters", [])}]):
        parts.append((part.get("caption", ""), [chapter["file"] for chapter in part["chapters"]]))
    return parts


def _plain(article: Tag) -> Tag:
    """An article without what only a screen needs: anchors of headings, images for dark mode, folds, folded code."""
    for element in article.select(SCREEN_ONLY):
        element.decompose()
    for fold in article.select("details"):
        fold["open"] = ""
    for fold in article.select("details.hide"):  # a folded cell: its code goes, its output is shown
        for element in fold.select("summary, .cell_input"):
            element.decompose()
        fold.unwrap()
    return article


def _anchor(name: str, fragment: str = "") -> str:
    """The id on the joined page of a page, or of a place on it."""
    slug = re.sub(r"\W", "-", posixpath.basename(name))
    return f"{slug}--{fragment}" if fragment else slug


def _resolved(name: str, address: str) -> str:
    """The path in the folder of the book of an address on the page ``name``, without what follows ? or #."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(name), unquote(urlsplit(address).path)))


def _link(article: Tag, name: str, places: Mapping[str, set[str]]) -> list[str]:
    """Make links of an article lead to places on the joined page; returns those that would lead nowhere.

    ``places``: the ids that each page has. A link to a file that is no page of the book (an index, a source, an image
    in its own size) becomes plain text.
    """
    missing = []
    for image in article.select("img[src]"):
        if not urlsplit(image["src"]).scheme:
            image["src"] = f"../html/{_resolved(name, image['src'])}"
    for link in article.select("a[href]"):
        address = urlsplit(link["href"])
        if address.scheme or address.netloc:
            continue
        target = _resolved(name, link["href"]).removesuffix(".html") if address.path else name
        fragment = unquote(address.fragment)
        if target not in places or (not address.path and not fragment):
            link.unwrap()
        elif fragment and fragment not in places[target]:
            missing.append(f"{target}#{fragment} on {name}")
        else:
            link["href"] = f"#{_anchor(target, fragment)}"
    return missing


def _prefix(article: Tag, name: str) -> None:
    """Make the ids of an article ones that no other article has."""
    for element in article.find_all(id=True):
        element["id"] = _anchor(name, element["id"])
    for element in article.find_all(attrs={"for": True}):
        element["for"] = _anchor(name, element["for"])
    article["id"] = _anchor(name)


def _front(citation: Mapping) -> str:
    """The title page: this book, and both versions of the paper with all their authors, from ``CITATION.cff``."""
    versions = []
    for work in sorted(citation["references"], key=lambda work: work["year"], reverse=True):
        where = work.get("journal") or work.get("collection-title")
        versions.append(
            f"<p><strong>{html.escape(work['title'])}</strong><br>{html.escape(', '.join(authors(work)))}<br>"
            f'{html.escape(where)}, {work["year"]}. <a href="{work["url"]}">{work["url"]}</a></p>'
        )
    code = citation["repository-code"]
    return f"""<article class="bd-article printed-front" id="title-page">
<div class="printed-title">{html.escape(citation["title"])}</div>
<p>{html.escape(", ".join(authors(citation)))}, version {citation["version"]}. <a href="{code}">{code}</a></p>
<p>The paper that this book accompanies exists in two versions:</p>
{"".join(versions)}
<p>This print has every page of the online book. Code that is folded there is left out here. Figures that move there
stand still, with the values they start from. The chapter on the status of the book says which commit was run, with
which parameters.</p>
</article>"""


def _table_of_contents(parts: list[tuple[str, list[str]]], articles: Mapping[str, Tag]) -> str:
    """Parts, chapters and sections, with an empty place for the page of each."""
    lines = []
    for caption, pages in parts:
        if caption:
            lines.append(f'<p class="printed-part">{html.escape(caption)}</p>')
        for name in pages:
            article = articles[name]
            lines.append(_line(article.find("h1"), article["id"], "printed-chapter"))
            for section in article.select("h2"):
                place = section.find_parent("section")
                if place is not None and place.get("id"):
                    lines.append(_line(section, place["id"], "printed-section"))
    listed = "\n".join(lines)
    return f'<article class="bd-article printed-contents" id="contents"><h1>Contents</h1>\n{listed}\n</article>'


def _line(heading: Tag, place: str, kind: str) -> str:
    text = " ".join(heading.get_text(" ", strip=True).split())
    return f'<a class="{kind}" href="#{place}"><span>{html.escape(text)}</span><span data-page-of="{place}"></span></a>'
