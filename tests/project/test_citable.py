"""Files by which others cite and check this companion are what is made from their sources."""

import copy
import json

import pytest
import yaml

from ecodiff.lab.book import build, citable
from ecodiff.lab.claims import items
from ecodiff.storage.paths import root

CITATION = yaml.safe_load((root() / "CITATION.cff").read_text(encoding="utf-8"))
CHECKED = yaml.safe_load((root() / "codecheck.yml").read_text(encoding="utf-8"))


def test_codecheck_is_up_to_date():
    written = (root() / "codecheck.yml").read_text(encoding="utf-8")
    assert written == citable.codecheck(CITATION), "run: python -m ecodiff book codecheck"


def test_zenodo_is_up_to_date():
    written = (root() / ".zenodo.json").read_text(encoding="utf-8")
    assert written == citable.zenodo(CITATION), "run: python -m ecodiff book zenodo"


def test_zenodo_has_what_the_citation_has():
    changed = copy.deepcopy(CITATION)
    changed["title"], changed["version"] = "Another", "9.9"
    changed["references"][1]["authors"].append({"given-names": "Ann", "family-names": "Other"})
    made = json.loads(citable.zenodo(changed))
    assert (made["title"], made["version"], made["license"]) == ("Another", "9.9", "MIT")
    assert "Wenzhong Liang" in made["references"][1] and "Ann Other" in made["references"][1]
    assert {work["url"] for work in changed["references"]} <= {one["identifier"] for one in made["related_identifiers"]}


def test_files_of_the_manifest_are_in_the_repository_or_pages_that_the_book_makes():
    pages = {f"_build/notebooks/{source.stem}.ipynb" for source in build.sources()}
    for entry in CHECKED["manifest"]:
        assert entry["file"] in pages or (root() / entry["file"]).is_file(), entry["file"]
    assert {output["file"] for output in CHECKED["ecodiff_outputs"]} == {one["file"] for one in CHECKED["manifest"]}


def test_every_table_and_figure_of_both_versions_has_an_output():
    names = [output["item"] for output in CHECKED["ecodiff_outputs"]]
    assert names == [item.name for item in (*items.TABLES, *items.FIGURES, *items.ALGORITHMS, *items.LATER)]
    for output in CHECKED["ecodiff_outputs"]:
        assert output["command"] and ("sha256" in output) == output["file"].startswith("data/")


def test_the_hash_changes_with_a_value_and_not_with_the_machine_or_the_order():
    one, two = {"key": "a", "values": {"x": 1.0}, "machine": "m"}, {"key": "b", "values": {"x": 2.0}, "machine": "m"}
    before = citable.digest([one, two])
    assert citable.digest([two | {"machine": "n"}, one]) == before
    assert citable.digest([one, two | {"values": {"x": 2.5}}]) != before


@pytest.mark.parametrize("item", [items.TABLES[0], items.TABLES[11]], ids=lambda item: item.slug)
def test_the_cost_of_an_item_is_what_its_rows_took(item):
    file, rows = items.recorded(item)
    assert rows and (root() / "data" / file).is_file()
    assert items.cost(item).startswith(f"The {len(rows)} rows that are recorded of it took ")
    assert items.cost(items.FIGURES[3]) == ""  # computed by its chapter
