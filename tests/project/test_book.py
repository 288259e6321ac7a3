"""The runner on tiny chapters: what runs again, what a failure leaves, what a page says about itself."""

import os
import shutil
import sys

import nbformat
import pytest
from doit.doit_cmd import DoitMain

from ecodiff.errors import EcoDiffError
from ecodiff.lab.book import build, plotting
from ecodiff.storage.paths import root

HEADER = """---
kernelspec: {{display_name: Python 3, language: python, name: python3}}
ecodiff:
  lab: {lab}
  data: {data}
  makes: {makes}
---
# Chapter

```{{code-cell}} ipython3
:tags: [parameters]

profile: str = "default"  # name of the profile
size: int = 3  # how many
```
"""


def chapter(base, name, code, data=(), makes=(), lab=(), cell_header=""):
    source = base / "notebooks" / f"{name}.md"
    source.parent.mkdir(parents=True, exist_ok=True)
    head = HEADER.format(data=list(data), makes=list(makes), lab=list(lab))
    source.write_text(f"{head}\n```{{code-cell}} ipython3\n{cell_header}{code}\n```\n")
    return source


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project of its own with profiles and a data folder."""
    profiles = tmp_path / "notebooks" / "profiles"
    profiles.mkdir(parents=True)
    (profiles / "default.yaml").write_text("profile: default\n")
    (profiles / "smoke.yaml").write_text("profile: smoke\nsize: 1\nunknown: 5\n")
    (tmp_path / "data").mkdir()
    monkeypatch.setenv("ECODIFF_DATA", str(tmp_path / "data"))
    return tmp_path


@pytest.mark.slow
def test_a_page_knows_its_provenance_and_hides_injected_parameters(project):
    source = chapter(project, "01_a", "print(size)")
    page = build.run(source, "smoke", project / "out")
    notebook = nbformat.read(page, as_version=4)
    facts = notebook.metadata.ecodiff
    assert facts.profile == "smoke" and facts.parameters == {"profile": "smoke", "size": 1}
    assert facts.seconds > 0 and facts.commit and facts.versions["python"] == ".".join(map(str, sys.version_info[:3]))
    injected = [cell for cell in notebook.cells if "injected-parameters" in cell.metadata.tags]
    assert len(injected) == 1 and "remove-input" in injected[0].metadata.tags and "unknown" not in injected[0].source
    assert [cell.id for cell in notebook.cells] == [f"01-{i:03d}" for i in range(len(notebook.cells))]
    assert notebook.cells[-1].outputs[0].text == "1\n"
    text = page.read_text()
    assert str(project) not in text and str(root()) not in text and sys.prefix not in text
    assert "| [](notebooks/01_a.ipynb) | smoke |" in build.status([page])


@pytest.mark.slow
def test_nothing_is_injected_where_the_profile_says_the_same(project):
    notebook = nbformat.read(build.run(chapter(project, "01_a", "size"), "default", project / "out"), as_version=4)
    assert not [cell for cell in notebook.cells if "injected-parameters" in cell.metadata.get("tags", [])]


@pytest.mark.slow
def test_a_page_has_a_table_of_its_parameters_above_their_folded_cell(project):
    source = chapter(project, "01_a", "size")
    for profile, line in (("default", "| `size` | `3` | how many |"), ("smoke", "| `size` | `3` | `1` | how many |")):
        cells = nbformat.read(build.run(source, profile, project / "out"), as_version=4).cells
        place = next(i for i, cell in enumerate(cells) if "parameters" in cell.metadata.get("tags", []))
        assert cells[place - 1].cell_type == "markdown" and line in cells[place - 1].source
        assert "hide-input" in cells[place].metadata.tags


def test_a_comment_is_shown_as_it_is_written(project):
    source = chapter(project, "01_a", "1")
    source.write_text(source.read_text().replace("how many", "a|b, *c* and `d_e` of [f]($g$); 0: none"))
    assert r"| a\|b, \*c\* and \`d\_e\` of \[f\](\$g\$); 0: none |" in build.parameter_table(source, {})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("raise KeyError('the reason')", r"01_a.md failed in cell 2 \(profile default\): KeyError: 'the reason'"),
        ("import matplotlib.pyplot as plt\nplt.plot([1, 2]);", "figure without mystnb.figure.name"),
        ("import sys\nprint(sys.prefix)", "a folder of this machine"),
    ],
)
def test_a_failed_chapter_leaves_no_page(project, code, message):
    source = chapter(project, "01_a", "1 + 1")
    page = build.run(source, "default", project / "out")
    chapter(project, "01_a", code)
    with pytest.raises(EcoDiffError, match=message):
        build.run(source, "default", project / "out")
    assert list(page.parent.iterdir()) == []


@pytest.mark.slow
def test_a_described_figure_is_accepted(project):
    header = "---\nmystnb:\n  figure: {name: fig-a, caption: A line.}\n  image: {alt: A rising line.}\n---\n"
    source = chapter(project, "01_a", "import matplotlib.pyplot as plt\nplt.plot([1, 2]);", cell_header=header)
    assert build.run(source, "default", project / "out").exists()


def test_unknown_profile_and_missing_data_say_what_to_do(project):
    source = chapter(project, "01_a", "1", data=["models/none"])
    with pytest.raises(EcoDiffError, match="the profiles are default, smoke"):
        build.run(source, "large", project / "out")
    with pytest.raises(EcoDiffError, match="01_a.md reads data/models/none, which is not there"):
        build.declared(source, "default")


def test_declared_folders_mean_every_file_and_names_may_hold_the_profile(project):
    for name in ("rows/a.json", "rows/deep/b.json", "smoke.bin"):
        (project / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (project / "data" / name).write_text(name)
    source = chapter(project, "01_a", "1", data=["rows", "{profile}.bin"])
    names = [path.relative_to(project / "data").as_posix() for path in build.declared(source, "smoke")]
    assert names == ["rows/a.json", "rows/deep/b.json", "smoke.bin"]


def test_two_cells_of_parameters_are_refused(project):
    source = chapter(project, "01_a", "x: int = 1  # x", cell_header=":tags: [parameters]\n\n")
    with pytest.raises(EcoDiffError, match="exactly one"):
        build.parameters(source)


@pytest.fixture
def stale(project, monkeypatch):
    """Runs the notebook tasks of the real dodo.py on the tiny project; returns the chapters that ran and the exit code.

    Chapters are not executed: what they make holds their last line of code, and a chapter that says so fails.
    """
    shutil.copy(root() / "dodo.py", project)
    (project / "environment.yml").write_text("pins\n")
    (project / "book").mkdir()
    (project / "_config.yml").write_text("")
    (project / "ecodiff").mkdir()  # the real package is imported; this one is only something that chapters depend on
    (project / "ecodiff" / "gates.py").write_text("# one\n")
    ran = []

    def pretend(source, profile, out):
        ran.append(source.stem)
        page = out / "notebooks" / f"{source.stem}.ipynb"
        page.parent.mkdir(parents=True, exist_ok=True)
        page.unlink(missing_ok=True)
        if "fails" in source.read_text():
            raise EcoDiffError(f"{source.name} failed, as it should")
        page.write_text(source.read_text() + profile)
        for made in build.declared(source, profile, "makes"):
            made.parent.mkdir(parents=True, exist_ok=True)
            made.write_text(build.read(source).cells[-1].source)

    monkeypatch.setattr(build, "run", pretend)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def make(profile="default"):
        ran.clear()
        monkeypatch.chdir(project)
        monkeypatch.delitem(sys.modules, "dodo", raising=False)
        options = ["-f", "dodo.py", "-o", str(project / "told"), f"profile={profile}", f"out={project / 'out'}"]
        code = DoitMain().run(["run", *options, "notebook"])
        return list(ran), code

    return make


def test_a_chapter_runs_again_when_content_changes_and_only_then(project, stale):
    (project / "data" / "rows").mkdir()
    (project / "data" / "rows" / "a.json").write_text("1")
    first = chapter(project, "01_a", "1", data=["rows"])
    chapter(project, "02_b", "2")
    both = ["01_a", "02_b"]
    assert stale()[0] == both
    assert stale()[0] == []
    os.utime(first)
    (project / "data" / "rows" / "a.json").write_text("1")
    assert stale()[0] == [], "touched, same content"
    first.write_text(first.read_text() + "\nMore prose.\n")
    assert stale()[0] == ["01_a"]
    (project / "data" / "rows" / "b.json").write_text("2")
    assert stale()[0] == ["01_a"], "a file more in a declared folder"
    (project / "data" / "rows" / "a.json").unlink()
    assert stale()[0] == ["01_a"], "a file less"
    (project / "ecodiff" / "gates.py").write_text("# two\n")
    assert stale()[0] == both
    (project / "environment.yml").write_text("other pins\n")
    assert stale()[0] == both
    assert stale("smoke")[0] == both
    (project / "out" / "notebooks" / "02_b.ipynb").unlink()
    assert stale("smoke")[0] == ["02_b"]


def test_a_chapter_does_not_run_again_for_a_part_of_the_lab_that_it_does_not_name(project, stale):
    lab = project / "ecodiff" / "lab"
    for name in ("claims/page.py", "book/plotting.py", "book/build.py"):
        (lab / name).parent.mkdir(parents=True, exist_ok=True)
        (lab / name).write_text("# one\n")
    chapter(project, "01_a", "1", lab=["book/plotting.py"])
    chapter(project, "02_b", "2", lab=["book/plotting.py", "claims"])
    both = ["01_a", "02_b"]
    assert stale()[0] == both
    (lab / "claims" / "page.py").write_text("# a typo is mended\n")
    assert stale()[0] == ["02_b"]
    (lab / "book" / "build.py").write_text("# two\n")
    assert stale()[0] == []
    (lab / "book" / "plotting.py").write_text("# two\n")
    assert stale()[0] == both
    source = chapter(project, "02_b", "2", lab=["nothing"])
    with pytest.raises(EcoDiffError, match="02_b.md names nothing of ecodiff/lab, which is not there"):
        build.code(source, project)


def test_after_a_failure_the_others_still_run_and_it_is_tried_again(project, stale):
    chapter(project, "01_a", "fails")
    chapter(project, "02_b", "2")
    ran, code = stale()
    assert ran == ["01_a", "02_b"] and code != 0
    told = (project / "told").read_text()
    assert "01_a.md failed, as it should" in told and "Traceback" not in told
    assert stale()[0] == ["01_a"]
    chapter(project, "01_a", "1")
    assert stale() == (["01_a"], 0)
    assert stale() == ([], 0)


def test_a_build_that_is_killed_does_not_run_again_what_it_had_done(project, stale, monkeypatch):
    chapter(project, "01_a", "1")
    chapter(project, "02_b", "2")
    monkeypatch.setattr("doit.dependency.Dependency.close", lambda self: None)  # the end is not reached
    assert stale()[0] == ["01_a", "02_b"]
    chapter(project, "02_b", "3")
    assert stale()[0] == ["02_b"]


def test_what_one_chapter_makes_another_may_read(project, stale):
    made = project / "data" / "artifacts" / "default" / "gates.txt"
    name = "artifacts/{profile}/gates.txt"
    chapter(project, "01_a", "one", makes=[name])
    chapter(project, "02_b", "2", data=[name])
    assert stale()[0] == ["01_a", "02_b"] and made.read_text() == "one"
    assert stale()[0] == []
    chapter(project, "01_a", "two", makes=[name])
    assert stale()[0] == ["01_a", "02_b"], "the artifact has other content"
    made.unlink()
    assert stale()[0] == ["01_a"], "made again with the same content"


@pytest.mark.slow
def test_html_warnings_fail_and_leave_the_old_html(project):
    """Jupyter Book on one page: a clean build, then one with a broken reference."""
    page = chapter(project, "01_a", "1")
    (project / "_config.yml").write_text('title: T\nonly_build_toc_files: true\nexecute: {execute_notebooks: "off"}\n')
    folder = project / "book"
    folder.mkdir()
    (folder / "_toc.yml").write_text("format: jb-book\nroot: index\nchapters:\n- file: notebooks/01_a\n")
    (folder / "index.md").write_text("# Book\n\n```{include} _status.md\n```\n")
    build.run(page, "default", project / "out")
    html = build.build_html(project / "out", project)
    assert "01_a" in html.read_text()
    (folder / "index.md").write_text("# Book\n\n{ref}`nowhere`\n")
    with pytest.raises(EcoDiffError, match="(?s)The HTML was not built.*nowhere"):
        build.build_html(project / "out", project)
    assert "nowhere" not in html.read_text()
    assert (project / "out" / "html" / "notebooks" / "01_a.html").exists()


def test_an_interval_in_a_table_stays_on_one_line(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda markdown: shown.append(markdown.data))
    plotting.table([{"a|b": "0.9 (0.8 to 1.0)", "words": "right (go to the next page)"}], "A caption", "tab-name")
    assert r"| a\|b | words |" in shown[0] and ":name: tab-name" in shown[0]
    assert "| 0.9 (0.8\u00a0to\u00a01.0) | right (go to the next page) |" in shown[0]


def test_a_name_of_two_parts_may_break_after_its_plus_and_a_number_may_not(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda markdown: shown.append(markdown.data))
    plotting.table([{"row": "learned+compensation, 20%", "difference": "+0.001"}], "A caption", "tab-name")
    assert "| learned+\u200bcompensation, 20% | +0.001 |" in shown[0]


def test_a_note_is_shown_and_an_empty_one_is_not(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda markdown: shown.append(markdown.data))
    plotting.note("2 of 3 cells are recorded.")
    plotting.note("")
    assert shown == ["2 of 3 cells are recorded."]
