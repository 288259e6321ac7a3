"""The chapter that writes the method on the page: its length, and that it does what the package does."""

import re

import matplotlib
import pytest

from ecodiff.lab.book import build
from ecodiff.storage.paths import root

SOURCE = next(source for source in build.sources() if source.stem.endswith("_in_80_lines"))
CELLS = [cell for cell in build.read(SOURCE).cells if cell.cell_type == "code"]


def lines_of(tag: str) -> list[str]:
    """Lines of code in the cells with a tag, without blank ones and comments."""
    lines = []
    for cell in CELLS:
        if tag in cell.metadata.get("tags", []):
            lines += [line for line in cell.source.splitlines() if line.strip() and not line.strip().startswith("#")]
    return lines


@pytest.fixture(scope="module")
def names():
    """What the chapter's code defines when it is run as it stands."""
    matplotlib.use("Agg")
    defined = {"__name__": SOURCE.stem}
    for cell in CELLS:
        if not re.search(r"^ *[!%]", cell.source, re.M):  # Colab's installation
            exec(cell.source, defined)
    return defined


def test_the_method_has_about_eighty_lines():
    assert 70 <= len(lines_of("counted")) <= 85
    assert len(lines_of("network")) <= 32


def test_the_method_uses_nothing_but_torch():
    method = "\n".join(lines_of("counted") + lines_of("network"))
    assert not re.search(r"\b(import|ecodiff|find_sites|HardConcrete|apply_gates)\b", method)


@pytest.mark.slow
def test_toy_and_package_agree_to_rounding(names):
    differences = names["differences"]
    exact = {"sites: units", "mask", "weights after the cut"}
    assert exact < differences.keys() and len(differences) == 9
    assert {what: difference for what, difference in differences.items() if difference > 1e-5} == {}
    assert {what: differences[what] for what in exact} == dict.fromkeys(exact, 0.0)


@pytest.mark.slow
def test_what_is_compared_is_not_nothing(names):
    """A gradient of zeros, a mask of ones or an empty cut would agree as well."""
    import torch

    assert (names["ours"] != 0).float().mean() > 0.5, "gates at 0 or 1 have no gradient, most have one"
    whole, small = names["parameters"]["whole"], names["parameters"]["small"]
    assert 0.4 < small / whole < 0.6
    removed = torch.cat([~keep for keep in names["mask"].values()])
    assert removed.float().mean() == 0.5


@pytest.mark.slow
def test_the_learned_mask_finds_the_weak_units(names):
    for kind, is_weak in names["found"].items():
        assert is_weak.float().mean() > 0.9, kind


def test_every_piece_names_the_paper_and_the_package():
    text = SOURCE.read_text(encoding="utf-8")
    method = text.split("\n## Does it find")[0]
    sections = re.split(r"^## ", method, flags=re.M)[1:]
    assert len(sections) == 7
    for section in sections:
        assert "**Paper:**" in section and "**Package:**" in section, section.splitlines()[0]
    documented = (root() / "book" / "api.md").read_text(encoding="utf-8")
    for name in re.findall(r"\{py:func\}`([\w.]+)`", method):
        assert f":: {name}\n" in documented, f"{name} has no entry to link to"
