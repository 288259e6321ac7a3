"""Published numbers: all tables load with the types they should have, and known arithmetic holds between them."""

import csv

import pytest

from ecodiff.errors import EcoDiffError
from ecodiff.lab import paper
from ecodiff.storage.paths import data_file

TEXT = {"model", "method", "parameter", "scope", "retrained", "bold", "name", "unit", "where", "site", "kind"}


@pytest.mark.parametrize("name", paper.TABLES)
def test_entries_have_the_type_of_their_column(name):
    rows = paper.table(name)
    assert rows
    for row in rows:
        assert None not in row  # no row is longer than the head
        for column, value in row.items():
            if column in TEXT:
                assert value is None or isinstance(value, str), (name, column, value)
            elif name not in ("table2", "table3"):
                assert value is None or isinstance(value, (int, float)), (name, column, value)
        for column in row.keys() & {"coco_clip", "flickr_clip", "coco_ssim", "flickr_ssim", "ratio"}:
            assert row[column] is None or 0 <= row[column] <= 1
        assert row.get("coco_fid") is None or row["coco_fid"] > 25


@pytest.mark.parametrize("name", [name for name in paper.TABLES if name not in ("table2", "table3")])
def test_columns_have_one_type(name):
    rows = paper.table(name)
    for column in rows[0]:
        assert len({type(row[column]) for row in rows if row[column] is not None}) <= 1, column
    for column in rows[0].keys() & {"gflop", "size", "units"}:
        assert all(row[column] is None or isinstance(row[column], int) for row in rows)
    assert all(isinstance(row["ratio"], float) for row in rows if "ratio" in row)


def test_configurations_are_typed():
    assert paper.setting("table2", "lr_feed_forward") == 1 and paper.setting("table3", "weight_decay") == 0.01
    assert paper.setting("table2", "optimizer") == "Adam"
    names = [[row["parameter"] for row in paper.table(name)] for name in ("table2", "table3")]
    assert names[0] == names[1]


def test_names_of_claims_are_unique():
    names = [row["name"] for row in paper.table("claims")]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("model", ["SDXL", "FLUX"])
def test_pruned_gflop_is_nominal(model):
    rows = [row for row in paper.table("table1") if row["model"] == model and row["gflop"] is not None]
    assert len(rows) == 5
    for row in rows:
        assert abs(row["gflop"] - (1 - row["ratio"]) * rows[0]["gflop"]) <= 500  # printed to thousands


def test_carbon_is_one_factor_times_gpu_hours():
    for row in paper.table("table12"):
        assert row["carbon_g"] == pytest.approx(75 * row["gpu_hours"])


def test_originals_agree_between_tables():
    for column in ("coco_fid", "coco_clip", "flickr_fid", "flickr_clip"):
        sdxl = [paper.row(name, model="SDXL", method="Original")[column] for name in ("table1", "table8", "table11")]
        assert len(set(sdxl)) == 1
        flux = paper.row("table1", model="FLUX", method="Original")[column]
        assert flux == paper.row("table7", model="FLUX Schnell", ratio=0)[column]
        for ratio in (0.1, 0.15):
            pruned = paper.row("table1", model="FLUX", method="EcoDiff", ratio=ratio)[column]
            assert pruned == paper.row("table7", model="FLUX Schnell", ratio=ratio)[column]


@pytest.mark.parametrize("name", paper.LATER)
def test_rows_of_later_tables_name_version_and_source(name):
    rows = paper.table(name)
    assert rows and {row["source"] for row in rows} <= set(paper.SOURCES) and all(row["version"] for row in rows)
    assert len({(row["version"], row["source"]) for row in rows}) == 1
    assert all(shown["source"] in paper.provenance(name) for shown in paper.readable(name))


def test_every_file_of_published_numbers_is_a_table_here():
    folder = data_file("paper/table1.csv").parent
    found = {path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.csv")}
    assert found == {*paper.TABLES, *paper.LATER}
    second_hand = [name for name in paper.LATER if "second-hand" in paper.provenance(name)]
    assert second_hand == [name for name in paper.LATER if name.startswith("published/")]


def test_second_hand_rows_never_enter_a_first_hand_table(monkeypatch):
    assert all(paper.provenance(name).endswith("first-hand") for name in paper.TABLES)
    mixed = [{"model": "SDXL", "coco_fid": "32.19", "version": "ICLR 2026", "source": "second-hand"}]
    monkeypatch.setattr(paper, "_texts", lambda name: mixed)
    with pytest.raises(EcoDiffError, match="is the preprint's"):
        paper.table("table1")
    paper.table("published/main")
    monkeypatch.setattr(paper, "_texts", lambda name: [{**mixed[0], "source": ""}])
    with pytest.raises(EcoDiffError, match="names its version, and its source"):
        paper.table("published/main")


def test_wrong_names_are_refused():
    with pytest.raises(EcoDiffError, match="no published table 'table13'"):
        paper.table("table13")
    with pytest.raises(EcoDiffError, match="no published claim 'price'"):
        paper.claim("price")
    with pytest.raises(EcoDiffError, match="has 2 rows with"):
        paper.row("table6", method="EcoDiff")


def test_a_published_table_as_texts_keeps_every_row_and_marks_what_is_not_printed():
    rows = paper.readable("table11")
    assert [row["scope"] for row in rows] == ["–", "global", "local"]
    assert rows[1]["FID, COCO"] == "34.41" and rows[1]["ratio"] == "20 %"
    assert {row["method"] for row in paper.readable("table1", model="SDXL", ratio=0.2)} == {
        "DeepCache", "DiffPruning", "EcoDiff"
    }  # fmt: skip
    assert paper.readable("table1")[0]["GFLOP"] == "478,000"


@pytest.mark.parametrize("name", [name for name in paper.TABLES if name != "sdxl_lambda"])
def test_readable_numbers_keep_their_printed_digits(name):
    """35.50 is not 35.5 and 1 is not 1.0."""
    with open(data_file(f"paper/{name}.csv"), encoding="utf-8", newline="") as file:
        printed = list(csv.DictReader(file))
    for texts, shown in zip(printed, paper.readable(name), strict=True):
        columns = [column for column in texts if column != "bold"]
        for column, text in zip(columns, shown.values(), strict=True):
            if column != "ratio":
                assert text.replace(",", "") == (texts[column] or "–").replace(",", ""), (name, column)
