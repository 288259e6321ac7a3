"""What a model card states, read back as numbers; and the targets of the family."""

import json

import numpy as np
import pytest

from ecodiff.lab.zoo import card, measure, store
from ecodiff.lab.zoo.card import Measured
from ecodiff.storage.paths import data_dir

WORDS = {
    "VAE PSNR (dB)": "27.90",
    "one object: object named by the probe (%)": "77.7 (95 % interval 76.9 to 78.4); real scenes 100.0",
    "one object: background right (%)": "99.0; real scenes 100.0",
    "seeds": "3",
    "sampling": "num_inference_steps 12, guidance_scale 3.0",
}
NUMBERS = {
    "VAE PSNR (dB)": Measured(27.9),
    "one object: object named by the probe (%)": Measured(77.7, 76.9, 78.4, 100.0),
    "one object: background right (%)": Measured(99.0, real=100.0),
    "seeds": Measured(3.0),
}


def test_a_number_in_words_is_read_back():
    assert {name: Measured.parse(text) for name, text in WORDS.items()} == NUMBERS | {"sampling": None}
    assert str(NUMBERS["one object: object named by the probe (%)"]) == "77.7 (76.9 to 78.4)"
    assert str(Measured(27.9)) == "27.9"


def test_numbers_are_read_back_and_there_are_none_before(tmp_path):
    assert card.read_measured(tmp_path) == {}
    card.write_measured(tmp_path, WORDS)
    assert card.read_measured(tmp_path) == NUMBERS
    assert json.loads((tmp_path / "measured.json").read_text())["sampling"] == WORDS["sampling"]


def test_evaluation_leaves_card_numbers_picture_and_checksums(tmp_path, monkeypatch):
    folder = tmp_path / "models" / "mine"
    folder.mkdir(parents=True)
    recipe = {"id": "mine", "pipeline": "FluxPipeline", "stands_for": "FLUX", "seed": 0, "sampling": {}}
    log = {"machine": {"cores": 2}, "commit": "abc"}
    (folder / "recipe.json").write_text(json.dumps({"recipe": recipe, "log": log}))
    monkeypatch.setattr(store, "data_dir", lambda: tmp_path)
    monkeypatch.setattr(store, "load", lambda name: None)
    monkeypatch.setattr(store, "fixed_picture", lambda pipe, sampling: np.zeros((64, 64, 3), np.uint8))
    monkeypatch.setattr(measure, "measure_pipeline", lambda *arguments: dict(WORDS))
    monkeypatch.setattr(store, "identity_of_weights", lambda name: {"denoiser": "its hash"})
    assert store.evaluate("mine") == WORDS
    assert card.read_measured(folder) == NUMBERS
    assert json.loads((folder / "identity.json").read_text()) == {"bytes": {}, "denoiser": "its hash"}
    assert "| VAE PSNR (dB) | 27.90 |" in (folder / "README.md").read_text()
    manifest = (tmp_path / store.MANIFEST).read_text()
    assert "models/mine/measured.json" in manifest and "README" not in manifest


def test_the_gap_to_a_teacher_is_the_largest():
    named, seen, held = list(card.TARGETS)[1:4]
    teacher = {named: Measured(90.0), seen: Measured(80.0), held: Measured(70.0), "VAE PSNR (dB)": Measured(40.0)}
    student = {named: Measured(89.0), seen: Measured(73.5), "VAE PSNR (dB)": Measured(20.0)}
    assert card.gap(student, teacher) == (seen, 6.5)
    assert card.gap(student, {held: Measured(70.0)}) is None


@pytest.mark.parametrize("name", store.stored_ids())
def test_every_stored_card_that_is_written_can_be_read(name):
    folder = data_dir() / "models" / name
    if not (folder / "README.md").is_file():
        pytest.skip(f"{name} is not evaluated yet")
    numbers = card.read_measured(folder)
    if not store.is_judge(store.recipe_of(name)["recipe"]):
        assert numbers["VAE PSNR (dB)"].value > 20 and numbers["one object: background right (%)"].real > 90
    else:
        assert numbers["one object, as they are: objects found (%)"].low is not None
