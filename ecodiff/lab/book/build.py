"""Build the book: run notebooks with papermill, put the pages together, call Jupyter Book.

A chapter is ``notebooks/NN_name.md`` (MyST). `run` executes it with the parameters of a profile and writes one page,
``OUT/notebooks/NN_name.ipynb``, whole or not at all. `build_html` copies ``book/`` and the pages into ``OUT/src`` and
writes ``OUT/html``, with every warning an error. What has to run again is decided in ``dodo.py``, by content.

``python -m ecodiff book pair`` rewrites the output-free ``notebooks/*.ipynb`` beside the MyST sources.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from unittest.mock import patch

import jupytext
import nbformat
import papermill
import yaml

from ecodiff.errors import EcoDiffError
from ecodiff.storage.files import write_whole
from ecodiff.storage.paths import data_dir, root

from . import glossary, notation

CODE = {".py", ".js", ".json", ".yaml", ".csv"}
VERSIONS = ("torch", "diffusers", "transformers", "torchmetrics", "numpy", "matplotlib", "jupyter-book")
# What libraries say while they load is not part of a page: a page's stderr fails the build.
QUIET = {
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
    "KINETO_LOG_LEVEL": "99",
    "PYTHONWARNINGS": "ignore:IProgress not found",
}
# What means something to MyST, in a comment that is to be shown as it was written.
MARKUP = re.compile(r"([\\`*_{}\[\]<>$|#~])")


def sources(base: Path | None = None) -> list[Path]:
    """The chapters, in the order of their numbers: ``notebooks/NN_name.md``."""
    return sorted(((base or root()) / "notebooks").glob("[0-9][0-9]_*.md"))


def read(source: Path) -> nbformat.NotebookNode:
    """A MyST source as a notebook without outputs and with cell ids that are the same each time."""
    notebook = jupytext.read(source)
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    return _name_cells(notebook, source.stem)


def _name_cells(notebook: nbformat.NotebookNode, stem: str) -> nbformat.NotebookNode:
    for i, cell in enumerate(notebook.cells):
        cell.id = f"{stem[:2]}-{i:03d}"
    return notebook


def paired_text(source: Path) -> str:
    """The text of the committed ``.ipynb`` that belongs to a MyST source."""
    return nbformat.writes(read(source), indent=1) + "\n"


def pair(base: Path | None = None) -> list[Path]:
    """Rewrite the paired ``.ipynb`` files that differ from their source; returns them."""
    changed = []
    for source in sources(base):
        target, text = source.with_suffix(".ipynb"), paired_text(source)
        if not target.exists() or target.read_text() != text:
            write_whole(target, text.encode())
            changed.append(target)
    return changed


def parameters(source: Path) -> dict[str, object]:
    """Names and default values of a chapter's ``parameters`` cell."""
    return {name: ast.literal_eval(parameter["default"]) for name, parameter in inspected(source).items()}


def inspected(source: Path) -> dict[str, dict[str, str]]:
    """What papermill reads in a chapter's ``parameters`` cell: {name: {"default": ..., "help": ..., ...}}, as texts.

    Raises EcoDiffError unless there is exactly one such cell and each of its lines has name, type, value and comment.
    """
    notebook = read(source)
    cells = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    if len(cells) != 1:
        raise EcoDiffError(f"{source.name} has {len(cells)} cells tagged 'parameters': it needs exactly one.")
    # papermill refuses a notebook that names no kernel.
    notebook.metadata["kernelspec"] = {"name": "python3", "language": "python", "display_name": "Python 3"}
    with tempfile.TemporaryDirectory() as scratch:
        plain = Path(scratch, "plain.ipynb")
        nbformat.write(notebook, plain)
        found = papermill.inspect_notebook(plain)
    for line in cells[0].source.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        name = re.split(r"\W", line, maxsplit=1)[0]
        if name not in found or not _is_whole(line, found[name]):
            raise EcoDiffError(
                f"{source.name}: parameter line {line!r} must read 'name: type = value  # help', with one '=' in it."
            )
    return found


def _is_whole(line: str, parameter: dict[str, str]) -> bool:
    """Whether a line has a type, a plain value and, after two spaces and a hash, a comment: papermill accepts less."""
    try:
        ast.literal_eval(parameter["default"])
    except (ValueError, SyntaxError):
        return False
    if parameter["inferred_type_name"] == "None" or not parameter["help"]:
        return False
    return line.endswith(f"{parameter['default']}  # {parameter['help']}")


def parameter_table(source: Path, injected: dict[str, object]) -> str:
    """The parameters of a chapter as a table (MyST): name, default, what its comment says.

    A page that was made with other values (``injected``) has them in a column of their own.
    """
    heads = ["Parameter", "Default", "Meaning"]
    if injected:
        heads.insert(2, "On this page")
    lines = [heads, ["---"] * len(heads)]
    for name, parameter in inspected(source).items():
        line = [f"`{name}`", _value(parameter["default"]), MARKUP.sub(r"\\\1", parameter["help"])]
        if injected:
            line.insert(2, _value(repr(injected[name])) if name in injected else "")
        lines.append(line)
    body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    table = f":::{{table}}\n:class: parameters\n\n{body}\n:::"
    return f"::::{{dropdown}} Parameters of this page\n{table}\n::::"


def _value(text: str) -> str:
    """A value as code, in a cell of a table, which a bar would end."""
    return f"`{text}`".replace("|", "\\|")


def profile_file(profile: str, base: Path | None = None) -> Path:
    """``notebooks/profiles/PROFILE.yaml``: papermill parameters, one flat list for all chapters."""
    folder = (base or root()) / "notebooks" / "profiles"
    path = folder / f"{profile}.yaml"
    if not path.exists():
        known = ", ".join(sorted(p.stem for p in folder.glob("*.yaml")))
        raise EcoDiffError(f"There is no profile {profile!r}: the profiles are {known}.")
    return path


def values_for(source: Path, profile: str) -> dict[str, object]:
    """What a profile says to a chapter.

    A profile with ``chapters``, names without their numbers, speaks to these only; all others keep their own values.
    """
    values = yaml.safe_load(profile_file(profile, source.parent.parent).read_text()) or {}
    if source.stem[3:] in values.get("chapters", [source.stem[3:]]):
        return values
    return {"profile": profile}


def declared(source: Path, profile: str, kind: str = "data") -> list[Path]:
    """Files a chapter reads (``ecodiff: {data: [...]}`` in its front matter) or makes (``makes: [...]``).

    Names are relative to the data folder, may be folders (every file in them counts) and may hold ``{profile}``.
    """
    files: list[Path] = []
    for name in read(source).metadata.get("ecodiff", {}).get(kind, []):
        path = data_dir() / name.format(profile=profile)
        if kind == "data" and not path.exists() and path not in _made(source, profile):
            raise EcoDiffError(f"{source.name} reads data/{name}, which is not there: make it, or get it with git.")
        if path.is_dir():
            files += sorted(file for file in path.rglob("*") if file.is_file())
        else:
            files.append(path)
    return files


def code(source: Path | None = None, base: Path | None = None) -> list[Path]:
    """Files of the package that a chapter depends on; without a chapter, all files.

    These are the library and what the front matter names of the lab: ``ecodiff: {lab: [book/plotting.py, studies]}``,
    files or folders of ``ecodiff/lab``.
    """
    package = (base or root()) / "ecodiff"
    lab = package / "lab"
    files = sorted(path for path in package.rglob("*") if path.suffix in CODE)
    if source is None:
        return files
    depends = [path for path in files if lab not in path.parents]
    for name in read(source).metadata.get("ecodiff", {}).get("lab", []):
        if not (lab / name).exists():
            raise EcoDiffError(f"{source.name} names {name} of ecodiff/lab, which is not there.")
        depends += [path for path in files if path.is_relative_to(lab / name)]
    return sorted(set(depends))


def _made(source: Path, profile: str) -> set[Path]:
    """What the chapters before this one make: it may be absent until they have run."""
    made: set[Path] = set()
    for chapter in source.parent.glob("[0-9][0-9]_*.md"):
        if chapter.name < source.name:
            made.update(declared(chapter, profile, "makes"))
    return made


def run(source: Path, profile: str, out: Path) -> Path:
    """Execute one chapter and write its page, ``out/notebooks/NN_name.ipynb``.

    Only parameters whose value in the profile differs from the chapter's own are injected. A table of all of them, from
    their comments, stands above their folded cell. A chapter that fails, or shows a figure without number, caption and
    alternative text, raises EcoDiffError and leaves no page at all.
    """
    page = out / "notebooks" / f"{source.stem}.ipynb"
    page.parent.mkdir(parents=True, exist_ok=True)
    page.unlink(missing_ok=True)
    own = parameters(source)
    wanted = values_for(source, profile)
    injected = {name: value for name, value in wanted.items() if name in own and own[name] != value}

    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        with patch.dict(os.environ, QUIET | wanted.get("environment", {})):  # the kernel inherits it
            try:
                notebook = _executed(source, injected, Path(scratch))
            except papermill.PapermillExecutionError as error:
                raise EcoDiffError(_failure(source, profile, error)) from None
    seconds = round(time.perf_counter() - start, 1)

    _show_parameters(notebook, parameter_table(source, injected))
    _name_cells(notebook, source.stem)
    _require_figure_text(notebook, source)
    # papermill noted paths of the scratch folder.
    notebook.metadata["papermill"].update(input_path=source.name, output_path=page.name)
    notebook.metadata["ecodiff"] = dict(
        notebook.metadata.get("ecodiff", {}),
        profile=profile,
        parameters={**own, **injected},
        seconds=seconds,
        commit=_commit(),
        versions=_versions(),
    )
    text = nbformat.writes(notebook)
    for private in (str(root()), sys.prefix, scratch):
        if json.dumps(private)[1:-1] in text:  # as JSON writes it, without the quotes
            raise EcoDiffError(f"{source.name} shows a folder of this machine ({private}): print names instead.")
    write_whole(page, text.encode())
    return page


def _executed(source: Path, injected: dict[str, object], scratch: Path) -> nbformat.NotebookNode:
    """The chapter with its outputs; raises papermill's error for a cell that fails."""
    nbformat.write(read(source), scratch / "plain.ipynb")
    workplace = scratch / "cwd"  # a chapter must not depend on, or write into, the folder it is run from
    workplace.mkdir()
    papermill.execute_notebook(
        scratch / "plain.ipynb",
        scratch / "executed.ipynb",
        parameters=injected,
        kernel_name="python3",
        cwd=workplace,
        progress_bar=False,
        # ipykernel warns about TCP at every start, and calls the signal that ends it an error.
        extra_arguments=["--log-level=50"],
    )
    return nbformat.read(scratch / "executed.ipynb", as_version=4)


def _show_parameters(notebook: nbformat.NotebookNode, table: str) -> None:
    """Put the table of parameters where their cell is, and fold the cell below it.

    A profile's values are in the table, so the cell that sets them is not shown.
    """
    for i, cell in reversed(list(enumerate(notebook.cells))):  # from the end: a cell that is put in moves those below
        tags = cell.metadata.get("tags", [])
        if "injected-parameters" in tags:
            tags.append("remove-input")
        if "parameters" in tags:
            if "hide-input" not in tags:
                tags.append("hide-input")
            cell.metadata["mystnb"] = {"code_prompt_show": "Show the parameters as code", "code_prompt_hide": "Hide"}
            shown = nbformat.v4.new_markdown_cell(table, metadata={"tags": ["table-of-parameters"]})
            notebook.cells.insert(i, shown)


def _failure(source: Path, profile: str, error: papermill.PapermillExecutionError) -> str:
    """What failed, the first lines of its cell, and the innermost line of the traceback that lies in the notebook."""
    parts = [f"{source.name} failed in cell {error.exec_count} (profile {profile}): {error.ename}: {error.evalue}"]
    lines = error.source.strip().splitlines()
    parts += [f"    {line}" for line in lines[:12]]
    if len(lines) > 12:
        parts.append("    ...")
    places = [line.strip() for line in error.traceback if "Cell In[" in line]
    if places:
        parts.append(_strip_colours(places[-1])[:600])
    return "\n".join(parts)


def _strip_colours(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def _require_figure_text(notebook: nbformat.NotebookNode, source: Path) -> None:
    """Raise EcoDiffError for a cell that shows an image and does not say what a reader, or who cannot see it, needs."""
    for cell in notebook.cells:
        if not _shows_image(cell) or "remove-output" in cell.metadata.get("tags", []):
            continue
        myst = cell.metadata.get("mystnb", {})
        lacking = []
        for group, name in (("figure", "name"), ("figure", "caption"), ("image", "alt")):
            if not myst.get(group, {}).get(name):
                lacking.append(f"mystnb.{group}.{name}")
        if lacking:
            raise EcoDiffError(f"{source.name}, cell {cell.id}: a figure without {', '.join(lacking)} in its metadata.")


def _shows_image(cell: nbformat.NotebookNode) -> bool:
    for output in cell.get("outputs", []):
        if {"image/png", "image/svg+xml", "image/jpeg"} & output.get("data", {}).keys():
            return True
    return False


def _commit() -> str:
    """The commit of this repository, marked "-dirty" where a file differs from it."""
    command = ["git", "-C", str(root()), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # an archive without its history
        return "unknown"


def _versions() -> dict[str, str]:
    versions = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in VERSIONS:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def status(pages: list[Path]) -> str:
    """The status page's tables (MyST): profile, seconds and commit of each chapter; versions."""
    chapters = ["| Chapter | Profile | Seconds | Commit |", "|---|---|---:|---|"]
    versions: dict[str, str] = {}
    for page in pages:
        facts = nbformat.read(page, as_version=4).metadata["ecodiff"]
        versions.update(facts["versions"])
        chapters.append(
            f"| [](notebooks/{page.name}) | {facts['profile']} | {facts['seconds']:.1f} | {facts['commit']} |"
        )
    programs = ["| Program | Version |", "|---|---|"]
    programs += [f"| {name} | {number} |" for name, number in versions.items()]
    return "\n".join(["## Chapters", "", *chapters, "", "## Versions", "", *programs, ""])


def build_html(out: Path, base: Path | None = None) -> Path:
    """Put sources and pages together in ``out/src`` and build ``out/html`` from them, warnings being errors.

    A failed build leaves the HTML of the one before it untouched. Always builds every page: Sphinx would not notice
    that a number glued from another page has changed.
    """
    base, out = (base or root()).resolve(), out.resolve()
    pages = [out / "notebooks" / f"{source.stem}.ipynb" for source in sources(base)]
    source, work, html = out / "src", out / "work", out / "html"
    for folder in (source, work):
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(base / "book", source)
    (source / "notebooks").mkdir()
    words = source / "glossary.md"
    terms = glossary.definitions(words) if words.exists() else {}
    for page in pages:
        notebook = nbformat.read(page, as_version=4)
        glossary.link_first_uses(notebook, list(terms))
        nbformat.write(notebook, source / "notebooks" / page.name)
    if terms:
        (source / "_static" / "glossary.js").write_text(glossary.script(terms), encoding="utf-8")
    (source / "_status.md").write_text(status(pages))
    if (source / "support.md").exists():
        from ecodiff.lab.support import page  # here, since a chapter is run without it

        (source / "_support.md").write_text(page.page())
    symbols = source / "notation.yaml"
    if symbols.exists():
        (source / "_notation.md").write_text(notation.page(symbols, {page.stem[3:]: page.name for page in pages}))
    if "{include} _landing.md" in (source / "index.md").read_text():
        from .landing import landing  # here, since a chapter is run without what the landing page reads

        (source / "_landing.md").write_text(landing(out / "notebooks"))
    if (source / "full-scale.md").exists():
        from ecodiff.lab.claims.full_scale import own_model_costs, page

        (source / "_full-scale.md").write_text(page())
        (source / "_own-model.md").write_text(own_model_costs())

    jupyter_book = Path(sys.executable).with_name("jupyter-book")  # it has no `python -m`
    command = [jupyter_book, "build", source, "--config", base / "_config.yml", "--path-output", work]
    command += ["--all", "-W", "-n", "--keep-going", "-q"]  # all pages; warnings are errors, collected to the end
    environment = os.environ | {"PYTHONWARNINGS": "ignore", "NO_COLOR": "1"}
    # From the folder of the sources: Sphinx looks for `html_search_scorer` where it is run.
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    result = subprocess.run(command, env=environment, text=True, cwd=source, **pipes)
    if result.returncode or not (work / "_build" / "html" / "index.html").exists():
        raise EcoDiffError(f"The HTML was not built. Jupyter Book says:\n{_strip_colours(result.stdout).strip()}")
    shutil.rmtree(html, ignore_errors=True)
    (work / "_build" / "html").rename(html)
    return html / "index.html"
