"""Recipes: every one trains in its smoke size, goes on after a kill to the same weights, and saves a plain folder."""

import json
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

import ecodiff
from ecodiff.__main__ import main
from ecodiff.errors import EcoDiffError
from ecodiff.lab import openmoji
from ecodiff.lab.zoo import build, fit, recipes, store
from ecodiff.lab.zoo.train import plan, train
from ecodiff.metrics.clip import Judge
from ecodiff.storage.paths import data_dir

# One process has the family, which takes half a minute to make.
pytestmark = pytest.mark.xdist_group("family")

PIPELINES = {
    "openmoji-sd2": "StableDiffusionPipeline",
    "openmoji-sdxl": "StableDiffusionXLPipeline",
    "openmoji-flux-dev": "FluxPipeline",
    "openmoji-flux-schnell": "FluxPipeline",
    "openmoji-wan": "WanPipeline",
}


def tiny(name, steps=2):
    """The smoke recipe, smaller still: the same code in seconds.

    AdamW stands in for Muon, whose steps along full-size matrices would take nearly all of the time; tests of its own
    step it on small ones.
    """
    recipe = recipes.load_recipe(name, smoke=True)
    for stage in recipe["stages"]:
        recipe[stage]["train"] |= {"steps": steps, "batch_size": 2, "warmup": 1}
        recipe[stage]["train"].pop("save_every", None)
        if "optimizer" in recipe[stage]["train"]:
            recipe[stage]["train"]["optimizer"] = "adamw"
    if "tokenizer" in recipe:
        recipe["tokenizer"]["captions"] = 50
    return recipe


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """Every model, trained for two steps and saved: (models in memory, their folder, their weights in full)."""
    folder, models, exact = tmp_path_factory.mktemp("models"), {}, {}
    for name in recipes.training_order():
        recipe = tiny(name)
        models[name], log = train(recipe, folder / "runs" / name, folder)
        exact[name] = {key: value.clone() for key, value in weights(models[name]).items()}
        store.save(models[name], recipe, log, folder / name)  # rounds to fp16
    return models, folder, exact


def weights(model):
    parts = {name: part for name, part in model.components.items() if isinstance(part, torch.nn.Module)}
    return {f"{name}.{key}": value for name, part in parts.items() for key, value in part.state_dict().items()}


def test_each_recipe_comes_after_what_it_starts_from():
    order = recipes.training_order()
    assert sorted(order) == recipes.recipe_ids() == sorted([*PIPELINES, "openmoji-clip"])
    for name in order:
        assert all(order.index(other) < order.index(name) for other in recipes.needs(recipes.load_recipe(name)))


@pytest.mark.parametrize("name", recipes.recipe_ids())
def test_plan_says_steps_and_minutes_before_the_start(name):
    recipe = recipes.load_recipe(name)
    text = plan(recipe)
    assert set(recipe["minutes"]) == set(recipe["stages"]) and f"{sum(recipe['minutes'].values())} minutes" in text
    assert all(f"{stage} {recipe[stage]['train']['steps']} steps" in text for stage in recipe["stages"])


@pytest.mark.slow
def test_the_family_fits_its_budget(family):
    models = family[0]
    megabytes = {name: 2 * build.parameters(model) / 1e6 for name, model in models.items()}
    assert sum(megabytes.values()) < 87, megabytes  # the probe takes 1 MB more
    assert megabytes["openmoji-wan"] < 13
    assert megabytes["openmoji-clip"] < 3.5


@pytest.mark.slow
@pytest.mark.parametrize("name", PIPELINES)
def test_a_saved_pipeline_is_plain_diffusers_and_draws(family, name):
    folder = family[1] / name
    loaded = DiffusionPipeline.from_pretrained(folder)
    assert type(loaded).__name__ == PIPELINES[name]
    parts = [part for part in loaded.components.values() if isinstance(part, torch.nn.Module)]
    assert {part.dtype for part in parts} == {torch.float32}
    loaded.set_progress_bar_config(disable=True)
    sampling = {**recipes.load_recipe(name)["sampling"], "num_inference_steps": 1}
    drawn = loaded("a cat on green", output_type="np", **sampling)[0]
    assert drawn.shape == ((1, 9, 32, 32, 3) if name == "openmoji-wan" else (1, 64, 64, 3))
    assert not [path for path in folder.parent.iterdir() if path.name.startswith(".")]


@pytest.mark.slow
def test_the_saved_judge_is_plain_transformers(family):
    judge = Judge.load(family[1] / "openmoji-clip")
    assert type(judge.model).__name__ == "CLIPModel" and judge.model.dtype == torch.float32
    assert judge.text_features(["a cat on red"]).shape == (1, 96)


@pytest.mark.slow
@pytest.mark.parametrize("name", PIPELINES)
def test_sites_of_the_family(family, name):
    pipe = family[0][name]
    sites = ecodiff.find_sites(ecodiff.denoiser(pipe)).values()
    kinds = [site.kind for site in sites]
    if name.startswith("openmoji-flux"):  # a double block has a feed-forward for the picture and one for the text
        double, single = pipe.transformer.config.num_layers, pipe.transformer.config.num_single_layers
        assert (kinds.count("attention"), kinds.count("feed_forward")) == (double + single, 2 * double + single)
    elif name == "openmoji-wan":  # attention over space and time, attention to the caption, a feed-forward
        blocks = pipe.transformer.config.num_layers
        assert (kinds.count("attention"), kinds.count("feed_forward")) == (2 * blocks, blocks)
    else:
        blocks = sum(type(m).__name__ == "BasicTransformerBlock" for m in pipe.unet.modules())
        assert (kinds.count("attention"), kinds.count("feed_forward")) == (2 * blocks, blocks)
    if name == "openmoji-sd2":  # heads of one width, as in SD2
        assert {m.inner_dim // m.heads for m in pipe.unet.modules() if type(m).__name__ == "Attention"} == {16}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["openmoji-sd2", "openmoji-flux-schnell", "openmoji-wan"])
def test_gates_are_learned_and_a_pruned_one_draws(family, name):
    pipe = family[0][name]
    sampling = dict(recipes.load_recipe(name)["sampling"])
    steps, guidance = 1, sampling.pop("guidance_scale")
    sampling.pop("num_inference_steps")
    config = ecodiff.LearnConfig(
        updates=2, batch_size=1, num_inference_steps=steps, guidance_scale=guidance, call=sampling
    )
    gates = ecodiff.learn(pipe, ["a cat on red", "a dog on blue"], config)
    small = ecodiff.prune(pipe, gates.mask(ratio=0.2))
    assert build.parameters(small) < build.parameters(pipe)
    pictures = ecodiff.generate(
        small, ["a cat on red"], [0], num_inference_steps=1, guidance_scale=guidance, progress=False, **sampling
    )
    assert pictures.shape == ((1, 9, 3, 32, 32) if name == "openmoji-wan" else (1, 3, 64, 64))


@pytest.mark.slow
@pytest.mark.parametrize("name", recipes.recipe_ids())
def test_a_killed_run_goes_on_to_the_same_weights(family, tmp_path, monkeypatch, name):
    _, folder, exact = family
    replace, last = fit.os.replace, recipes.load_recipe(name)["stages"][-1]

    def killed_after_the_first_checkpoint(source, target):
        replace(source, target)
        if Path(target).name == f"{last}.pt":
            raise KeyboardInterrupt

    monkeypatch.setattr(fit, "SAVE_EVERY", 1)
    monkeypatch.setattr(fit.os, "replace", killed_after_the_first_checkpoint)
    with pytest.raises(KeyboardInterrupt):
        train(tiny(name), tmp_path, folder)
    monkeypatch.setattr(fit.os, "replace", replace)
    saved = torch.load(tmp_path / f"{last}.pt", weights_only=True)
    assert saved["state"]["step"] == 1
    resumed = weights(train(tiny(name), tmp_path, folder)[0])
    assert resumed.keys() == exact[name].keys()
    assert all(torch.equal(value, exact[name][key]) for key, value in resumed.items())


def fit_once(folder, **options):
    """A matrix and a bias, fitted for three steps to predict a fixed map of random numbers."""
    layer = torch.nn.Linear(4, 3)
    torch.nn.init.zeros_(layer.weight), torch.nn.init.zeros_(layer.bias)

    def loss_of(scenes, generator):
        x = torch.randn(8, 4, generator=generator)
        return (layer(x) - x[:, :3].roll(1, 1) - 1).square().mean()

    options = {"steps": 3, "batch_size": 1, "lr": 0.01, "warmup": 0, "ema": 0.0, **options}
    fit.fit("layer", [layer], loss_of, options, folder, seed=0)
    return layer.weight.detach(), layer.bias.detach()


def test_muon_steps_along_an_orthogonal_matrix_and_leaves_the_rest_to_adamw(tmp_path):
    adamw = fit_once(tmp_path / "adamw", steps=1)
    muon = fit_once(tmp_path / "muon", steps=1, optimizer="muon")
    torch.testing.assert_close(muon[1], adamw[1])
    # From zero, the first step is an orthogonal matrix times 0.2 √4 times the learning rate. Muon's five Newton-Schulz
    # steps bring singular values only near 1, by its own design (0.68 to 1.13).
    singular = torch.linalg.svdvals(muon[0]) / (0.2 * 2 * 0.01)
    assert 0.6 < singular.min() and singular.max() < 1.2
    torch.testing.assert_close(adamw[0].abs(), torch.full((3, 4), 0.01))  # AdamW's first step is the sign alone


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_text_encoders_have_adamw_at_their_own_rate(name):
    layer, encoder = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
    options = {"lr": 0.01, "encoder_lr": 0.002, "optimizer": name}
    rates = {}
    for optimizer in fit.optimizers_of([layer, encoder], options, [encoder]):
        for group in optimizer.param_groups:
            rates |= {p: (type(optimizer).__name__, group["lr"]) for p in group["params"]}
    assert rates[encoder.weight] == rates[encoder.bias] == ("AdamW", 0.002) and rates[layer.bias] == ("AdamW", 0.01)
    assert rates[layer.weight] == ("Muon" if name == "muon" else "AdamW", 0.01)
    together = fit.optimizers_of([layer, encoder], {"lr": 0.01, "optimizer": name}, [encoder])
    assert {group["lr"] for optimizer in together for group in optimizer.param_groups} == {0.01}


@pytest.mark.slow
def test_t5_is_begun_anew_on_captions_and_learns_to_restore_words(family, tmp_path):
    from ecodiff.lab.zoo import stages

    pipe, recipe = deepcopy(family[0]["openmoji-flux-dev"]), tiny("openmoji-flux-dev")
    before = pipe.text_encoder_2
    options = {"steps": 60, "batch_size": 8, "lr": 2e-3, "warmup": 1, "ema": 0.0, "hide": 0.3}
    log = stages.train_words(pipe, {**recipe, "words": {"train": options}}, tmp_path, "words")
    torch.manual_seed(recipe["seed"])
    fresh, encoder = type(before)(before.config).state_dict(), pipe.text_encoder_2.state_dict()
    seen = pipe.tokenizer_2("a cat on a red background").input_ids
    for key, value in encoder.items():
        assert value.shape == before.state_dict()[key].shape and not torch.equal(value, fresh[key]), key
    words = "shared.weight"
    assert not torch.equal(encoder[words][seen], before.state_dict()[words][seen])
    assert log["loss"] < torch.log(torch.tensor(float(len(pipe.tokenizer_2)))).item()  # of knowing nothing


def test_a_killed_run_with_muon_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    exact = fit_once(tmp_path / "exact", optimizer="muon")
    monkeypatch.setattr(fit, "SAVE_EVERY", 1)
    replace = fit.os.replace

    def killed(source, target):
        replace(source, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(fit.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        fit_once(tmp_path, optimizer="muon")
    monkeypatch.setattr(fit.os, "replace", replace)
    assert torch.load(tmp_path / "layer.pt", weights_only=True)["state"]["step"] == 1
    assert all(torch.equal(a, b) for a, b in zip(fit_once(tmp_path, optimizer="muon"), exact, strict=True))


def test_an_unknown_optimizer_is_named(tmp_path):
    with pytest.raises(EcoDiffError, match="no optimizer 'sgd'"):
        fit_once(tmp_path, optimizer="sgd")


def longer(name):
    """The tiny recipe with one more stage of the denoiser, on later scenes."""
    recipe = tiny(name)
    recipe["denoiser_9"] = {"train": {**recipe["denoiser"]["train"], "first_scene": 1000}}
    recipe["stages"] = [*recipe["stages"], "denoiser_9"]
    return recipe


@pytest.mark.slow
@pytest.mark.parametrize("name", ["openmoji-sd2", "openmoji-flux-dev"])
def test_a_stored_model_is_trained_on_by_a_stage_that_is_new(family, tmp_path, monkeypatch, name):
    folder, seen = family[1], []
    real = fit.openmoji.scenes
    monkeypatch.setattr(
        fit.openmoji, "scenes", lambda split, n, start=0: seen.append(start) or real(split, n, start=start)
    )
    model, log = train(longer(name), tmp_path, folder, go_on=True)
    assert list(log)[:-2] == longer(name)["stages"] and seen == [1000, 1002]
    assert not list(tmp_path.glob("denoiser.pt")) and list(tmp_path.glob("denoiser_9.pt"))
    before, after = weights(ecodiff.load(folder / name)), weights(model)
    moved = {key.partition(".")[0] for key, value in after.items() if not torch.equal(value, before[key])}
    assert moved >= {"transformer" if "flux" in name else "unet", "text_encoder"} and "vae" not in moved


@pytest.mark.slow
def test_going_on_says_what_it_cannot_go_on_from(family, tmp_path):
    with pytest.raises(EcoDiffError, match="has all stages of its recipe: add one"):
        train(tiny("openmoji-sd2"), tmp_path, family[1], go_on=True)
    other = longer("openmoji-sd2")
    other["denoiser"]["train"] = {**other["denoiser"]["train"], "lr": 9.0}
    with pytest.raises(EcoDiffError, match="trained by another recipe .stage 'denoiser' differs"):
        train(other, tmp_path, family[1], go_on=True)
    with pytest.raises(EcoDiffError, match="openmoji-sd2 is not in .*: train it first"):
        train(longer("openmoji-sd2"), tmp_path, tmp_path, go_on=True)


@pytest.mark.slow
def test_dev_follows_its_guidance_number_and_schnell_starts_as_dev_at_three(family):
    dev = deepcopy(family[0]["openmoji-flux-dev"].transformer)
    generator = torch.Generator().manual_seed(0)
    torch.nn.init.normal_(dev.proj_out.weight, std=0.1, generator=generator)
    call = {
        "hidden_states": torch.randn(2, 64, 16, generator=generator),
        "encoder_hidden_states": torch.randn(2, 24, 128, generator=generator),
        "pooled_projections": torch.randn(2, 128, generator=generator),
        "timestep": torch.tensor([0.3, 0.9]),
        "img_ids": torch.zeros(64, 3),
        "txt_ids": torch.zeros(24, 3),
    }
    folded = build.fold_guidance(dev, 3.0)
    assert not folded.config.guidance_embeds
    with torch.no_grad():
        at_three, at_one = (dev(**call, guidance=torch.full((2,), scale)).sample for scale in (3.0, 1.0))
        assert torch.allclose(folded(**call).sample, at_three, atol=1e-4)
    assert not torch.allclose(at_one, at_three, atol=1e-4)


@pytest.mark.slow
def test_flux_latents_are_packed_and_centred(family):
    from ecodiff.lab.zoo.stages import encode

    pipe, scenes = family[0]["openmoji-flux-dev"], list(openmoji.scenes("train", 64))
    latents = encode(pipe, scenes)
    assert latents.shape == (64, 64, 16) and abs(latents.mean().item()) < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("name", ["openmoji-sdxl", "openmoji-flux-dev"])
def test_a_caption_can_be_given_as_tokens_without_its_pooled_vector(family, name):
    from ecodiff.lab.zoo.stages import conditioning

    pipe, captions, yes = family[0][name], ["a cat on a red background"] * 2, torch.tensor([True, True])
    with torch.no_grad():
        full, none = conditioning(pipe, captions, yes), conditioning(pipe, captions, ~yes)
        told = conditioning(pipe, captions, yes, torch.tensor([True, False]))
    pooled = [
        (c.get("added_cond_kwargs") or {"text_embeds": c.get("pooled_projections")})["text_embeds"]
        for c in (full, none, told)
    ]
    tokens = [c["encoder_hidden_states"] for c in (full, none, told)]
    assert torch.equal(tokens[2], tokens[0]) and not torch.allclose(tokens[0], tokens[1])
    assert torch.allclose(pooled[2][0], pooled[0][0], atol=1e-6) and torch.allclose(
        pooled[2][1], pooled[1][1], atol=1e-6
    )
    assert not torch.allclose(pooled[0], pooled[1])


@pytest.mark.slow
def test_a_stage_drops_the_share_of_pooled_vectors_that_its_options_name(family, tmp_path, monkeypatch):
    from ecodiff.lab.zoo import stages

    recipe, seen, real = longer("openmoji-flux-dev"), [], stages.conditioning
    recipe["denoiser_9"]["train"] |= {"drop_condition": 0.0, "drop_pooled": 1.0}
    monkeypatch.setattr(stages, "conditioning", lambda pipe, *told: seen.append(told[1:]) or real(pipe, *told))
    train(recipe, tmp_path, family[1], go_on=True)
    assert seen and all(keep.all() and not pooled.any() for keep, pooled in seen)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["openmoji-sd2", "openmoji-flux-schnell", "openmoji-wan", "openmoji-clip"])
def test_a_card_states_what_was_measured(family, tmp_path, monkeypatch, name):
    from ecodiff.lab.zoo import card, measure

    class Probe:  # stands for the real one, whose network is large
        def correct(self, images, names, progress):
            return torch.ones(len(names), dtype=torch.bool)

    monkeypatch.setattr(measure.judges, "probe", Probe)
    monkeypatch.setattr(measure.judges, "judge", lambda: family[0]["openmoji-clip"])
    trained = json.loads((family[1] / name / "recipe.json").read_text())
    if name == "openmoji-clip":
        measured = measure.measure_judge(family[0][name], prompts=3)
        assert {key.split(":")[0].split(", ")[-1] for key in measured} >= {"as they are", "moved", "cut"}
    else:
        sampling = {**trained["recipe"]["sampling"], "num_inference_steps": 1}
        measured = measure.measure_pipeline(family[0][name], sampling, prompts=3, seeds=2)
    if name == "openmoji-wan":
        for fact in ("object right", "background right", "motion right"):
            assert measured[f"seen pairs: {fact} (%)"].endswith("real scenes 100.0")
        assert "held-out pairs: all facts right (%)" in measured and measured["clips a set"] == "6"
    elif name != "openmoji-clip":
        named = measured["one object: object named by the probe (%)"]
        assert named.startswith("100.0 (95 % interval 100.0 to 100.0); real")
        assert "two objects, held-out pairs: caption ranked first (%)" in measured
        assert ("crossed captions: background of the tokens (%)" in measured) == ("flux" in name)
    card.write_card(tmp_path, trained, measured)
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("---\nlicense: cc-by-sa-4.0") and "$" not in text
    assert all(f"| {key} | {value} |" in text for key, value in measured.items())


@pytest.mark.slow
def test_crossed_captions_tell_which_of_them_is_drawn(family, monkeypatch):
    from ecodiff.lab.zoo import measure

    scenes, asked = list(openmoji.scenes("seen", 12, start=6_000_000, count=1)), []

    def draw(pipe, prompts, seeds, **sampling):  # a model that reads the tokens alone
        asked.extend(prompts)
        return torch.stack([openmoji.images([by_caption[p["prompt_2"]]])[0] for p in prompts])

    by_caption = {scene.caption: scene for scene in scenes}
    monkeypatch.setattr(measure, "generate", draw)
    rows = measure.crossed(None, None, scenes, {})
    assert rows["crossed captions: background of the tokens (%)"].startswith("100.0")
    assert rows["crossed captions: background of the pooled vector (%)"].startswith("0.0")
    assert asked and all(by_caption[p["prompt"]].colour != by_caption[p["prompt_2"]].colour for p in asked)


@pytest.mark.slow
def test_every_caption_fits_the_tokenizers(family):
    from ecodiff.lab.zoo.measure import free_wordings, scene_sets

    pipe, free = family[0]["openmoji-flux-dev"], free_wordings(scene_sets(200)["one object"])
    assert not set(free) & set(openmoji.prompts("train", 3000))
    for caption in openmoji.prompts("train", 300) + openmoji.prompts("heldout", 100) + free:
        for tokenizer in (pipe.tokenizer, pipe.tokenizer_2):
            assert len(tokenizer(caption).input_ids) <= tokenizer.model_max_length
        assert pipe.tokenizer_2.unk_token_id not in pipe.tokenizer_2(caption).input_ids


def test_the_tokenizers_are_the_same_each_time():
    for make in (build.clip_tokenizer, build.t5_tokenizer):
        assert make(tiny("openmoji-flux-dev")).get_vocab() == make(tiny("openmoji-flux-dev")).get_vocab()


@pytest.mark.slow
def test_other_options_do_not_continue_a_run(tmp_path):
    recipe = tiny("openmoji-clip")
    train(recipe, tmp_path)
    recipe["contrast"]["train"]["lr"] = 1e-4
    with pytest.raises(EcoDiffError, match="other training options"):
        train(recipe, tmp_path)


@pytest.mark.slow
def test_another_vae_does_not_continue_a_run(family, tmp_path):
    recipe, folder = tiny("openmoji-sd2"), family[1]
    train(recipe, tmp_path / "run", folder)
    other = DiffusionPipeline.from_pretrained(folder / "openmoji-sdxl")
    torch.nn.init.ones_(other.vae.decoder.conv_out.bias)
    store.save(other, tiny("openmoji-sdxl"), {}, tmp_path / "models" / "openmoji-sdxl")
    with pytest.raises(EcoDiffError, match="started from other weights"):
        train(recipe, tmp_path / "run", tmp_path / "models")


@pytest.mark.slow
def test_a_stage_does_not_continue_after_another_earlier_stage(family, tmp_path):
    recipe = tiny("openmoji-sdxl")
    train(recipe, tmp_path)
    recipe["vae"]["train"]["lr"] *= 2
    (tmp_path / "vae.pt").unlink()
    with pytest.raises(EcoDiffError, match="denoiser.pt was written .* started from other weights"):
        train(recipe, tmp_path)


def test_a_run_goes_on_in_the_precision_that_it_began_in(tmp_path, monkeypatch):
    fit_once(tmp_path)
    saved = torch.load(tmp_path / "layer.pt", weights_only=True)
    assert saved["precision"] == fit.fast_precision()
    other = "no" if saved["precision"] == "bf16" else "bf16"
    monkeypatch.setattr(fit, "fast_precision", lambda: other)
    layer = torch.nn.Linear(4, 3)
    result = fit.fit("layer", [layer], None, saved["options"], tmp_path, seed=0)
    assert result["precision"] == saved["precision"]


def test_unknown_recipe_is_one_sentence(capsys):
    assert main(["zoo", "train", "openmoji-sd9"]) == 2
    assert "there is no recipe 'openmoji-sd9'" in capsys.readouterr().err.lower()


@pytest.mark.slow
def test_a_model_that_was_never_evaluated_cannot_be_checked(family, tmp_path, monkeypatch):
    (tmp_path / "models").symlink_to(family[1])
    monkeypatch.setattr(store, "data_dir", lambda: tmp_path)
    monkeypatch.setattr(store, "changed_files", lambda folder: [])
    for name, file in (("openmoji-sd2", "fixed.png"), ("openmoji-clip", "fixed.json")):
        with pytest.raises(EcoDiffError, match=f"{name} has no {file} yet: run python -m ecodiff zoo evaluate {name}"):
            store.check(name)


@pytest.mark.slow
def test_the_first_steps_tell_what_the_rest_costs(tmp_path, capsys):
    train(tiny("openmoji-clip", steps=fit.MEASURED + 1), tmp_path)
    assert "contrast: 1 steps to go, about 0 minutes at the" in capsys.readouterr().out
    assert "10 steps to go, about 1 minutes at the 6.00 s" in fit.estimate("x", 10, [90.0, 6.0, 6.0, 7.0, 5.0])


@pytest.mark.slow
def test_a_missing_teacher_is_one_sentence(capsys, tmp_path):
    arguments = ["--smoke", "--runs", str(tmp_path), "--models", str(tmp_path / "none")]
    assert main(["zoo", "distill", *arguments]) == 2
    assert "openmoji-flux-schnell starts from openmoji-flux-dev" in capsys.readouterr().err
    assert main(["zoo", "train", "openmoji-sd2", *arguments]) == 2
    assert "openmoji-sd2 starts from openmoji-sdxl" in capsys.readouterr().err


@pytest.mark.skipif(not (data_dir() / store.MANIFEST).exists(), reason="no data files are stored yet")
def test_stored_files_are_those_of_the_manifest():
    assert store.changed_files() == []
    listed = {line.split("  ")[1] for line in (data_dir() / store.MANIFEST).read_text().splitlines()}
    assert {path.relative_to(data_dir()).as_posix() for path in store.data_files()} == listed


@pytest.mark.slow
@pytest.mark.skipif(not store.stored_ids(), reason="no trained model is stored yet")
def test_stored_models_load_and_draw_their_fixed_picture():
    for name in store.stored_ids():
        assert store.check(name).startswith("ok")
        card = (data_dir() / "models" / name / "README.md").read_text()
        assert card.startswith("---\nlicense: cc-by-sa-4.0") and "OpenMoji" in card
        json.loads((data_dir() / "models" / name / "recipe.json").read_text())


def test_a_recipe_of_an_unknown_class_is_refused_in_one_sentence():
    with pytest.raises(EcoDiffError, match="asks for NoSuchPipeline: take one of StableDiffusionPipeline"):
        build.build({**recipes.load_recipe("openmoji-sd2"), "pipeline": "NoSuchPipeline"})


@pytest.mark.slow
def test_a_saved_model_names_no_folder_of_the_machine_that_trained_it(family):
    configs = [*family[1].rglob("config.json"), *family[1].rglob("model_index.json")]
    assert len(configs) > 10 and not [path for path in configs if "_name_or_path" in path.read_text()]


@pytest.mark.slow
def test_a_saved_tokenizer_does_not_tell_how_the_last_batch_was_padded(family, tmp_path):
    pipe = DiffusionPipeline.from_pretrained(family[1] / "openmoji-flux-dev")
    for tokenizer in (pipe.tokenizer, pipe.tokenizer_2):
        tokenizer(["a cat", "a cat and a dog"], padding=True, truncation=True, max_length=8)
    store.save(pipe, tiny("openmoji-flux-dev"), {}, tmp_path / "saved")
    states = [json.loads(path.read_text()) for path in (tmp_path / "saved").glob("tokenizer*/tokenizer.json")]
    assert len(states) == 2 and {str((s["padding"], s["truncation"])) for s in states} == {"(None, None)"}


@pytest.mark.slow
def test_every_caption_of_a_clip_fits_its_tokenizer(family):
    tokenizer = family[0]["openmoji-wan"].tokenizer
    for clip in [*openmoji.clips("train", 300), *openmoji.clips("heldout", 100)]:
        words = tokenizer(clip.caption).input_ids
        assert len(words) <= tokenizer.model_max_length and tokenizer.unk_token_id not in words


@pytest.mark.slow
def test_latents_of_clips_are_centred_channel_by_channel(family):
    from ecodiff.lab.zoo.stages import encode

    latents = encode(family[0]["openmoji-wan"], list(openmoji.clips("train", 256)))
    each = latents.transpose(0, 1).flatten(1)
    assert latents.shape[1:] == (32, 3, 4, 4)
    assert each.mean(1).abs().max() < 0.02 and (each.std(1) - 1).abs().max() < 0.02


def test_training_samples_of_clips_come_in_another_order_in_each_round(monkeypatch, tmp_path):
    from types import SimpleNamespace

    from ecodiff.lab.zoo import stages

    encoded = []

    def encode(pipe, clips):
        encoded.append(len(clips))
        return torch.tensor([[float(clip.index)] for clip in clips])

    monkeypatch.setattr(stages, "encode", encode)
    options = {"pool": 40, "origin": "0" * 64}
    draw = stages.pooled(SimpleNamespace(), options, tmp_path, seed=1)
    first, second = ([int(x.latents) for x in draw(start, 40)] for start in (0, 40))
    assert sorted(first) == sorted(second) == list(range(40)) and first != second
    assert [int(x.latents) for x in draw(38, 4)] == first[38:] + second[:2]
    assert all(x.caption == openmoji.clip(int(x.latents)).caption for x in draw(0, 4))
    again = stages.pooled(SimpleNamespace(), options, tmp_path, seed=1)
    assert [int(x.latents) for x in again(0, 40)] == first and sum(encoded) == 40  # found in the folder
