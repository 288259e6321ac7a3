"""Slides for lectures, made from the chapters: one HTML file for each session, which needs no network.

``book/slides.yaml`` says what is shown. A slide names a chapter and what it takes from it: figures and tables of the
page that the build has made, equations, pieces of code and exercises of its source. Nothing is computed here.
"""

from __future__ import annotations

import base64
import html
import re
import shutil
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import nbformat
import yaml
from markdown_it import MarkdownIt

from ecodiff.errors import EcoDiffError
from ecodiff.storage.files import write_whole
from ecodiff.storage.paths import root

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{title}</title>
<link rel="stylesheet" href="reveal/reset.css">
<link rel="stylesheet" href="reveal/reveal.css">
<link rel="stylesheet" href="reveal/theme/white.css">
<style>
.reveal {{ font-size: 28px; }}
.reveal h2 {{ text-transform: none; font-size: 1.4em; }}
.reveal img {{ max-height: 480px; background: white; }}
.reveal pre {{ width: 100%; font-size: 0.55em; }}
.reveal table {{ font-size: 0.6em; }}
.reveal figcaption {{ font-size: 0.55em; }}
</style>
<script>window.MathJax = {{tex: {{inlineMath: [["\\\\(", "\\\\)"]]}}}};</script>
<script defer src="mathjax/tex-svg.js"></script>
</head>
<body>
<div class="reveal"><div class="slides">
{slides}
</div></div>
<script src="reveal/reveal.js"></script>
<script>Reveal.initialize({{hash: true, slideNumber: true, width: 1280, height: 720}});</script>
</body>
</html>
"""
SHOWN = ("points", "figures", "tables", "equations", "exercises", "code")
# What a role of the book says on a slide, where there is no number and nothing to follow.
ROLES = {"fig": "the figure", "tab": "the table", "eq": "the equation", "alg": "the algorithm", "ex": "the exercise"}


def build_slides(out: Path, base: Path | None = None) -> list[Path]:
    """Write ``out/slides/NAME.html`` for each session of ``book/slides.yaml``, with reveal.js and MathJax beside them.

    Raises EcoDiffError where a page has not been built, lacks what a slide names, or reveal.js is not installed.
    """
    base = base or root()
    sessions = yaml.safe_load((base / "book" / "slides.yaml").read_text(encoding="utf-8"))
    folder = out / "slides"
    written = []
    for session in sessions:
        slides = [f"<section>\n<h1>{html.escape(session['title'])}</h1>\n</section>"]
        for slide in session["slides"]:
            slides.append(_slide(slide, out, base))
        text = PAGE.format(title=html.escape(session["title"]), slides="\n".join(slides))
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / f"{session['name']}.html", text.encode())
        written.append(folder / f"{session['name']}.html")
    shutil.copytree(_reveal(), folder / "reveal", dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.map"))
    shutil.copytree(base / "book" / "_extra" / "mathjax", folder / "mathjax", dirs_exist_ok=True)
    return written


def _reveal() -> Path:
    """The folder of reveal.js, which sphinx-revealjs brings."""
    package = find_spec("sphinx_revealjs")
    if package is None or package.origin is None:
        raise EcoDiffError("Slides need reveal.js: install sphinx-revealjs (`pip install sphinx-revealjs`).")
    return Path(package.origin).parent / "_static" / "revealjs" / "dist"


def _slide(slide: Mapping, out: Path, base: Path) -> str:
    unknown = slide.keys() - {"title", "chapter", *SHOWN}
    if unknown:
        raise EcoDiffError(f"slides.yaml: {slide['title']!r} has {sorted(unknown)[0]!r}; known are {', '.join(SHOWN)}.")
    parts = [f"<h2>{html.escape(slide['title'])}</h2>"]
    if "points" in slide:
        parts.append(_markdown("\n".join(f"- {point}" for point in slide["points"])))
    if "chapter" in slide:
        chapter = Chapter(slide["chapter"], out, base)
        for kind in SHOWN[1:]:
            for name in slide.get(kind, ()):
                parts.append(getattr(chapter, kind)(name))
    return "<section>\n" + "\n".join(parts) + "\n</section>"


class Chapter:
    """What slides take from one chapter; ``name``: its file without the number."""

    def __init__(self, name: str, out: Path, base: Path):
        sources = list((base / "notebooks").glob(f"[0-9][0-9]_{name}.md"))
        if not sources:
            raise EcoDiffError(f"slides.yaml: there is no chapter {name!r}.")
        self.name, self.text = name, sources[0].read_text(encoding="utf-8")
        page = out / "notebooks" / f"{sources[0].stem}.ipynb"
        if not page.exists():
            raise EcoDiffError(f"Slides show {page.name}, which has not been run: `make book` first.")
        self.cells = nbformat.read(page, as_version=4).cells

    def figures(self, name: str) -> str:
        """An image of the page with its caption and alternative text."""
        for cell in self.cells:
            myst = cell.metadata.get("mystnb", {})
            if myst.get("figure", {}).get("name") != name:
                continue
            for output in cell.get("outputs", []):
                if "image/png" in output.get("data", {}):
                    image = "".join(output["data"]["image/png"]).replace("\n", "")
                    base64.b64decode(image, validate=True)
                    alt = html.escape(" ".join(myst["image"]["alt"].split()), quote=True)
                    caption = _markdown(myst["figure"]["caption"])
                    picture = f'<img alt="{alt}" src="data:image/png;base64,{image}">'
                    return f"<figure>{picture}<figcaption>{caption}</figcaption></figure>"
        raise self._lacks(name)

    def tables(self, name: str) -> str:
        """A table of the page with its caption."""
        for cell in self.cells:
            for output in cell.get("outputs", []):
                text = "".join(output.get("data", {}).get("text/markdown", ""))
                if re.search(rf"^:name: {re.escape(name)}$", text, re.M):
                    head, *lines = text.strip().splitlines()
                    body = [line for line in lines if line.startswith("|")]
                    return _markdown("\n".join(body)) + _markdown(head.removeprefix(":::{table}").strip())
        raise self._lacks(name)

    def equations(self, name: str) -> str:
        """A numbered formula of the source, without its number."""
        found = re.search(rf"^```{{math}}\n:label: {re.escape(name)}\n(.*?)^```", self.text, re.M | re.S)
        if not found:
            raise self._lacks(name)
        return f"\\[{html.escape(found[1].strip())}\\]"

    def code(self, piece: str) -> str:
        """The code cell that has this piece of code."""
        for cell in self.cells:
            if cell.cell_type == "code" and piece in cell.source:
                return f"<pre><code>{html.escape(cell.source.strip())}</code></pre>"
        raise self._lacks(piece)

    def exercises(self, name: str) -> str:
        """The text of an exercise, without its solution."""
        found = re.search(rf"^:::{{exercise}}[^\n]*\n:label: {re.escape(name)}\n(.*?)^:::$", self.text, re.M | re.S)
        if not found:
            raise self._lacks(name)
        return _markdown(found[1].strip())

    def _lacks(self, what: str) -> EcoDiffError:
        return EcoDiffError(f"slides.yaml: {what!r} is not in the chapter {self.name!r}.")


def _markdown(text: str) -> str:
    """HTML of a piece of the book's Markdown: roles become words, formulas are left to MathJax."""
    formulas: list[str] = []

    def keep(match: re.Match) -> str:
        formulas.append(html.escape(match[1]))
        return f"\x02{len(formulas) - 1}\x03"

    text = re.sub(r"\$([^$\n]+)\$", keep, text)
    text = re.sub(r"\{[\w:]+\}`([^`]+)`", _word, text)
    rendered = MarkdownIt().enable("table").render(text)
    return re.sub("\x02(\\d+)\x03", lambda match: f"\\({formulas[int(match[1])]}\\)", rendered)


def _word(match: re.Match) -> str:
    target = match[1]
    titled = re.match(r"(.*\S)\s*<[^>]+>$", target)
    if titled:
        return titled[1]
    return ROLES.get(target.split("-")[0], re.sub(r"^\d\d_", "", target).replace("_", " "))
