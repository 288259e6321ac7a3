"""What texts name is there: modules, functions and files in prose, docstrings and notebooks."""

import ast
import importlib
import re

import pytest

from ecodiff.lab.book import build
from ecodiff.storage.paths import root

TEXTS = sorted(
    path
    for pattern in ("README.md", "Makefile", "dodo.py", ".ci/*", "book/**/*.md", "notebooks/*.md", "ecodiff/**/*.py",
                    "ecodiff/**/*.md", "data/**/README.md", "tests/**/*.py", "tests/**/*.yaml")
    for path in root().glob(pattern)
    if path.is_file()
)  # fmt: skip
NO_NAMES = {"ecodiff.gates", "ecodiff.images", "ecodiff.Pruned"}
"""The formats of gates and of folders of images, and the beginning of every pruned class."""


def is_there(dotted: str) -> bool:
    """Whether a dotted name is a module of the package, or a name in one."""
    parts = dotted.split(".")
    for end in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for name in parts[end:]:
            if not hasattr(value, name):
                return False
            value = getattr(value, name)
        return True
    return False


def is_module(dotted: str) -> bool:
    try:
        importlib.import_module(dotted)
    except ModuleNotFoundError:
        return False
    return True


def test_names_and_files_in_texts_are_there():
    faults = []
    for path in TEXTS:
        text = path.read_text(encoding="utf-8")
        names = set(re.findall(r"\becodiff(?:\.[A-Za-z_]\w*)+", text)) - NO_NAMES
        for module, imported in re.findall(r"\bfrom (ecodiff[\w.]*) import (\w+(?:, \w+)*)", text):
            names |= {f"{module}.{name}" for name in imported.split(" as ")[0].split(", ")}
        files = set(re.findall(r"(?<![\w/])(?:ecodiff|tests|notebooks|book)/[\w/.-]+\.(?:py|md|yaml|js|json)\b", text))
        faults += [f"{path}: {name}" for name in sorted(names) if not is_there(name)]
        faults += [
            f"{path}: {file}"
            for file in sorted(files)
            if not re.search("NN|PROFILE", file)
            and not any((folder / file).exists() for folder in (root(), root() / "ecodiff" / "lab"))
        ]
    assert faults == []


@pytest.mark.parametrize("source", build.sources(), ids=lambda path: path.stem)
def test_a_chapter_uses_only_what_modules_have(source):
    """Every module that a cell imports has the names that cells take from it."""
    cells = [cell.source for cell in build.read(source).cells if cell.cell_type == "code"]
    code = "\n".join(cells)
    code = re.sub(r"^(\s*)[%!].*", r"\1pass", code, flags=re.M)  # what only IPython understands
    tree = ast.parse(code)
    modules, missing = {}, []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                if name.name.split(".")[0] == "ecodiff":
                    modules[name.asname or "ecodiff"] = name.name if name.asname else "ecodiff"
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ecodiff":
            for name in node.names:
                full = f"{node.module}.{name.name}"
                if not is_there(full):
                    missing.append(full)
                modules[name.asname or name.name] = full
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            full = modules[node.value.id]
            if is_module(full) and not is_there(f"{full}.{node.attr}"):
                missing.append(f"{full}.{node.attr}")
    assert missing == []


def test_the_map_of_the_package_names_every_file():
    package = root() / "ecodiff"
    text = (package / "README.md").read_text(encoding="utf-8")
    names = [path.name for path in package.rglob("*.py") if "lab" not in path.parts or path.parent.name == "lab"]
    absent = [name for name in names if name != "__init__.py" and f"`{name}`" not in text]
    assert absent == []
