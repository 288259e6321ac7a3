"""Profiles of published models: their chapters run on a tiny random pipeline of the same class in the id's place."""

import diffusers
import pytest
import torch
import yaml
from tiny import TOKENS, tiny_flux, tiny_sd, tiny_sd3, tiny_sdxl, tiny_wan, trained

from ecodiff.cost import presets
from ecodiff.cost.room import known
from ecodiff.errors import EcoDiffError
from ecodiff.lab.book import build
from ecodiff.lab.book.given import require_embedded, require_sdxl_class
from ecodiff.storage.paths import root

SIZE = {"height": 16, "width": 16}


def tiny_qwen():
    """Qwen-Image: a text encoder with its own tokenizer of bytes, joint attention, guidance by a second call."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = ["<|endoftext|>", *bytes_to_unicode().values()]
    tokenizer = Qwen2Tokenizer(vocab={letter: i for i, letter in enumerate(letters)}, merges=[])
    torch.manual_seed(0)
    rope = {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"}
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"num_key_value_heads": 2, "rope_scaling": rope, "vocab_size": len(letters)}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=3,
        joint_attention_dim=16, guidance_embeds=False, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=24, z_dim=4, dim_mult=[1, 2, 4], num_res_blocks=1, temperal_downsample=[False, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    return diffusers.QwenImagePipeline(
        transformer=trained(transformer),
        vae=vae.eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        text_encoder=Qwen2_5_VLForConditionalGeneration(config).eval(),
        tokenizer=tokenizer,
    )


STAND_INS = {
    "sd2": (tiny_sd, SIZE),
    "sdxl": (tiny_sdxl, SIZE),
    "sdxl-turbo": (tiny_sdxl, SIZE),
    "flux-dev": (tiny_flux, SIZE | {"max_sequence_length": TOKENS}),
    "flux-schnell": (tiny_flux, SIZE | {"max_sequence_length": TOKENS}),
    "sd3.5": (tiny_sd3, SIZE | {"max_sequence_length": TOKENS}),
    "qwen-image": (tiny_qwen, SIZE),
    "wan": (lambda: tiny_wan(None, second=False), SIZE | {"num_frames": 5, "max_sequence_length": TOKENS}),
}
"""Profile -> a tiny pipeline of the class of its model, and the sizes at which it runs."""
COUNTS = {
    "mask_updates": 2, "batch_size": 2, "num_inference_steps": 2, "draw_steps": 2, "prompts": 4, "pictures": 4,
    "cosine_seeds": 1, "grid_prompts": 1, "grid_ratios": [0.5], "curve_ratios": [0.2], "curve_pictures": 2,
    "speed_turns": 1, "rivals": ["random"],
}  # fmt: skip
"""Counts in the place of a profile's own."""


def source(chapter):
    return next(path for path in build.sources() if path.stem[3:] == chapter)


def values(profile):
    return yaml.safe_load((root() / "notebooks" / "profiles" / f"{profile}.yaml").read_text())


def test_every_published_profile_has_a_stand_in():
    published = {path.stem for path in (root() / "notebooks" / "profiles").glob("*.yaml")} - {"default", "smoke"}
    assert published == set(STAND_INS)


@pytest.mark.parametrize("profile", STAND_INS)
def test_a_profile_names_chapters_that_take_its_model(profile):
    chapters = {path.stem[3:] for path in build.sources()}
    named = values(profile)["chapters"]
    assert "learning_a_mask" in named and set(named) <= chapters
    assert all("model" in build.parameters(source(chapter)) for chapter in named)


@pytest.mark.parametrize("profile", ["sd2", "sdxl", "flux-dev", "flux-schnell", "sd3.5", "wan"])
def test_a_profile_generates_as_the_preset_of_its_model(profile):
    given, preset = values(profile), known(values(profile)["model"])
    assert given["draw_steps"] == preset.steps
    assert (given["call"]["height"], given["call"]["width"]) == preset.size
    if profile not in ("sd3.5", "flux-schnell"):  # their model cards give another value, and none
        assert given["guidance_scale"] == preset.guidance


def test_other_chapters_keep_their_own_values():
    assert build.values_for(source("claims"), "sdxl") == {"profile": "sdxl"}
    assert build.values_for(source("learning_a_mask"), "sdxl")["model"] == presets.preset("sdxl").id
    assert build.values_for(source("claims"), "smoke")["claims_presets"] == []


def executed(profile, chapter, tmp_path, monkeypatch, **more):
    """Run a chapter with a profile's values, but for the model's folder, sizes and counts."""
    pipeline, size = STAND_INS[profile]
    pipeline().save_pretrained(tmp_path / "model")
    own = build.parameters(source(chapter))
    given = {**values(profile), **COUNTS, "model": str(tmp_path / "model"), **more}
    given["call"] = values(profile)["call"] | size
    for name, value in {**build.QUIET, "ECODIFF_RECORDS": "off", "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "run").mkdir()
    return build._executed(source(chapter), {n: v for n, v in given.items() if n in own}, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("profile", STAND_INS)
def test_a_mask_is_learned_with_the_profile(profile, tmp_path, monkeypatch):
    notebook = executed(profile, "learning_a_mask", tmp_path, monkeypatch)
    printed = str([cell.get("outputs") for cell in notebook.cells])
    assert "2 updates in" in printed and "open_feed_forward" in printed


@pytest.mark.slow
@pytest.mark.parametrize("profile", ["sdxl", "flux-dev"])
def test_a_smaller_model_is_made_with_the_profile(profile, tmp_path, monkeypatch):
    executed(profile, "a_smaller_model", tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"dtype": "float17"}, "dtype is one of"),
        ({"prompts_file": "nowhere.txt"}, "nowhere.txt"),
        ({"model": "nowhere"}, "'nowhere' is no embedded pipeline"),
    ],
)
def test_what_cannot_work_is_said_in_the_first_cells(more, words, tmp_path, monkeypatch):
    import papermill

    with pytest.raises(papermill.PapermillExecutionError, match=words) as error:
        executed("sdxl", "learning_a_mask", tmp_path, monkeypatch, **more)
    assert error.value.ename == "EcoDiffError" and error.value.exec_count <= 5


def test_chapters_about_one_kind_of_model_refuse_others():
    with pytest.raises(EcoDiffError, match="a U-Net of SDXL's kind, and FluxPipeline has none"):
        require_sdxl_class(tiny_flux())
    require_sdxl_class(tiny_sdxl())
    with pytest.raises(EcoDiffError, match="its model is an embedded one"):
        require_embedded("stabilityai/stable-diffusion-xl-base-1.0")
    require_embedded("openmoji-sdxl")
