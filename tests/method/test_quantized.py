"""Pruned pipelines quantised as diffusers quantises any other, where torchao is installed."""

import diffusers
import pytest
import torch
from diffusers import PipelineQuantizationConfig
from tiny import latents, random_mask, tiny_flux, tiny_sd

import ecodiff
from ecodiff import EcoDiffError, denoiser, find_sites, mask_of, prune

torchao = pytest.importorskip("torchao.quantization")


def some_and_none(model):
    """Every third site loses all its units, where it can be without any, and the others half of theirs."""
    mask = {}
    for number, (name, site) in enumerate(find_sites(model).items()):
        kept = max(site.units // 2, 1)
        if number % 3 == 0:
            kept = site.min_units
        mask[name] = torch.arange(site.units) < kept
    return mask


@pytest.mark.parametrize("build", [tiny_sd, tiny_flux])
def test_a_pruned_folder_is_quantised_as_it_loads_and_saved_so(build, tmp_path):
    pipe = build()
    small = prune(pipe, some_and_none(denoiser(pipe)))
    small.save_pretrained(tmp_path / "small")
    component = "unet" if hasattr(pipe, "unet") else "transformer"
    how = diffusers.TorchAoConfig(torchao.Int8WeightOnlyConfig())
    quantised = ecodiff.load(
        tmp_path / "small",
        quantization_config=PipelineQuantizationConfig(quant_mapping={component: how}),
        torch_dtype=torch.float32,
    )
    layers = [module for module in denoiser(quantised).modules() if isinstance(module, torch.nn.Linear)]
    assert any(layer.weight.__class__.__name__ == "Int8Tensor" for layer in layers)
    mask = mask_of(small)
    assert mask_of(quantised).keys() == mask.keys()
    expected, found = latents(small), latents(quantised)
    # Rounding to 8 bits moves what is drawn, by little beside what another mask would.
    assert 0 < (expected - found).abs().max() < 0.02 * expected.abs().max()

    quantised.save_pretrained(tmp_path / "again")
    again = ecodiff.load(tmp_path / "again", torch_dtype=torch.float32)
    assert torch.equal(latents(again), found)


def test_what_is_quantised_is_not_pruned():
    pipe = tiny_sd()
    mask = random_mask(pipe.unet)
    torchao.quantize_(pipe.unet, torchao.Int8WeightOnlyConfig())
    with pytest.raises(EcoDiffError, match="quantised: prune the original, and quantise what is left"):
        prune(pipe, mask)
