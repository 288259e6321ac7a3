"""The trial of every class of diffusers: what holds is said to hold, what fails says why, and nothing is left out."""

import json
import time

import pytest

from ecodiff import EcoDiffError
from ecodiff.__main__ import main
from ecodiff.lab.support import build, page, run, trying
from ecodiff.storage.paths import root

RECORDED = run.read()


@pytest.mark.slow  # loads every module of diffusers
def test_every_class_of_diffusers_is_recorded():
    if RECORDED["diffusers"] != run.installed():
        pytest.skip("recorded with another diffusers")
    assert RECORDED["classes"] == run.classes()
    assert set(RECORDED["rows"]) <= set(RECORDED["classes"])


def test_every_stage_that_does_not_hold_has_a_reason():
    for name, row in RECORDED["rows"].items():
        assert page.holds(row) or page.reason(row), name
        for reason in row["stages"].values():
            assert reason is True or reason.strip(), name


def test_the_sentences_of_the_texts_are_those_of_the_recorded_rows():
    for text in ("README.md", "book/how-to-use.md"):
        assert page.sentence(RECORDED) in (root() / text).read_text(encoding="utf-8"), text


def test_the_page_names_every_class():
    text = page.page()
    assert [name for name in RECORDED["classes"] if f"`{name}`" not in text] == []


@pytest.mark.slow
def test_a_denoiser_of_each_form_passes_every_stage():
    for name in ("FluxTransformer2DModel", "WanTransformer3DModel"):
        row = trying.try_denoiser(name)
        assert page.holds(row), row
        assert run.differences(RECORDED["rows"][name], row) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "StableDiffusionPipeline",
        "Flux2KleinPipeline",  # latents with the statistics of a batch norm, packed after that
        "PixArtAlphaPipeline",  # a denoiser that predicts a variance as well, and knows no adapters
        "SanaPipeline",  # a VAE without a distribution
        "DiTPipeline",  # classes in the place of prompts
    ],
)
def test_a_pipeline_passes_as_recorded(name):
    row = trying.try_pipeline(name)
    assert page.holds(row), row
    assert run.differences(RECORDED["rows"][name], row) == []


def test_a_tiny_denoiser_passes_every_stage(monkeypatch):
    monkeypatch.setattr(trying, "counted", lambda name: {})  # at full size, which takes seconds
    row = trying.try_denoiser("SD3Transformer2DModel")
    assert page.holds(row), row


def test_a_class_without_configuration_says_so(monkeypatch):
    monkeypatch.setattr(
        build, "configurations", lambda: {"denoisers": {}, "full_size": {}, "parts": {}, "pipelines": {}}
    )
    row = trying.try_pipeline("FluxPipeline")
    assert "no tiny configuration" in row["stages"]["build"] and not page.is_tried(row)


def test_a_stage_that_raises_is_noted_and_not_raised():
    row = {"stages": {}}

    def refuses():
        raise EcoDiffError("This loop draws by itself.")

    def breaks():
        raise KeyError("missing")

    assert trying.attempt(row, "learn", refuses) is None and trying.attempt(row, "saved", breaks) is None
    assert row["stages"] == {"learn": "This loop draws by itself.", "saved": "unexpected KeyError: 'missing'"}


def test_results_are_kept_whole_and_those_of_other_code_are_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "results_file", lambda: tmp_path / "support.json")
    monkeypatch.setattr(run, "classes", lambda: {"A": "denoiser", "B": "pipeline"})
    monkeypatch.setattr(run, "code", lambda: "one")
    row = {"kind": "denoiser", "stages": {"runs": True}, "seconds": 2.0}
    run.record("A", row)
    assert run.left(["A", "B"]) == ["B"] and run.estimate(["A", "B"]) == 4.0
    monkeypatch.setattr(run, "code", lambda: "two")
    assert run.left(["A", "B"]) == ["A", "B"]
    assert json.loads((tmp_path / "support.json").read_text())["classes"] == {"A": "denoiser", "B": "pipeline"}


def test_differences_are_of_stages_and_shares_not_of_numbers_in_sentences():
    before = {"stages": {"learn": "off by 0.31", "saved": True}, "reached": {"attention": 0.3}, "seconds": 1.0}
    after = {"stages": {"learn": "off by 0.32", "saved": "gone"}, "reached": {"attention": 0.2}, "seconds": 9.0}
    lines = run.differences(before, after)
    assert lines == ["reached by attention: 30.0% became 20.0%", "saved: yes became no (gone)"]


@pytest.mark.slow  # loads every module of diffusers
def test_an_unknown_class_is_one_sentence(capsys):
    assert main(["support", "NoSuchPipeline"]) == 2
    assert "NoSuchPipeline is no denoiser and no pipeline class" in capsys.readouterr().err


@pytest.mark.slow  # loads every module of diffusers
def test_what_is_no_class_of_diffusers_is_not_configured():
    known = build.configurations()
    names = run.classes()
    assert [name for name in (*known["denoisers"], *known["pipelines"]) if name not in names] == []


def _hangs(kind, name, there):
    time.sleep(60)


def _ends(kind, name, there):
    raise SystemExit(3)


@pytest.mark.slow
@pytest.mark.parametrize(("work", "says"), [(_hangs, "longer than 1 seconds"), (_ends, "ended with exit code 3")])
def test_a_class_that_hangs_or_ends_its_process_has_a_row(work, says, monkeypatch):
    monkeypatch.setattr(run, "_work", work)
    ((_, row),) = run.measure(["FluxPipeline"], seconds=1)
    assert says in row["broken"]
