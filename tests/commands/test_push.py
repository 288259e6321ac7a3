"""Pruned pipelines pushed to a Hub on this machine, with a card of what is known, and pulled by id."""

import json
import shutil

import huggingface_hub
import pytest
import torch
from hub import TOKEN, files_of, hub, run_elsewhere, talk_to
from huggingface_hub import ModelCard, constants
from tiny import tiny_sd

import ecodiff
from ecodiff import EcoDiffError, denoiser, find_sites, mask_of, push
from ecodiff.__main__ import DONE, main
from ecodiff.hub.card import MARKER
from ecodiff.hub.made import FILE, read_made
from ecodiff.scores.files import save_scores

EVALUATED = {"images": 3, "SSIM": {"mean": 0.912, "low": 0.9, "high": 0.93}, "FID": 12.5, "each": {"SSIM": [1.0]}}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny pipeline, and with what the command made of it without half of its units."""
    folder = tmp_path_factory.mktemp("push")
    pipe = tiny_sd()
    pipe.save_pretrained(folder / "dense")
    generator = torch.Generator().manual_seed(0)
    scores = {name: torch.rand(site.units, generator=generator) for name, site in find_sites(pipe.unet).items()}
    save_scores(folder / "scores.safetensors", scores, method="wanda", prompts=3)
    (folder / "evaluated.json").write_text(json.dumps(EVALUATED))
    names = [str(folder / name) for name in ("dense", "scores.safetensors", "small")]
    assert main(["prune", names[0], "--scores", names[1], "--ratio", "0.5", "--out", names[2]]) == DONE
    return folder


@pytest.fixture
def served(tmp_path, monkeypatch):
    """The folder of the repositories of a Hub that this process talks to; `me` is the owner."""
    for name, value in {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "HF_TOKEN": TOKEN}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    huggingface_hub.close_session()
    with hub(tmp_path / "served", cards={"them/dense": {"license": "openrail++"}}) as address:
        talk_to(address, monkeypatch)
        yield tmp_path / "served"
    huggingface_hub.close_session()


def test_the_folder_is_uploaded_as_it_is_with_a_card_of_what_is_known(place, served, monkeypatch, capsys):
    monkeypatch.chdir(place)
    before = {file: (place / "small" / file).read_bytes() for file in files_of(place / "small")}
    line = "push small me/small --private --evaluation evaluated.json --base them/dense --json"
    assert main(line.split()) == DONE
    assert json.loads(capsys.readouterr().out)["card"] == "written"
    assert {file: (place / "small" / file).read_bytes() for file in files_of(place / "small")} == before
    uploaded = served / "me" / "small"
    assert files_of(uploaded) == sorted([*before, "README.md"])
    assert all((uploaded / file).read_bytes() == content for file, content in before.items())

    text = (uploaded / "README.md").read_text(encoding="utf-8")
    data = ModelCard(text).data
    assert (data.license, data.base_model, data.library_name) == ("openrail++", "them/dense", "diffusers")
    dense, small = ecodiff.load(place / "dense"), ecodiff.load(place / "small")
    for pipe in (dense, small):
        assert f"{sum(parameter.numel() for parameter in denoiser(pipe).parameters()):,}" in text
    mask, sites = mask_of(small), find_sites(denoiser(dense))
    for kind, words in (("attention", "attention heads"), ("feed_forward", "feed-forward neurons")):
        names = [name for name, site in sites.items() if site.kind == kind]
        kept, total = sum(int(mask[name].sum()) for name in names), sum(sites[name].units for name in names)
        assert f"| `unet` | {words} | {kept} | {total} |" in text
    for part in (
        "the method *wanda* (prompts 3)",
        "a ratio of 0.5",
        "0.912 (95 % interval 0.9 to 0.93)",
        "| FID | 12.5 |",
    ):
        assert part in text, part
    assert 'from_pretrained("me/small")' in text and "Without `import ecodiff`" in text and "each" not in data.to_dict()


def test_weights_of_an_earlier_push_go_and_other_files_stay(place, served):
    root = served / "me" / "again"
    for file in (
        "unet/diffusion_pytorch_model.safetensors.index.json",
        "unet/x-00001-of-00002.safetensors",
        "lora.safetensors",
    ):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(b"earlier")
    push(place / "small", "me/again")
    found = files_of(root)
    assert "lora.safetensors" in found and "unet/diffusion_pytorch_model.safetensors" in found
    assert not any("of-00002" in file or "index.json" in file and file.startswith("unet") for file in found)


def test_a_card_that_someone_wrote_stays(place, served, tmp_path):
    folder = tmp_path / "own"
    shutil.copytree(place / "small", folder)
    (folder / "README.md").write_text("mine")
    assert not push(folder, "me/own").wrote_card
    assert (served / "me" / "own" / "README.md").read_text() == "mine"
    (folder / "README.md").unlink()
    assert not push(folder, "me/own").wrote_card  # edited there
    assert (served / "me" / "own" / "README.md").read_text() == "mine"
    (served / "me" / "own" / "README.md").write_text(f"{MARKER}\nof an earlier push")
    assert push(folder, "me/own").wrote_card
    assert "## What was removed" in (served / "me" / "own" / "README.md").read_text(encoding="utf-8")


def test_a_pipeline_is_pushed_from_python(place, served):
    small = ecodiff.load(place / "small")
    push(small, "me/loaded", licence="mit")
    text = (served / "me" / "loaded" / "README.md").read_text(encoding="utf-8")
    assert "was not recorded" in text and ModelCard(text).data.license == "mit" and "This was not measured" in text


REFUSED = {
    "small me": "write the repository as OWNER/NAME",
    "small them/small": "may not write to them",
    "small me/sma..ll": "cannot be the name of a repository",
    "dense me/small": "nothing of this pipeline is pruned",
    "nowhere me/small": "there is no such folder",
    "small me/small --evaluation scores.safetensors": "cannot be read as JSON",
    "small me/small --evaluation small/model_index.json": "holds no measures",
    "small me/small --evaluation evaluated.json ./evaluated.json": "two evaluations have the same file name",
    "small/unet me/small": "model_index.json: cannot be read",
}


@pytest.mark.parametrize("line", REFUSED)
def test_what_is_refused_is_one_sentence_and_uploads_nothing(line, place, served, monkeypatch, refused):
    monkeypatch.chdir(place)
    assert REFUSED[line] in refused("push", *line.split())
    assert not served.exists()


def test_without_token_network_or_permission_to_use_it(place, served, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_of_another")
    with pytest.raises(EcoDiffError, match="the access token is not valid"):
        push(place / "small", "me/small")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(EcoDiffError, match="HF_HUB_OFFLINE is set"):
        push(place / "small", "me/small")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(EcoDiffError, match="the Hub cannot be reached"):
        push(place / "small", "me/small")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(EcoDiffError, match="no access token"):
        push(place / "small", "me/small")


def test_how_it_was_made_is_not_said_of_another_pipeline(place, tmp_path):
    small = ecodiff.load(place / "small")
    assert read_made(place / "small", mask_of(small))["scores"]["method"] == "wanda"
    assert "base" not in read_made(place / "small", mask_of(small))  # a folder's name says nothing to others
    pipe = ecodiff.load(place / "dense")
    mask = {name: torch.arange(site.units) < 1 for name, site in find_sites(pipe.unet).items()}
    shutil.copy(place / "small" / FILE, tmp_path)
    assert read_made(tmp_path, mask) == {}
    (tmp_path / FILE).write_text("[]")
    assert read_made(tmp_path, mask) == {}


OTHER_PROCESS = """
import ecodiff
from diffusers import DiffusionPipeline
from safetensors.torch import save_file

for name, pipe in (("stock", DiffusionPipeline.from_pretrained("me/small")), ("load", ecodiff.load("me/small"))):
    save_file(dict(pipe.unet.state_dict()), f"{name}.safetensors")
"""


@pytest.mark.slow
def test_what_was_pushed_is_pulled_by_id_in_a_new_process_bit_for_bit(place, served, tmp_path):
    from safetensors.torch import load_file

    small = ecodiff.load(place / "small")
    push(place / "small", "me/small")
    run_elsewhere(OTHER_PROCESS, tmp_path, constants.ENDPOINT)
    for file in ("stock", "load"):
        fetched = load_file(tmp_path / f"{file}.safetensors")
        assert fetched.keys() == small.unet.state_dict().keys()
        assert all(torch.equal(value, fetched[name]) for name, value in small.unet.state_dict().items())
