"""The numbers of README's table of methods are those of the recorded rows."""

from pathlib import Path
from statistics import fmean

import ecodiff
from ecodiff import studies

README = Path(__file__).parents[1] / "README.md"
MODELS = ("openmoji-sdxl", "openmoji-flux-dev", "openmoji-flux-schnell")


def lines() -> list[str]:
    """The table as it should be, a line a method: SSIM and the share of pictures whose facts are all right."""
    names = ["original", *(f"{name}, 20%" for name in (*studies.METHODS, *studies.ADAPTED))]
    rows = {model: studies.recorded(ecodiff.load(model), "main", model, only=names) for model in MODELS}
    return [
        " | ".join([f"| {name.removesuffix(', 20%')}", *(_shown(rows[model][name]) for model in MODELS)]) + " |"
        for name in names
    ]


def _shown(seeds: list[dict]) -> str:
    ssim, facts = (fmean(x for cell in seeds for x in cell[key]) for key in ("ssim", "facts"))
    return f"{ssim:.3f}, {100 * facts:.1f} %"


def test_the_table_of_methods_is_that_of_the_recorded_rows():
    text = README.read_text()
    assert [line for line in lines() if line not in text] == []
