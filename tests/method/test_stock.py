"""Scripts written for stock diffusers classes take pruned models, or are told what to do."""

import copy
import json

import diffusers
import pytest
import torch
from diffusers.training_utils import EMAModel
from test_kept import older, some_and_none
from tiny import latents, tiny_flux, tiny_sd, tiny_sdxl, unet_config

import ecodiff
from ecodiff import EcoDiffError, denoiser, mask_of, prune


def same_weights(one, other):
    other = other.state_dict()
    return all(torch.equal(value, other[name]) for name, value in one.state_dict().items())


@pytest.fixture(scope="module")
def sd():
    pipe = tiny_sd()
    return pipe, prune(pipe, some_and_none(pipe.unet))


@pytest.fixture(scope="module")
def folder(sd, tmp_path_factory):
    path = tmp_path_factory.mktemp("pruned")
    sd[1].save_pretrained(path)
    return path


def test_the_stock_class_reads_a_pruned_folder(sd, folder):
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    assert type(unet) is ecodiff.PrunedUNet2DConditionModel and same_weights(unet, sd[1].unet)
    for options in ({"low_cpu_mem_usage": False, "ignore_mismatched_sizes": True}, {"torch_dtype": torch.float32}):
        assert same_weights(diffusers.UNet2DConditionModel.from_pretrained(folder / "unet", **options), sd[1].unet)
    assert same_weights(diffusers.AutoModel.from_pretrained(str(folder), subfolder="unet"), sd[1].unet)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, unet=unet)
    assert torch.equal(latents(pipe), latents(sd[1]))


def test_a_damaged_pruned_folder_is_an_error_for_the_stock_class_too(sd, tmp_path):
    sd[1].unet.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    name = next(name for name, units in config["pruned_units"].items() if units > 1)
    del config["kept_units"]
    config["pruned_units"][name] -= 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(EcoDiffError, match="do not fit its config.json"):
        diffusers.UNet2DConditionModel.from_pretrained(tmp_path)


def test_dense_models_load_as_ever(sd, tmp_path):
    sd[0].unet.save_pretrained(tmp_path)
    unet = diffusers.UNet2DConditionModel.from_pretrained(tmp_path)
    assert type(unet) is diffusers.UNet2DConditionModel and same_weights(unet, sd[0].unet)
    assert type(diffusers.UNet2DConditionModel.from_config(unet.config)) is diffusers.UNet2DConditionModel


@pytest.mark.parametrize("build", [tiny_sd, tiny_flux])
def test_averaged_weights_are_saved_and_loaded(build, tmp_path):
    pipe = build()
    small = denoiser(prune(pipe, some_and_none(denoiser(pipe))))
    stock = type(denoiser(pipe))
    average = EMAModel(small.parameters(), model_cls=stock, model_config=small.config, decay=0.5)
    average.step(small.parameters())
    average.save_pretrained(tmp_path)
    loaded = stock.from_pretrained(tmp_path)
    assert same_weights(loaded, small)
    again = EMAModel.from_pretrained(tmp_path, stock)
    assert all(torch.equal(a, b) for a, b in zip(again.shadow_params, average.shadow_params, strict=True))


def test_a_deep_copy_is_a_model_of_its_own(sd):
    copied = copy.deepcopy(sd[1].unet)
    assert same_weights(copied, sd[1].unet)
    with torch.no_grad():
        next(copied.parameters()).add_(1)
    assert not same_weights(copied, sd[1].unet)


def controlnet(unet, cls=diffusers.ControlNetModel):
    torch.manual_seed(2)
    model = cls.from_unet(unet, conditioning_embedding_out_channels=(8, 8))
    for parameter in model.controlnet_mid_block.parameters():
        torch.nn.init.normal_(parameter)
    return model.eval()


def test_from_pipe_passes_a_pruned_denoiser_on(sd):
    pipe, small = sd
    for name in ("StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline", "StableDiffusionPAGPipeline"):
        other = getattr(diffusers, name).from_pipe(small)
        assert other.unet is small.unet, name
    assert diffusers.AutoPipelineForImage2Image.from_pipe(small).unet is small.unet
    assert diffusers.AutoPipelineForText2Image.from_pipe(small).unet is small.unet
    assert diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe).unet is pipe.unet


def test_a_controlnet_of_the_original_works_beside_the_pruned_model(sd):
    pipe, small = sd
    control = controlnet(pipe.unet)
    picture = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    guided = diffusers.StableDiffusionControlNetPipeline.from_pipe(small, controlnet=control)
    assert guided.unet is small.unet
    assert not torch.allclose(latents(guided, image=picture), latents(small), atol=1e-3)


def test_a_controlnet_is_made_from_the_original():
    pipe = tiny_sdxl()
    small = prune(pipe, some_and_none(pipe.unet))
    with pytest.raises(EcoDiffError, match="ControlNetModel.from_unet: .* Make it from the original"):
        diffusers.ControlNetModel.from_unet(small.unet)
    flux = tiny_flux()
    small = prune(flux, some_and_none(flux.transformer))
    with pytest.raises(EcoDiffError, match="FluxControlNetModel.from_transformer: .* Make it from the original"):
        diffusers.FluxControlNetModel.from_transformer(small.transformer)


def test_motion_modules_of_the_original_go_between_what_is_left(sd):
    pipe, small = sd
    torch.manual_seed(3)
    config = unet_config()
    adapter = diffusers.MotionAdapter(
        block_out_channels=config["block_out_channels"],
        motion_layers_per_block=config["layers_per_block"],
        motion_norm_num_groups=8,
        motion_num_attention_heads=2,
        motion_max_seq_length=4,
    )
    moving = diffusers.AnimateDiffPipeline.from_pipe(small, motion_adapter=adapter)
    dense = diffusers.AnimateDiffPipeline.from_pipe(pipe, motion_adapter=adapter)
    expected = prune(dense, mask_of(small))
    assert moving.unet.state_dict().keys() == expected.unet.state_dict().keys()
    assert same_weights(moving.unet, expected.unet)
    assert mask_of(moving).keys() == mask_of(small).keys()


def test_a_folder_of_an_earlier_version_is_read_by_the_stock_class(sd, tmp_path):
    sd[1].save_pretrained(tmp_path)
    older(tmp_path, "unet")
    assert same_weights(diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "unet"), sd[1].unet)


OTHER_PROCESS = """
import ecodiff
from diffusers import DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file

pipe = DiffusionPipeline.from_pretrained("me/small")
unet = UNet2DConditionModel.from_pretrained("me/small", subfolder="unet")
again = StableDiffusionPipeline.from_pretrained("me/small", unet=unet)
assert type(pipe.unet) is type(again.unet) is ecodiff.PrunedUNet2DConditionModel
save_file(ecodiff.mask_of(pipe), "mask.safetensors")
save_file(dict(pipe.unet.state_dict()), "unet.safetensors")
save_file(dict(unet.state_dict()), "stock.safetensors")
"""


@pytest.mark.slow
def test_by_hub_id_in_a_new_process(sd, tmp_path):
    from hub import hub, run_elsewhere
    from safetensors.torch import load_file

    sd[1].save_pretrained(tmp_path / "me" / "small")
    with hub(tmp_path) as address:
        run_elsewhere(OTHER_PROCESS, tmp_path, address)
    for file in ("unet", "stock"):
        fetched = load_file(tmp_path / f"{file}.safetensors")
        assert all(torch.equal(value, fetched[name]) for name, value in sd[1].unet.state_dict().items())
    mask = mask_of(sd[1])
    fetched = load_file(tmp_path / "mask.safetensors")
    assert fetched.keys() == mask.keys() and all(torch.equal(fetched[name], mask[name]) for name in mask)
