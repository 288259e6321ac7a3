"""Commands at full scale: the parser takes them, and their hours and gigabytes follow from counts and rows."""

import re
import shlex

import pytest

from ecodiff.__main__ import make_parser
from ecodiff.lab.claims import full_scale
from ecodiff.lab.claims.full_scale import SCHNELL, SDXL, Run, Speed, commands, learn, own_model_costs
from ecodiff.lab.claims.items import FIGURES, TABLES
from ecodiff.storage.paths import root

WITHOUT = {"Figure 1", "Figure 2", "Figure 3", "Figure 4", "Figure 5", "Figure 10"}
"""A count, schematics and curves of formulas, and DeepCache, which is no command."""


@pytest.fixture(scope="module")
def page():
    return full_scale.page()


def test_every_table_and_every_figure_of_images_has_commands():
    named = {item.name for item in full_scale.all_items()}
    assert {item.name for item in (*TABLES, *FIGURES)} - named == WITHOUT


def test_no_command_of_an_item_writes_where_another_has_written():
    for item in full_scale.all_items():
        commands_of_item = {run.command for run in commands(item)}
        folders = [command.rpartition("--out ")[2] for command in commands_of_item if "--out " in command]
        masks = [name for name in folders if name.endswith(".safetensors")]
        assert len(set(folders)) == len(folders) - len(masks) + len(set(masks)), item.name


def test_the_parser_takes_every_command(page):
    parser = make_parser()
    printed = set(re.findall(rf"{full_scale.PROGRAM} (.*?)(?:  #|\n)", page))
    assert len(printed) > 30
    for command in printed:
        options = parser.parse_args(shlex.split(command))
        assert options.command != "learn" or options.preset in ("sdxl", "flux")


def test_what_a_command_reads_was_written_by_one_before_it():
    for item in full_scale.all_items():
        written = {SDXL.id, SCHNELL.id, full_scale.SD2.id, full_scale.DEV.id}
        for run in commands(item):
            words = shlex.split(run.command)
            reads = words[1:3] if words[0] == "evaluate" else words[1:2]
            if "--scores" in words:
                reads.append(words[words.index("--scores") + 1])
            assert set(reads) <= written, (item.name, run.command)
            if "--out" in words:
                written.add(words[words.index("--out") + 1])


def test_hours_are_operations_over_speed():
    speed = Speed("a device", generating=2.0, learning=1.0)
    assert speed.hours(Run("learn", times=2, learning=3600, generating=7200)) == 4
    recorded = Speed.recorded()
    assert recorded.generating > recorded.learning > 1e13


def test_an_update_of_sdxl_takes_the_recorded_time():
    """20.06 s are recorded for 50 steps of one guided sample; an update has four."""
    mask, speed = learn(SDXL), Speed.recorded()
    assert mask.learning / speed.learning / 400 / 4 == pytest.approx(20.06, abs=0.01)
    assert mask.bytes < learn(SCHNELL).bytes


def test_pages_include_what_is_computed(page):
    book = root() / "book"
    assert "{include} _full-scale.md" in (book / "full-scale.md").read_text(encoding="utf-8")
    assert "{include} _own-model.md" in (book / "own-model.md").read_text(encoding="utf-8")
    assert "NVIDIA H200" in page and "2.57 B parameters of the denoiser become 2.13 B" in own_model_costs()
