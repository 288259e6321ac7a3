"""Recorded rows: read where the configuration is the same, measured otherwise, never half written."""

import getpass
import json
import platform
import shutil
import subprocess

import pytest
import torch

from ecodiff.errors import EcoDiffError
from ecodiff.storage import records
from ecodiff.storage.paths import root

CONFIG = {"method": "random", "ratio": 0.2, "seed": 3}


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("ECODIFF_DATA", str(tmp_path))
    monkeypatch.delenv("ECODIFF_RECORDS", raising=False)
    monkeypatch.delenv("ECODIFF_RECOMPUTE", raising=False)


class Counter:
    """A measurement that gives another value each time it really runs."""

    runs = 0

    def __call__(self):
        self.runs += 1
        return {"ssim": self.runs / 10, "each": torch.tensor([1.0, 2.0])}


def test_measured_once_and_then_read(tmp_path):
    function = Counter()
    new = records.measure(CONFIG, function, name="quality")
    old = records.measure(
        dict(reversed(CONFIG.items())), function, name="quality"
    )  # the order of the keys says nothing
    assert function.runs == 1 and not new.pop("recorded") and old.pop("recorded") and new == old
    assert old["values"] == {"ssim": 0.1, "each": [1.0, 2.0]} and old["seed"] == 3 and old["config"] == CONFIG
    (line,) = (tmp_path / "results/quality.jsonl").read_text().splitlines()
    assert json.loads(line) == old


def test_another_configuration_is_another_row():
    function = Counter()
    for change in ({}, {"ratio": 0.3}, {"weights": "abc"}, {"seed": 4}):
        assert not records.measure(CONFIG | change, function, name="quality")["recorded"]
    assert function.runs == 4 and len(records.rows("quality")) == 4
    assert records.table("quality")[1] | {"ratio": 0.3, "ssim": 0.2} == records.table("quality")[1]
    assert records.rows("nothing") == []


def test_recompute_replaces_the_row(monkeypatch):
    function = Counter()
    records.measure(CONFIG, function, name="quality")
    assert records.measure(CONFIG, function, name="quality", recompute=True)["values"]["ssim"] == 0.2
    monkeypatch.setenv("ECODIFF_RECOMPUTE", "1")
    assert records.measure(CONFIG, function, name="quality")["values"]["ssim"] == 0.3
    assert [row["values"]["ssim"] for row in records.rows("quality")] == [0.3]


def names(folder) -> set[str]:
    """Files of a folder; the lock of its writers is empty and stays."""
    return {path.name for path in folder.iterdir()}


def test_records_off_neither_reads_nor_writes(tmp_path, monkeypatch):
    function = Counter()
    records.measure(CONFIG, function, name="quality")
    before = (tmp_path / "results/quality.jsonl").read_bytes()
    monkeypatch.setenv("ECODIFF_RECORDS", "off")
    assert not records.measure(CONFIG, function, name="quality")["recorded"]
    records.measure(CONFIG, function, name="other")
    assert function.runs == 3 and (tmp_path / "results/quality.jsonl").read_bytes() == before
    assert names(tmp_path / "results") == {"quality.jsonl", ".lock"}


def test_a_row_says_where_it_comes_from_but_not_from_whom():
    row = records.measure(CONFIG, Counter(), name="quality")
    assert (
        row["versions"].keys() >= {"python", "torch", "diffusers"}
        and row["machine"]["cores"] >= 1
        and row["machine"]["cpu"]
    )
    assert row["seconds"] >= 0 and row["date"].endswith("Z")
    text = json.dumps(row)
    assert platform.node() not in text and str(root()) not in text and f"/{getpass.getuser()}" not in text


@pytest.mark.parametrize("damage", ["truncated", "edited", "no json", "lacking"])
def test_damaged_file_is_a_clear_error_before_the_work(tmp_path, damage):
    function = Counter()
    records.measure(CONFIG | {"n": 1}, function, name="quality")
    records.measure(CONFIG | {"n": 2}, function, name="quality")
    file = tmp_path / "results/quality.jsonl"
    text = file.read_text()
    lacking = json.dumps({"key": "x", "config": {}}) + "\n"
    file.write_text(
        {"truncated": text[:-40], "edited": text.replace('"ratio": 0.2', '"ratio": 0.9'), "no json": text + "}\n"}.get(
            damage, text + lacking
        )
    )
    damaged = file.read_text()
    with pytest.raises(EcoDiffError, match=r"quality\.jsonl, line \d, is no whole recorded row"):
        records.measure(CONFIG | {"n": 3}, function, name="quality")
    assert function.runs == 2 and file.read_text() == damaged


def test_a_full_disk_keeps_the_file_and_hands_over_the_row(tmp_path, monkeypatch):
    records.measure(CONFIG, Counter(), name="quality")
    before = (tmp_path / "results/quality.jsonl").read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ecodiff.storage.records.os.replace", full)
    with pytest.raises(EcoDiffError, match="ECODIFF_RECORDS=off") as caught:
        records.measure(CONFIG, Counter(), name="quality", recompute=True)
    assert caught.value.row["values"]["ssim"] == 0.1
    assert (tmp_path / "results/quality.jsonl").read_bytes() == before
    assert names(tmp_path / "results") == {"quality.jsonl", ".lock"}


def test_rows_that_others_added_meanwhile_are_kept():
    def slow():
        records.measure(CONFIG | {"n": 2}, Counter(), name="quality")  # another process would do this
        return {"a": 1}

    records.measure(CONFIG | {"n": 1}, slow, name="quality")
    assert [row["config"]["n"] for row in records.rows("quality")] == [2, 1]


@pytest.mark.parametrize(
    ("config", "values", "name", "message"),
    [
        (CONFIG, {}, "../quality", "cannot name"),
        ({"f": print}, {}, "quality", "text form"),
        (CONFIG, [1], "quality", "mapping"),
        (CONFIG, {"a": print}, "quality", "cannot be recorded"),
    ],
)
def test_bad_input_is_a_clear_error(config, values, name, message):
    with pytest.raises(EcoDiffError, match=message):
        records.measure(config, lambda: values, name=name)


def test_values_that_are_not_finite_survive():
    records.measure(CONFIG, lambda: {"psnr": float("inf")}, name="quality")
    assert records.measure(CONFIG, Counter(), name="quality")["values"] == {"psnr": float("inf")}


def test_rows_of_two_clones_merge_by_git_and_by_key(tmp_path):
    """Jobs with a clone of their own add rows at the same place of the same file."""

    def add(folder: str, number: int) -> None:
        config = {"number": number}
        records.measure(config, lambda: {"value": number}, name="rows", folder=tmp_path / folder)

    add("base", 0)
    for folder, numbers in {"ours": (1, 2), "theirs": (2, 3)}.items():
        shutil.copytree(tmp_path / "base", tmp_path / folder)
        for number in numbers:
            add(folder, number)
    sides = {name: tmp_path / name / "rows.jsonl" for name in ("base", "ours", "theirs")}
    attribute = subprocess.run(
        ["git", "check-attr", "merge", "data/results/rows.jsonl"], cwd=root(), capture_output=True, text=True
    )
    assert attribute.stdout.strip().endswith("merge: union")
    subprocess.run(["git", "merge-file", "--union", sides["ours"], sides["base"], sides["theirs"]], check=True)
    for number in range(4):
        found = records.find({"number": number}, name="rows", folder=tmp_path / "ours")
        assert found["values"] == {"value": number}


def test_changed_values_are_named_and_rows_of_earlier_versions_have_no_checksum(tmp_path):
    row = records.measure(CONFIG, Counter(), name="quality")
    file = tmp_path / "results/quality.jsonl"
    text = file.read_text()
    assert json.loads(text)["checksum"] == row["checksum"]
    file.write_text(text.replace('"ssim": 0.', '"ssim": 1.'))
    assert file.read_text() != text
    with pytest.raises(EcoDiffError, match="line 1, is no whole recorded row"):
        records.rows("quality")
    earlier = json.loads(text)
    del earlier["checksum"]
    file.write_text(json.dumps(earlier) + "\n")
    assert records.find(CONFIG, name="quality")["values"] == row["values"]
