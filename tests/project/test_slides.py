"""Slides of a stub chapter: what is taken from it, what is said where something is lacking; and the book's own list."""

import re
from pathlib import Path

import nbformat
import pytest
import yaml

from ecodiff.errors import EcoDiffError
from ecodiff.lab.book import build, slides
from ecodiff.storage.paths import root

SOURCE = """# Stub

```{math}
:label: eq-stub
a < b
```

:::{exercise}
:label: ex-stub
Is $a < b$ by {eq}`eq-stub` in {doc}`01_stub`?
:::

:::{solution} ex-stub
Yes.
:::
"""
DOT = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY42YAAAAASUVORK5CYII="
TABLE = ":::{table} Two of {eq}`eq-stub`.\n:name: tab-stub\n\n| a | b |\n| --- | ---: |\n| x | 2 |\n:::"


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A book of one chapter that has been run, and a folder in the place of reveal.js."""
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "book" / "_extra" / "mathjax").mkdir(parents=True)
    (tmp_path / "book" / "_extra" / "mathjax" / "tex-svg.js").write_text("")
    (tmp_path / "reveal").mkdir()
    (tmp_path / "reveal" / "reveal.js").write_text("")
    (tmp_path / "notebooks" / "01_stub.md").write_text(SOURCE)
    monkeypatch.setattr(slides, "_reveal", lambda: tmp_path / "reveal")
    figure = nbformat.v4.new_code_cell("plot()", outputs=[nbformat.v4.new_output("display_data", {"image/png": DOT})])
    figure.metadata["mystnb"] = {"figure": {"name": "fig-stub", "caption": "A dot."}, "image": {"alt": 'A "dot"'}}
    table = nbformat.v4.new_code_cell("t()", outputs=[nbformat.v4.new_output("display_data", {"text/markdown": TABLE})])
    page = tmp_path / "out" / "notebooks" / "01_stub.ipynb"
    page.parent.mkdir(parents=True)
    nbformat.write(nbformat.v4.new_notebook(cells=[figure, table, nbformat.v4.new_code_cell("def f(x): x < 1")]), page)
    return tmp_path


def deck(project, **slide) -> str:
    listed = [{"name": "one", "title": "One", "slides": [{"title": "S", "chapter": "stub", **slide}]}]
    (project / "book" / "slides.yaml").write_text(yaml.safe_dump(listed))
    written = slides.build_slides(project / "out", project)
    assert [path.relative_to(project).as_posix() for path in written] == ["out/slides/one.html"]
    return written[0].read_text()


def test_a_slide_has_what_its_chapter_has(project):
    text = deck(project, points=["why $x$?"], figures=["fig-stub"], tables=["tab-stub"], equations=["eq-stub"],
                code=["def f"], exercises=["ex-stub"])  # fmt: skip
    assert text.count("<section>") == 2
    assert f'alt="A &quot;dot&quot;" src="data:image/png;base64,{DOT}"' in text
    assert "<td>x</td>" in text and "Two of the equation." in text
    assert "\\[a &lt; b\\]" in text and "def f(x): x &lt; 1" in text and "why \\(x\\)?" in text
    assert "Is \\(a &lt; b\\) by the equation in stub?" in text and "Yes." not in text


def test_slides_need_no_network(project):
    text = deck(project, points=["p"])
    addresses = re.findall(r'(?:src|href)="(?!data:)([^"]+)"', text)
    assert addresses and not [address for address in addresses if "//" in address]
    for name in ("reveal/reveal.js", "mathjax/tex-svg.js"):
        assert name in addresses and (project / "out" / "slides" / name).exists()


@pytest.mark.parametrize("kind", ["figures", "tables", "equations", "code", "exercises"])
def test_what_a_chapter_lacks_is_named(project, kind):
    with pytest.raises(EcoDiffError, match="'nothing' is not in the chapter 'stub'"):
        deck(project, **{kind: ["nothing"]})


def test_a_page_that_was_not_run_and_a_word_that_is_not_known_are_refused(project):
    with pytest.raises(EcoDiffError, match="has 'figure'; known are"):
        deck(project, figure="fig-stub")
    (project / "out" / "notebooks" / "01_stub.ipynb").unlink()
    with pytest.raises(EcoDiffError, match="make book"):
        deck(project, figures=["fig-stub"])


def test_the_list_of_the_book_names_what_chapters_have():
    sources = {source.stem[3:]: source.read_text(encoding="utf-8") for source in build.sources()}
    sessions = yaml.safe_load((root() / "book" / "slides.yaml").read_text(encoding="utf-8"))
    assert [session["name"] for session in sessions] == ["session-1", "session-2", "session-3"]
    for session in sessions:
        for slide in session["slides"]:
            for kind in slide.keys() & {"figures", "tables", "equations", "code", "exercises"}:
                for name in slide[kind]:
                    assert name in sources[slide["chapter"]], f"{slide['title']}: {name}"


def test_make_has_a_target():
    assert re.search(r"^slides: book", Path(root(), "Makefile").read_text(), re.M)
