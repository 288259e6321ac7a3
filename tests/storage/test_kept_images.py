"""Kept images and interrupted runs are found again by the values of all that they depend on, and by nothing else."""

import types
import warnings

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionImg2ImgPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from peft import LoraConfig
from PIL import Image
from tiny import PROMPTS, TOKENS, tiny_flux, tiny_sd, tiny_sdxl

import ecodiff
from ecodiff.baselines import blocks
from ecodiff.errors import EcoDiffError
from ecodiff.method.config import LearnConfig
from ecodiff.pipelines.contents import Undescribed, describe, of_pipeline
from ecodiff.pipelines.parts import denoiser
from ecodiff.pipelines.running import private_copy
from ecodiff.storage.fingerprint import key

SMALL = {"num_inference_steps": 1, "guidance_scale": 3.0, "height": 16, "width": 16, "progress": False}


def draw(pipe, **more):
    extra = {"max_sequence_length": TOKENS} if hasattr(pipe, "transformer") else {}
    return ecodiff.generate(pipe, PROMPTS[:1], [0], **{**SMALL, **extra, **more})


class Scaled(AttnProcessor):
    """A processor of one's own."""

    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def __call__(self, *args, **kwargs):
        return self.scale * super().__call__(*args, **kwargs)


def with_lora(pipe):
    torch.manual_seed(1)
    layers = ["to_q", "to_v", "to_out.0", "ff.net.2"]
    pipe.unet.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=layers), "one")


def doubled(forward):
    """A forward whose prediction is larger."""

    def run(self, *args, **kwargs):
        return tuple(2 * part for part in forward(self, *args, **{**kwargs, "return_dict": False}))

    return run


def freeu(pipe, on):
    pipe.enable_freeu(s1=0.2, s2=0.2, b1=1.6, b2=1.8) if on else None


def freeu_changed(pipe, on):
    pipe.enable_freeu(s1=0.2, s2=0.2, b1=1.6 if on else 1.2, b2=1.8)


def lora_scale(pipe, on):
    pipe.unet.set_adapters(["one"], weights=[0.2]) if on else with_lora(pipe)


def lora_off(pipe, on):
    pipe.unet.disable_adapters() if on else with_lora(pipe)


def lora_fused(pipe, on):
    if on:
        pipe.unet.set_adapters(["one"], weights=[0.2])
    else:
        with_lora(pipe)
        pipe.unet.fuse_lora()
        pipe.unet.unfuse_lora()


def processor(pipe, on):
    pipe.unet.set_attn_processor(Scaled(0.1)) if on else None


def processor_changed(pipe, on):
    pipe.unet.set_attn_processor(Scaled(0.1 if on else 0.9))


def library_processor_on_text(pipe, on):
    pipe.unet.attn_processors  # noqa: B018
    for module in pipe.unet.modules():
        if on and hasattr(module, "processor"):
            module.rescale_output_factor = 3.0


def module_attribute(pipe, on):
    pipe.unet.time_proj.flip_sin_to_cos = not on


def model_config(pipe, on):
    pipe.vae.register_to_config(scaling_factor=0.5 if on else 0.18215)


def forward_of_an_instance(pipe, on):
    if on:
        pipe.unet.forward = types.MethodType(doubled(type(pipe.unet).forward), pipe.unet)


def method_of_the_pipeline(pipe, on):
    if on:
        encode = pipe.encode_prompt

        def louder(*args, **kwargs):
            return tuple(None if part is None else part * 2 for part in encode(*args, **kwargs))

        pipe.encode_prompt = louder


def hook_of_the_text_encoder(pipe, on):
    if on:
        layer = pipe.text_encoder.encoder.layers[0].mlp
        layer.register_forward_hook(lambda module, args, output: 5 * output)


def scheduler_tensor(pipe, on):
    if on:
        pipe.scheduler.alphas_cumprod = pipe.scheduler.alphas_cumprod**2


def method_of_the_scheduler(pipe, on):
    if on:
        pipe.scheduler.scale_model_input = lambda sample, timestep: 2 * sample


def activation(pipe, on):
    if on:
        for module in pipe.unet.modules():
            if hasattr(module, "nonlinearity"):
                module.nonlinearity = torch.nn.Tanh()


CHANGES = [
    freeu, freeu_changed, lora_scale, lora_off, lora_fused, processor, processor_changed, library_processor_on_text,
    module_attribute, model_config, forward_of_an_instance, method_of_the_pipeline, hook_of_the_text_encoder,
    scheduler_tensor, method_of_the_scheduler, activation,
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*not cached")
@pytest.mark.parametrize("change", CHANGES)
def test_images_never_come_back_after_a_change(tmp_path, change):
    pipe = tiny_sd()
    change(pipe, False)
    before = draw(pipe, cache_dir=tmp_path)
    change(pipe, True)
    assert not torch.equal(draw(pipe), before)  # there is something to see
    assert torch.equal(draw(pipe, cache_dir=tmp_path), draw(pipe))


def test_the_pipelines_own_config_counts(tmp_path):
    pipe = tiny_sdxl()
    before = draw(pipe, cache_dir=tmp_path)
    pipe.register_to_config(force_zeros_for_empty_prompt=False)
    after = draw(pipe, cache_dir=tmp_path)
    assert not torch.equal(after, before) and torch.equal(after, draw(pipe))


@pytest.mark.filterwarnings("ignore:.*not cached")
def test_a_patched_class_counts(tmp_path, monkeypatch):
    pipe = tiny_sd()
    before = draw(pipe, cache_dir=tmp_path)
    monkeypatch.setattr(UNet2DConditionModel, "forward", doubled(UNet2DConditionModel.forward))
    after = draw(pipe, cache_dir=tmp_path)
    assert not torch.equal(after, before) and torch.equal(after, draw(pipe))


def test_a_shift_that_was_set_counts():
    pipe = tiny_flux()
    before = key(of_pipeline(pipe))
    pipe.scheduler.set_shift(7.0)
    assert key(of_pipeline(pipe)) != before


@pytest.mark.slow
@pytest.mark.parametrize("change", ["buffer", "padding side", "chat template", "nothing"])
def test_what_shows_in_no_weight_counts(change):
    pipe = tiny_sd()
    before = key(of_pipeline(pipe))
    if change == "buffer":
        pipe.text_encoder.register_buffer("mine", torch.ones(2), persistent=False)
    elif change == "padding side":
        pipe.tokenizer.padding_side = "left"
    elif change == "chat template":
        pipe.tokenizer.chat_template = "{{ messages }}"
    assert (key(of_pipeline(pipe)) == before) == (change == "nothing")


@pytest.mark.slow
def test_what_changes_no_image_is_found_again(tmp_path):
    pipe = tiny_sdxl()
    pipe.scheduler = EulerDiscreteScheduler.from_config({"beta_schedule": "scaled_linear"})
    first = key(of_pipeline(pipe))
    pipe(PROMPTS[0], num_inference_steps=1, height=16, width=16, output_type="latent")
    pipe.unet.enable_gradient_checkpointing()
    pipe.unet.train()
    pipe.set_progress_bar_config(desc="mine")
    assert key(of_pipeline(pipe)) == first
    defaults = pipe.scheduler.config["_use_default_values"]
    assert len(defaults) > 1
    defaults.reverse()
    assert key(of_pipeline(pipe)) == first
    pipe.save_pretrained(tmp_path / "saved")
    assert key(of_pipeline(ecodiff.load(tmp_path / "saved"))) == first


@pytest.mark.slow
def test_a_picture_in_the_call_counts_by_its_pixels(tmp_path):
    pipe = StableDiffusionImg2ImgPipeline(**tiny_sd().components, requires_safety_checker=False)
    settings = {"num_inference_steps": 2, "strength": 0.5, "progress": False, "cache_dir": tmp_path}
    pixels = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    first = ecodiff.generate(pipe, PROMPTS[:1], [0], image=Image.fromarray(pixels), **settings)
    again = ecodiff.generate(pipe, PROMPTS[:1], [0], image=Image.fromarray(pixels.copy()), **settings)
    assert torch.equal(first, again) and len(list(tmp_path.iterdir())) == 1
    other = ecodiff.generate(pipe, PROMPTS[:1], [0], image=Image.fromarray(255 - pixels), **settings)
    assert not torch.equal(first, other) and len(list(tmp_path.iterdir())) == 2


@pytest.mark.slow
def test_prompts_may_be_mappings_with_pictures(tmp_path):
    pipe = StableDiffusionImg2ImgPipeline(**tiny_sd().components, requires_safety_checker=False)
    pixels = np.random.default_rng(0).integers(0, 255, (2, 16, 16, 3), dtype=np.uint8)
    prompts = [{"prompt": PROMPTS[i], "image": Image.fromarray(pixels[i])} for i in range(2)]
    settings = {"num_inference_steps": 2, "strength": 0.5, "progress": False, "cache_dir": tmp_path}
    together = ecodiff.generate(pipe, prompts, [0, 1], **settings)
    alone = [ecodiff.generate(pipe, [prompts[i]], [i], **settings)[0] for i in range(2)]
    assert (together.int() - torch.stack(alone).int()).abs().max() <= 1


def test_code_of_ones_own_is_named_and_nothing_kept(tmp_path):
    pipe = tiny_sd()
    with pytest.warns(UserWarning, match="not cached: .*callback_on_step_end.*function of one's own"):
        draw(pipe, cache_dir=tmp_path, callback_on_step_end=lambda pipe, i, t, given: given)
    pipe.unet.set_attn_processor(Scaled(0.5))
    with pytest.warns(UserWarning, match=r"not cached: unet\..*processor.*class of one's own \(Scaled\)"):
        draw(pipe, cache_dir=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_pruned_and_smaller_pipelines_are_kept(tmp_path):
    pipe = tiny_sd()
    mask = {name: torch.arange(site.units) > 0 for name, site in ecodiff.find_sites(pipe.unet).items()}
    emptied = {name: torch.zeros_like(keep) if "attn2" in name else keep for name, keep in mask.items()}
    fewer = blocks.remove(pipe, list(blocks.candidates(pipe.unet))[:1])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for number, each in enumerate((pipe, ecodiff.prune(pipe, mask), ecodiff.prune(pipe, emptied), fewer), 1):
            kept = draw(each, cache_dir=tmp_path)
            assert torch.equal(kept, draw(each)) and len(list(tmp_path.iterdir())) == number
        draw(ecodiff.prune(pipe, mask), cache_dir=tmp_path)
    assert len(list(tmp_path.iterdir())) == 4


def test_weights_kept_elsewhere_are_not_kept_under_a_wrong_name(tmp_path):
    from accelerate import cpu_offload

    pipe = tiny_sd()
    expected = draw(pipe)
    cpu_offload(pipe.unet, execution_device="cpu")
    with pytest.warns(UserWarning, match="not cached"):
        assert torch.equal(draw(pipe, cache_dir=tmp_path), expected)


def test_values_are_described_and_addresses_are_not():
    a, b = torch.zeros(2000), torch.zeros(2000)
    b[1000] = 1  # their texts are the same: both are shortened
    assert describe(a) == describe(a.clone()) != describe(b)
    assert describe({"x", "y", "z"}) == describe({"z", "y", "x"})
    assert describe({"a": (1, 2.5, None)}) == describe({"a": [1, 2.5, None]})
    assert describe(np.float64(1.5)) == describe(np.float64(1.5)) and describe(float("nan")) == describe(float("nan"))
    assert describe(torch.nn.functional.gelu) == describe(torch.nn.functional.gelu)
    for own in (lambda x: x, object(), Scaled(1), torch.empty(2, device="meta")):
        with pytest.raises(Undescribed):
            describe([own])


# ---- interrupted runs ----

RUN = {"num_inference_steps": 1, "guidance_scale": 1.0, "batch_size": 1, "target_open": None}


def run(pipe, folder, updates, **call):
    config = LearnConfig(updates=updates, call={"height": 16, "width": 16, **call}, **RUN)
    return ecodiff.learn(pipe, PROMPTS[:1], config, resume_dir=folder, progress=False)


@pytest.mark.slow
def test_a_run_goes_on_whatever_the_order_of_a_set_and_after_a_save(tmp_path):
    pipe = private_copy(tiny_sdxl())
    pipe.scheduler = EulerDiscreteScheduler.from_config({"beta_schedule": "scaled_linear"})
    run(pipe, tmp_path / "run", 1)
    pipe.scheduler.config["_use_default_values"].reverse()
    run(pipe, tmp_path / "run", 2)
    pipe.scheduler.save_pretrained(tmp_path / "scheduler")
    pipe.scheduler = EulerDiscreteScheduler.from_pretrained(tmp_path / "scheduler")
    run(pipe, tmp_path / "run", 3)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, beta_start=0.001)
    with pytest.raises(EcoDiffError, match="another run.*beta_start"):
        run(pipe, tmp_path / "run", 4)


@pytest.mark.slow
def test_a_run_is_told_apart_by_the_pixels_and_numbers_in_its_call(tmp_path):
    pipe = StableDiffusionImg2ImgPipeline(**tiny_sd().components, requires_safety_checker=False)
    pixels = np.zeros((16, 16, 3), dtype=np.uint8)
    config = {**RUN, "num_inference_steps": 2}

    def learn(image, updates):
        settings = LearnConfig(updates=updates, call={"image": image, "strength": 0.5}, **config)
        return ecodiff.learn(pipe, PROMPTS[:1], settings, resume_dir=tmp_path, progress=False)

    learn(Image.fromarray(pixels), 1)
    learn(Image.fromarray(pixels.copy()), 2)
    pixels[8, 8] = 255
    with pytest.raises(EcoDiffError, match="another run"):
        learn(Image.fromarray(pixels), 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["state.safetensors", "teacher.safetensors", "snapshots/000001.safetensors"])
def test_a_flipped_bit_in_a_runs_file_is_a_clear_error(tmp_path, name):
    pipe = tiny_sd()
    run(pipe, tmp_path, 1)
    path = tmp_path / name
    whole = path.read_bytes()
    for place in (20, 60, len(whole) // 2, len(whole) - 2):
        damaged = bytearray(whole)
        damaged[place] ^= 4
        path.write_bytes(damaged)
        with pytest.raises(EcoDiffError, match=r"delete it|another run"):
            run(pipe, tmp_path, 2)
    path.write_bytes(whole)
    run(pipe, tmp_path, 1)
    assert denoiser(pipe) is pipe.unet
