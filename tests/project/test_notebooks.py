"""The chapters as sources: paired, typed, described, and runnable from anywhere."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml

from ecodiff.errors import EcoDiffError
from ecodiff.lab.book import build
from ecodiff.storage.paths import root

SOURCES = build.sources()
chapters = pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)


def test_there_are_chapters():
    assert SOURCES


@chapters
def test_pair_is_equal(source):
    paired = source.with_suffix(".ipynb")
    assert paired.exists() and paired.read_text() == build.paired_text(source), "run `make pair` and commit both"
    assert all(not cell.get("outputs") for cell in nbformat.read(paired, as_version=4).cells)


@chapters
def test_parameters_are_typed_and_explained(source):
    assert build.parameters(source)


@chapters
def test_front_matter(source):
    metadata = build.read(source).metadata
    assert metadata["kernelspec"]["name"] == "python3"
    assert isinstance(metadata["ecodiff"]["data"], list)


@pytest.mark.slow
@chapters
def test_a_chapter_names_the_parts_of_the_lab_that_it_uses(source):
    """Otherwise it is not run again when they change. It names no other, or it is run again without need."""
    cells = [cell.source for cell in build.read(source).cells if cell.cell_type == "code"]
    code = re.sub(r"^(\s*)[%!].*", r"\1pass", "\n".join(cells), flags=re.M)  # what only IPython understands
    used = files_of_lab(code)
    named = [LAB / name for name in build.read(source).metadata["ecodiff"]["lab"]]
    assert [file for file in sorted(used) if not any(file.is_relative_to(part) for part in named)] == []
    assert [part for part in named if not any(file.is_relative_to(part) for file in used)] == []


LAB = root() / "ecodiff" / "lab"


def files_of_lab(code: str) -> set[Path]:
    """The modules of the lab that some code imports, and those that they import. A package counts as all its files
    where its names load when they are first used."""
    found, todo = set(), imported(code)
    while todo:
        file = todo.pop()
        if file in found or file.parent == LAB and file.name == "__init__.py":
            continue
        found.add(file)
        text = file.read_text(encoding="utf-8")
        todo |= imported(text, file)
        if file.name == "__init__.py" and "names_of(" in text:
            todo |= set(file.parent.glob("*.py"))
    return {file for file in found if file.name != "__init__.py" or file.read_text().count("import")}


def imported(code: str, file: Path | None = None) -> set[Path]:
    """Files of the lab that code imports; ``file``: where the code stands, for imports with dots."""
    modules = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            modules |= {name.name for name in node.names}
        if isinstance(node, ast.ImportFrom):
            above = file.relative_to(root()).parent.parts[: -node.level + 1 or None] if node.level else ()
            package = ".".join([*above, *([node.module] if node.module else [])])
            modules |= {package, *(f"{package}.{name.name}" for name in node.names)}
    paths = [root().joinpath(*module.split(".")) for module in modules if module.startswith("ecodiff.lab")]
    files = [path / "__init__.py" for path in paths] + [path.with_suffix(".py") for path in paths]
    return {file for file in files if file.is_file()}


def test_the_number_of_a_file_is_that_of_its_chapter():
    parts = yaml.safe_load((root() / "book" / "_toc.yml").read_text())["parts"]
    numbered = [chapter["file"] for part in parts if "numbered" in part for chapter in part["chapters"]]
    numbers = [int(re.match(r"notebooks/(\d\d)_", file)[1]) for file in numbered]
    assert numbers == list(range(1, len(numbers) + 1))


@chapters
def test_a_chapter_declares_the_papers_tables_if_it_reads_them(source):
    """Otherwise it is not run again when they change."""
    reads = re.search(r"\bpaper\.(claim|readable|table|row)\(", source.read_text(encoding="utf-8"))
    assert not reads or "paper" in build.read(source).metadata["ecodiff"]["data"]


@chapters
def test_figures_have_number_caption_and_alternative_text(source):
    names = []
    for cell in build.read(source).cells:
        if cell.cell_type == "code":
            myst = cell.metadata.get("mystnb", {})
            if "figure" in myst:
                names.append(myst["figure"]["name"])
                assert myst["figure"]["caption"].strip()
                moved = re.search(r"(explorer|slider)\(", cell.source)  # these say in themselves what they show
                assert myst.get("image", {}).get("alt", "").strip() or moved
        else:
            for block in re.findall(r"^(?:```|:::)\{(?:figure|image)\}.*?^(?:```|:::)", cell.source, re.M | re.S):
                assert re.search(r"^:alt: +\S", block, re.M), block
            assert not re.search(r"!\[\s*\]\(", cell.source), "an image without alternative text"
    assert len(names) == len(set(names))


@chapters
def test_imports_at_the_top_are_folded(source):
    for cell in build.read(source).cells:
        if cell.cell_type == "markdown" and re.search(r"^## ", cell.source, re.M):
            break
        if cell.cell_type == "code" and re.match(r"(import|from) ", cell.source):
            assert {"hide-input", "hide-cell", "remove-cell"} & set(cell.metadata.get("tags", [])), cell.source


@chapters
def test_no_chapter_prints_a_check_or_a_command_in_place_of_a_result(source):
    """What is not measured is said in words, or left out."""
    code = "\n".join(cell.source for cell in build.read(source).cells if cell.cell_type == "code")
    found = re.findall(r"DOES NOT HOLD|recorded (?:here )?yet|nothing yet|none yet|verdicts\(rows\):\n +print", code)
    assert not found


@chapters
def test_template(source):
    text = source.read_text()
    for piece in ("What you will learn", "What it costs to run", "## What was shown", "## Limits", "## Exercises"):
        assert piece in text, piece
    assert text.count("{exercise}") == text.count("{solution}") > 0


def test_labels_are_unique_across_chapters():
    labels = re.findall(r"^:(?:label|name): (\S+)|^    name: (\S+)", "\n".join(s.read_text() for s in SOURCES), re.M)
    labels = [a or b for a, b in labels]
    assert len(labels) == len(set(labels)), sorted({label for label in labels if labels.count(label) > 1})


PROFILES = sorted((root() / "notebooks" / "profiles").glob("*.yaml"))


@pytest.mark.slow
@pytest.mark.parametrize("profile", PROFILES, ids=lambda path: path.stem)
def test_profile_names_parameters_of_the_right_type(profile):
    values = yaml.safe_load(profile.read_text())
    assert values["profile"] == profile.stem
    for source in SOURCES:
        own = build.parameters(source)
        for name in values.keys() & own.keys():
            assert type(values[name]) is type(own[name]), f"{profile.name}: {name} in {source.name}"


def test_every_chapter_is_in_the_table_of_contents():
    toc = (root() / "book" / "_toc.yml").read_text()
    assert [s.stem for s in SOURCES if f"notebooks/{s.stem}\n" not in toc] == []


def test_repository_address_is_the_same_everywhere():
    address = yaml.safe_load((root() / "_config.yml").read_text())["repository"]["url"]
    for path in (root() / "pyproject.toml", root() / "CITATION.cff", *SOURCES):
        found = set(re.findall(r"https://github\.com/[\w-]+/[\w-]*companion", path.read_text()))
        assert found <= {address}, path.name


@pytest.mark.slow
def test_papermill_runs_a_chapter_from_another_folder(tmp_path):
    notebook = root() / "notebooks" / "03_hard_concrete.ipynb"
    command = [sys.executable, "-m", "papermill", str(notebook), "out.ipynb"]
    command += ["-p", "draws", "500", "-p", "delta", "0.1"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    done = nbformat.read(tmp_path / "out.ipynb", as_version=4)
    assert done.metadata.papermill.parameters == {"draws": 500, "delta": 0.1}
    assert any("delta=0.1" in str(cell.get("outputs")) for cell in done.cells)
    assert not [out for cell in done.cells for out in cell.get("outputs", []) if out.get("name") == "stderr"]
    assert [path.name for path in tmp_path.iterdir()] == ["out.ipynb"]


@pytest.mark.parametrize(
    "line",
    [
        "draws = 3  # untyped",
        "draws: int = 3",
        "draws: int = 3  #no space",
        "draws: int = 3  # 1 = one",
        "draws: int = three()  # no value",
    ],
)
def test_untyped_or_unexplained_parameter_is_refused(tmp_path, line):
    source = tmp_path / "01_x.md"
    source.write_text(f"```{{code-cell}} ipython3\n:tags: [parameters]\n\n{line}\n```\n")
    with pytest.raises(EcoDiffError, match="must read 'name: type = value"):
        build.parameters(source)
