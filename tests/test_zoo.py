"""Recipes: the smoke size of a recipe trains, goes on after a kill to the same weights, and saves a plain pipeline."""

import json

import pytest
import torch
from diffusers import DiffusionPipeline

from ecodiff import data
from ecodiff.errors import EcoDiffError
from ecodiff.paths import data_dir
from ecodiff.zoo import build, store
from ecodiff.zoo.__main__ import main
from ecodiff.zoo.train import train


@pytest.fixture(scope="module")
def recipe():
    """The smoke recipe, smaller still: the same code in seconds."""
    smoke = build.load_recipe("openmoji-sdxl", smoke=True)
    for stage in ("vae", "denoiser", "decoder"):
        smoke[stage]["train"] |= {"steps": 2, "batch_size": 2, "warmup": 1}
    smoke["tokenizer"]["captions"] = 50
    return smoke


@pytest.fixture(scope="module")
def trained(recipe, tmp_path_factory):
    return train(recipe, tmp_path_factory.mktemp("run"))


def test_a_killed_run_goes_on_to_the_same_weights(recipe, trained, tmp_path, monkeypatch):
    from ecodiff.zoo import train as module

    whole = module.fit

    def killed_in_the_denoiser(name, modules, loss_of, options, folder, seed, save_every=250):
        if name != "denoiser":
            return whole(name, modules, loss_of, options, folder, seed, save_every)

        def loss_then_kill(step, scenes, generator):
            if step == 1:
                raise KeyboardInterrupt
            return loss_of(step, scenes, generator)

        return whole(name, modules, loss_then_kill, options, folder, seed, save_every=1)

    monkeypatch.setattr(module, "fit", killed_in_the_denoiser)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path)
    monkeypatch.setattr(module, "fit", whole)
    pipe, _ = train(recipe, tmp_path)
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        first, second = getattr(trained[0], name).state_dict(), getattr(pipe, name).state_dict()
        assert all(torch.equal(first[key], second[key]) for key in first), name


def test_saved_pipeline_is_plain_diffusers_and_reads_its_captions(recipe, trained, tmp_path):
    pipe, log = trained
    store.save(pipe, recipe, log, tmp_path / "model")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "model")
    assert type(loaded).__name__ == "StableDiffusionXLPipeline" and loaded.unet.dtype == torch.float32
    assert loaded.text_encoder.dtype == loaded.text_encoder_2.dtype == torch.float32
    loaded.set_progress_bar_config(disable=True)
    picture = loaded("a cat on green", num_inference_steps=1, output_type="np").images
    assert picture.shape == (1, 64, 64, 3)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_every_caption_fits_the_tokenizer(trained):
    tokenizer = trained[0].tokenizer
    for caption in data.prompts("train", 300) + data.prompts("heldout", 100):
        assert len(tokenizer(caption).input_ids) <= tokenizer.model_max_length


def test_the_tokenizer_is_the_same_each_time(recipe):
    first, second = (build.clip_tokenizer(recipe).get_vocab() for _ in range(2))
    assert first == second


def test_other_options_do_not_continue_a_run(recipe, trained, tmp_path):
    changed = {**recipe, "vae": {**recipe["vae"], "train": {**recipe["vae"]["train"], "lr": 1e-4}}}
    train_vae = __import__("ecodiff.zoo.train", fromlist=["train_vae"]).train_vae
    train_vae(build.build_pipeline(recipe), recipe, tmp_path)
    with pytest.raises(EcoDiffError, match="other training options"):
        train_vae(build.build_pipeline(changed), changed, tmp_path)


def test_unknown_recipe_is_one_sentence(capsys):
    assert main(["train", "openmoji-sd9"]) == 2
    assert "there is no recipe 'openmoji-sd9'" in capsys.readouterr().err.lower()


@pytest.mark.skipif(not (data_dir() / store.MANIFEST).exists(), reason="no data files are stored yet")
def test_stored_files_are_those_of_the_manifest():
    assert store.changed_files() == []
    listed = {line.split("  ")[1] for line in (data_dir() / store.MANIFEST).read_text().splitlines()}
    assert {path.relative_to(data_dir()).as_posix() for path in store.data_files()} == listed


@pytest.mark.skipif(not store.stored_ids(), reason="no trained pipeline is stored yet")
def test_stored_pipelines_load_and_draw_their_fixed_picture():
    for name in store.stored_ids():
        assert store.check(name).startswith("ok")
        card = (data_dir() / "models" / name / "README.md").read_text()
        assert card.startswith("---\nlicense: cc-by-sa-4.0") and "OpenMoji" in card
        json.loads((data_dir() / "models" / name / "recipe.json").read_text())
