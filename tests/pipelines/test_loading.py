"""A pipeline that cannot be loaded is one sentence that says why, and what to do."""

import errno
import json
import socket

import diffusers
import huggingface_hub
import pytest
from hub import hub, talk_to

import ecodiff
from ecodiff import EcoDiffError

ID = "someone/some-model"


@pytest.fixture
def on_hub(tmp_path, monkeypatch):
    """A function: `ID` is loaded from this address, with an empty cache."""
    from huggingface_hub import hf_api

    def load(address, **more):
        talk_to(address, monkeypatch)
        monkeypatch.setattr(hf_api.api, "endpoint", address)
        return ecodiff.load(ID, cache_dir=tmp_path / "cache", **more)

    return load


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (403, "GatedRepo", "the model is gated: accept its licence at huggingface.co/someone/some-model"),
        (401, "GatedRepo", "the model is gated"),
        (404, "RepoNotFound", "the Hub has no such repository, or a private one"),
        (404, "RevisionNotFound", "the repository has no such revision"),
    ],
)
def test_what_the_hub_refuses_is_named(tmp_path, on_hub, status, code, words):
    with hub(tmp_path, refused=(status, code)) as address, pytest.raises(EcoDiffError, match=words) as error:
        on_hub(address)
    assert str(error.value).startswith(f"{ID}: ") and "\n" not in str(error.value)


def test_a_repository_without_a_pipeline_is_named(tmp_path, on_hub):
    (tmp_path / ID).mkdir(parents=True)
    (tmp_path / ID / "README.md").write_text("no pipeline")
    with hub(tmp_path) as address, pytest.raises(EcoDiffError, match="no pipeline as diffusers saves it"):
        on_hub(address)


def test_no_network_is_named(on_hub):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(EcoDiffError, match="the Hub was not reached, and the model is not in the cache"):
        on_hub(address)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (huggingface_hub.errors.OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE is set"),
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full: make room"),
        (OSError("model_index.json is no JSON"), "the pipeline could not be loaded: model_index.json is no JSON"),
    ],
)
def test_causes_are_found_below_what_wraps_them(monkeypatch, error, words):
    def fail(*args, **kwargs):
        try:
            raise error
        except OSError as cause:
            raise OSError(str(cause)) from cause

    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", fail)
    with pytest.raises(EcoDiffError, match=words):
        ecodiff.load(ID)


def test_a_folder_is_never_blamed_on_the_hub(tmp_path):
    (tmp_path / "model_index.json").write_text(
        json.dumps({"_class_name": "StableDiffusionPipeline", "unet": ["a", "b"]})
    )
    with pytest.raises(EcoDiffError) as error:
        ecodiff.load(tmp_path)
    assert "Hub" not in str(error.value)
