"""The landing page: its numbers come from rows, counts and the page of claims; it names both versions of the paper."""

import re

import nbformat
import pytest
import yaml

from ecodiff.errors import EcoDiffError
from ecodiff.lab.book import landing
from ecodiff.storage.paths import root

INDEX = root() / "book" / "index.md"
TITLES = (
    "Effortless Efficiency: Low-Cost Pruning of Diffusion Models",
    "Learnable Sparsity for Vision Generative Models",
)
PREPRINT = ("Zhang", "Jin", "Dong", "Khakzar", "Torr", "Stegmaier", "Kawaguchi")


@pytest.fixture
def pages(tmp_path):
    """A folder with an executed page of claims, as myst-nb's glue leaves it."""
    numbers = {"all": 42, "hold": 71, "fail": 49, "undecided": 15, "checkpoint": 19}
    outputs = [
        nbformat.v4.new_output(
            "display_data",
            {f"{landing.RECORD}text/plain": str(number)},
            metadata={"scrapbook": {"mime_prefix": landing.RECORD, "name": f"claims-{name}"}},
        )
        for name, number in numbers.items()
    ]
    page = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("publish()", outputs=outputs)])
    nbformat.write(page, tmp_path / "15_claims.ipynb")
    return tmp_path


def test_its_numbers_are_those_of_rows_counts_and_claims(pages):
    text = landing.landing(pages).replace("\u00a0", " ")
    kept = landing.shares()
    assert kept["original"][0] == 1 and len(kept) == len(landing.UNADAPTED) + 1
    for method in ("original", "learned", "magnitude", "random"):
        assert f"{kept[method][1]:.1f} %" in text
    assert "2.114 B" in text and "2.567 B" in text and "The paper prints 2.1 B" in text
    assert "42 claims" in text and "71 verdicts in favour, 49 against, 15 undecided, 19 that need" in text


def test_the_best_other_score_is_named_by_each_measure():
    kept = {method: (0.5, 50.0) for method in ("original", *landing.UNADAPTED)}
    kept |= {"learned": (0.8, 60.0), "fisher": (0.7, 55.0), "taylor": (0.6, 65.0)}
    said = landing.result(kept)
    assert "nearest to its own with *learned* masks (SSIM 0.800" in said
    assert "0.700 with *fisher*" in said and "with *taylor*, the best other score by this measure, 65.0 %" in said
    assert "with *fisher* masks" in landing.result(kept | {"fisher": (0.9, 55.0)})


def test_a_page_of_claims_without_its_numbers_is_an_error(pages):
    nbformat.write(nbformat.v4.new_notebook(), pages / "15_claims.ipynb")
    with pytest.raises(EcoDiffError, match="15_claims.ipynb publishes no claims-all"):
        landing.tally_of_claims(pages)
    with pytest.raises(EcoDiffError, match="needs the executed page of claims"):
        landing.tally_of_claims(pages / "elsewhere")


def test_no_result_is_typed_on_it():
    text = INDEX.read_text(encoding="utf-8")
    assert "```{include} _landing.md" in text
    assert set(re.findall(r"\d+(?:\.\d+)? %", text)) == {"20 %"}


def test_it_and_readme_name_both_versions_their_authors_and_the_code():
    for path in (INDEX, root() / "README.md"):
        text = path.read_text(encoding="utf-8")
        for piece in (*TITLES, *PREPRINT, "Liang", "arxiv.org/abs/2412.02852v1", "9pNWZLVZ4r", "EcoDiff/tree/00aa5f1"):
            assert piece in text, f"{path.name}: {piece}"


def test_citation_has_both_versions():
    entries = yaml.safe_load((root() / "CITATION.cff").read_text(encoding="utf-8"))["references"]
    found = {entry["title"]: tuple(author["family-names"] for author in entry["authors"]) for entry in entries}
    assert found[TITLES[0]] == PREPRINT
    assert found[TITLES[1]] == ("Zhang", "Jin", "Liang", *PREPRINT[2:])
