"""Recorded rows are found without models: identities are stored, and are those of the weights."""

import json
import subprocess
import sys

import pytest
from tiny import tiny_sd

import ecodiff
from ecodiff.errors import EcoDiffError
from ecodiff.lab import identities
from ecodiff.lab.zoo import store
from ecodiff.pipelines import loading
from ecodiff.pipelines.identity import Identity
from ecodiff.storage.paths import data_dir

LOOK_UP = """
import sys
from ecodiff.lab import studies
from ecodiff.lab.studies import results
assert results.find(studies.cells("main", "openmoji-sdxl")["learned, 20%"])["ssim"]
assert len(studies.recorded("main", "openmoji-flux-schnell")["learned, 20%"]) == studies.SEEDS
assert results.gates_file(studies.cells("main", "openmoji-sdxl")["learned, 20%"]).is_file()
print(sorted({"torch", "diffusers", "transformers"} & set(sys.modules)))
"""


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A data folder without models."""
    monkeypatch.setenv("ECODIFF_DATA", str(tmp_path))
    monkeypatch.delenv("ECODIFF_RECORDS", raising=False)
    identities.hashed.cache_clear()
    yield tmp_path
    identities.hashed.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize("name", store.stored_ids())
def test_a_stored_identity_is_that_of_the_weights(name):
    identities.check(data_dir() / "models" / name, store.identity_of_weights(name))


@pytest.mark.slow
def test_looking_a_row_up_needs_no_model_and_no_torch():
    looked = subprocess.run([sys.executable, "-c", LOOK_UP], capture_output=True, text=True)
    assert looked.returncode == 0, looked.stderr
    assert looked.stdout.strip() == "[]"


def test_what_is_stored_and_differs_is_named(elsewhere):
    folder = elsewhere / "models" / "mine"
    folder.mkdir(parents=True)
    (folder / "unet.safetensors").write_bytes(b"1234")
    found = {"denoiser": "a", "vae": None, "pipeline": "P", "scheduler": {}, "text_encoders": {}}
    identities.write(folder, found)
    assert identities.identity("mine") == Identity(**found)
    with pytest.raises(EcoDiffError, match="identity.json names another denoiser than the model has"):
        identities.check(folder, {**found, "denoiser": "b"})
    (folder / "unet.safetensors").write_bytes(b"12345")
    with pytest.raises(EcoDiffError, match="weights in .*mine are not those that its identity.json describes"):
        identities.identity("mine")


@pytest.mark.slow
def test_a_model_of_ones_own_is_hashed_once_until_a_file_changes(elsewhere, monkeypatch):
    pipe = tiny_sd()
    pipe.save_pretrained(elsewhere / "own")
    loads = []
    monkeypatch.setattr(loading, "load_once", lambda model: loads.append(model) or ecodiff.load(model))
    model = str(elsewhere / "own")
    first = identities.identity(model)
    assert first == Identity.of(ecodiff.load(model)) and len(loads) == 1
    assert identities.identity(model) == first and len(loads) == 1
    identities.hashed.cache_clear()  # another process
    assert identities.identity(model) == first and len(loads) == 1
    config = elsewhere / "own" / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "beta_end": 0.5}))
    assert identities.identity(model).scheduler["beta_end"] == 0.5 and len(loads) == 2


@pytest.mark.slow
def test_a_folder_elsewhere_is_hashed_whatever_identity_lies_in_it(elsewhere):
    tiny_sd().save_pretrained(elsewhere / "copy")
    stale = {"denoiser": "a", "vae": None, "pipeline": "P", "scheduler": {}, "text_encoders": {}}
    identities.write(elsewhere / "copy", stale)
    model = str(elsewhere / "copy")
    assert identities.identity(model) == Identity.of(ecodiff.load(model))
