"""The numbers of README's tables of methods are those of the recorded rows."""

from statistics import fmean

import pytest

from ecodiff.lab import studies
from ecodiff.storage.paths import root

README = root() / "README.md"
MODELS = ("openmoji-sdxl", "openmoji-flux-schnell")


def lines() -> list[str]:
    """The table at equal units, one line per method: SSIM and the share of images whose facts are all right."""
    names = ["original", *(f"{name}, 20%" for name in (*studies.METHODS, *studies.ADAPTED))]
    rows = {model: studies.recorded("main", model, only=names) for model in MODELS}
    return [
        " | ".join([f"| {name.removesuffix(', 20%')}", *(_shown(rows[model][name]) for model in MODELS)]) + " |"
        for name in names
    ]


def at_equal_parameters() -> list[str]:
    """The table at equal parameters on a transformer, both measures; its head says how many seeds there are."""
    names = [f"{name}, 20%" for name in studies.QUOTED]
    rows = studies.recorded("parameters", studies.DEV, only=names)
    seeds = min(len(rows[name]) for name in names)
    head = f"| method | SSIM and right images, {('one seed', 'two seeds', 'three seeds')[seeds - 1]} |"
    return [head, *(f"| {name.removesuffix(', 20%')} | {_shown(rows[name][:seeds])} |" for name in names)]


def _shown(seeds: list[dict]) -> str:
    ssim, facts = (fmean(x for cell in seeds for x in cell[key]) for key in ("ssim", "facts"))
    return f"{ssim:.3f}, {100 * facts:.1f} %"


@pytest.mark.parametrize("table", [lines, at_equal_parameters])
def test_a_table_of_methods_is_that_of_the_recorded_rows(table):
    text = README.read_text()
    assert [line for line in table() if line not in text] == []
