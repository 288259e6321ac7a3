"""The numbers of the landing page: read from recorded rows, counts and the page of claims, never typed."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

import nbformat

from ecodiff.errors import EcoDiffError
from ecodiff.lab import paper, studies
from ecodiff.lab.claims.cost import published_mask
from ecodiff.lab.claims.on_full_size import counted

MODEL, RATIO = studies.SCHNELL, 20
"""The model of the figure (``before_after``), and the share of its units that goes, in per cent."""
RECORD = "application/papermill.record/"
"""What myst-nb's glue writes before the type of a number that a page publishes."""
UNADAPTED = tuple(method for method in studies.METHODS if "+" not in method)


def landing(pages: Path) -> str:
    """The result in two sentences, and three numbers as cards (MyST). ``pages``: the folder of executed chapters.

    Raises EcoDiffError where a row or the tally of claims is missing.
    """
    kept = shares()
    text = f"{result(kept)}\n\n::::{{grid}} 1 1 3 3\n:gutter: 3\n\n{_cards(kept, pages)}\n::::\n"
    return text.replace(" %", "\u00a0%")  # no line breaks there


def shares() -> dict[str, tuple[float, float]]:
    """{method: (mean SSIM to the original, share of right images in per cent)} of the landing page's model.

    "original" is the unpruned model; the others lost ``RATIO`` per cent of their units and no weight was adapted.
    """
    names = {"original": "original"}
    for method in UNADAPTED:
        names[method] = f"{method}, {RATIO}%"
    rows = studies.recorded("main", MODEL, only=list(names.values()))
    means = {}
    for method, name in names.items():
        if name not in rows:
            raise EcoDiffError(f"The landing page needs the row {name!r} of {MODEL}: run python -m ecodiff study main.")
        ssim = fmean(value for cell in rows[name] for value in cell["ssim"])
        right = 100 * fmean(hit for cell in rows[name] for hit in cell["facts"])
        means[method] = (ssim, right)
    return means


def result(kept: dict[str, tuple[float, float]]) -> str:
    """What the rows say of learned masks and of the best of the other scores, by both measures."""
    others = [method for method in UNADAPTED if method != "learned"]
    nearest = max(others, key=lambda method: kept[method][0])
    rightest = max(others, key=lambda method: kept[method][1])
    first = "learned" if kept["learned"][0] > kept[nearest][0] else nearest
    return (
        f"Without {RATIO} % of its heads and neurons, and without retraining, the images of a small FLUX-class model "
        f"stay nearest to its own with *{first}* masks (SSIM {kept['learned'][0]:.3f} with learned masks, "
        f"{kept[nearest][0]:.3f} with *{nearest}*, the best other score). With learned masks "
        f"{kept['learned'][1]:.1f} % of the images are right, and with *{rightest}*, the best other score by this "
        f"measure, {kept[rightest][1]:.1f} %."
    )


def _cards(kept: dict[str, tuple[float, float]], pages: Path) -> str:
    right = {method: f"{kept[method][1]:.1f} %" for method in ("original", "learned", "magnitude", "random")}
    preset, options = published_mask(RATIO)
    count = counted(preset, [preset], **options)
    assert count is not None, "the preset is one that may be counted"
    whole, left = (numbers["parameters"]["total"] / 1e9 for numbers in (count, count["pruned"]))
    printed = paper.row("table1", model="SDXL", method="EcoDiff", ratio=RATIO / 100)["params_billion"]
    tally = tally_of_claims(pages)
    texts = {
        right["learned"]: (
            f"of the images of a small FLUX-class model are right without the {RATIO} % of its heads and neurons that "
            f"a learned mask removes. Before: {right['original']}. Removed by magnitude: {right['magnitude']}; at "
            f"random: {right['random']}.",
            "*Measured* on `openmoji-flux-schnell`: [](notebooks/10_every_method.ipynb)",
        ),
        f"{left:.3f} B": (
            f"of SDXL's {whole:.3f} B parameters are left without {RATIO} % of its units, by the masks that the "
            f"authors published. The paper prints {printed} B.",
            "*Counted*, without weights: [](notebooks/13_what_it_costs.ipynb)",
        ),
        f"{tally['all']} claims": (
            f"of the paper are decided by code: {tally['hold']} verdicts in favour, {tally['fail']} against, "
            f"{tally['undecided']} undecided, {tally['checkpoint']} that need the real weights.",
            "[](notebooks/15_claims.ipynb)",
        ),
    }
    cards = []
    for number, (text, source) in texts.items():
        head = f":::{{grid-item-card}} {number}\n:class-title: sd-fs-2 sd-text-primary"
        cards.append(f"{head}\n\n{text}\n\n{source}\n:::")
    return "\n\n".join(cards)


def tally_of_claims(pages: Path) -> dict[str, int]:
    """Numbers of claims and verdicts, as the executed page of claims publishes them."""
    found = sorted(pages.glob("*_claims.ipynb"))
    if not found:
        raise EcoDiffError("The landing page needs the executed page of claims.")
    numbers = {}
    for cell in nbformat.read(found[0], as_version=4).cells:
        for output in cell.get("outputs", []):
            name = output.get("metadata", {}).get("scrapbook", {}).get("name", "")
            if name.startswith("claims-"):
                numbers[name.removeprefix("claims-")] = output["data"][f"{RECORD}text/plain"]
    wanted = ("all", "hold", "fail", "undecided", "checkpoint")
    missing = [name for name in wanted if name not in numbers]
    if missing:
        raise EcoDiffError(f"{found[0].name} publishes no claims-{missing[0]}, which the landing page shows.")
    return {name: int(numbers[name]) for name in wanted}
