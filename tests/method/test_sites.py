"""Sites of full-size models on the meta device, and of whatever else diffusers builds from the same parts."""

import pytest
import torch
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from tiny import SDXL, TINY, full_size, latents, parameters

from ecodiff import EcoDiffError, denoiser, find_sites, skipped_modules, with_flops
from ecodiff.method.sites import KINDS, network_order

SD1 = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
SD2 = {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True}
SD35_LARGE = {
    "num_layers": 38,
    "attention_head_dim": 64,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "qk_norm": "rms_norm",
}


def totals(model):
    """{kind: (sites, units)}"""
    sites = find_sites(model, KINDS).values()
    groups = {kind: [site for site in sites if site.kind == kind] for kind in KINDS}
    return {kind: (len(group), sum(site.units for site in group)) for kind, group in groups.items()}


def removable(model, kind):
    return sum(site.units * site.params_per_unit for site in find_sites(model, (kind,)).values())


def test_full_size_sdxl():
    unet = full_size("UNet2DConditionModel", **SDXL)
    assert parameters(unet) == 2_567_463_684
    assert totals(unet) == {"attention": (140, 2600), "feed_forward": (70, 332_800), "modulation": (0, 0)}
    assert removable(unet, "attention") / parameters(unet) == pytest.approx(0.372, abs=5e-4)
    assert removable(unet, "feed_forward") / parameters(unet) == pytest.approx(0.479, abs=5e-4)
    assert not skipped_modules(unet)


def test_full_size_sd1_and_sd2():
    expected = {"attention": (32, 256), "feed_forward": (16, 49_920), "modulation": (0, 0)}
    assert totals(full_size("UNet2DConditionModel", **SD1)) == expected
    unet = full_size("UNet2DConditionModel", **SD2)
    assert parameters(unet) == 865_910_724
    assert totals(unet) == {**expected, "attention": (32, 2 * (5 * 5 + 5 * 10 + 5 * 20 + 20))}


def test_full_size_flux():
    transformer = full_size("FluxTransformer2DModel")
    assert parameters(transformer) == 11_891_178_560
    assert totals(transformer) == {
        "attention": (19 + 38, 57 * 24),
        "feed_forward": (2 * 19 + 38, 76 * 12_288),
        "modulation": (2 * 19 + 38, 38 * 6 * 3072 + 38 * 3 * 3072),
    }
    assert removable(transformer, "modulation") / parameters(transformer) == pytest.approx(0.2715, abs=5e-4)
    sites = find_sites(transformer, KINDS)
    double, single = sites["transformer_blocks.0.attn"], sites["single_transformer_blocks.0.attn"]
    assert [span.layer.removeprefix("transformer_blocks.0.attn.") for span in double.readers] == [
        "to_out.0",
        "to_add_out",
    ]
    assert len(double.writers) == 6 and len(single.writers) == 3
    neurons = sites["single_transformer_blocks.0.proj_mlp"]
    assert single.readers[0].layer == neurons.readers[0].layer == "single_transformer_blocks.0.proj_out"
    assert (single.readers[0].offset, neurons.readers[0].offset) == (0, 3072)
    assert not skipped_modules(transformer)


@pytest.mark.slow
def test_full_size_sd35():
    transformer = full_size("SD3Transformer2DModel", **SD35_LARGE)
    found = totals(transformer)
    assert found["attention"] == (38, 38 * 38)
    assert found["feed_forward"] == (2 * 38 - 1, 75 * 4 * 2432)  # the last block's text stream ends in its attention
    last = find_sites(transformer)["transformer_blocks.37.attn"]
    assert len(last.writers) == 6 and len(last.readers) == 1


def test_order_is_that_of_the_modules():
    for build in TINY.values():
        model = denoiser(build())
        names = [name for name, _ in model.named_modules()]
        found = list(find_sites(model, KINDS))
        assert found == sorted(found, key=names.index)
        assert {site.kind for site in find_sites(model).values()} == {"attention", "feed_forward"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "attention", "feed_forward"),
    [
        ("PixArtTransformer2DModel", 56, 28),
        ("DiTTransformer2DModel", 28, 28),
        ("HunyuanVideoTransformer3DModel", 62, 82),
        ("StableAudioDiTModel", 48, 24),
    ],
)
def test_other_models_of_the_same_parts(name, attention, feed_forward):
    found = totals(full_size(name))
    assert (found["attention"][0], found["feed_forward"][0]) == (attention, feed_forward)


def test_what_cannot_be_cut_exactly_is_skipped_and_says_why():
    sana = full_size("SanaTransformer2DModel", num_layers=1)
    assert totals(sana)["attention"][0] == 2
    assert not skipped_modules(sana)

    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = Attention(16, heads=2, dim_head=8)
            self.attn.to_mix = torch.nn.Linear(16, 16)
            self.fused = Attention(16, heads=2, dim_head=8)
            self.fused.fused_projections = True
            self.ff = FeedForward(16)
            self.ff.net[0].proj = torch.nn.Sequential(self.ff.net[0].proj)

    assert not find_sites(Odd())
    reasons = skipped_modules(Odd())
    assert "to_mix" in reasons["attn"] and "fused" in reasons["fused"] and "adapters" in reasons["ff"]


def test_shared_key_heads_make_one_unit_with_their_query_heads():
    model = torch.nn.ModuleDict({"attn": Attention(32, heads=6, kv_heads=2, dim_head=8)})
    site = find_sites(model)["attn"]
    assert (site.units, site.unit_size) == (2, 24)
    assert {span.layer: span.size for span in site.writers} == {"attn.to_q": 24, "attn.to_k": 8, "attn.to_v": 8}


def test_unknown_kind():
    with pytest.raises(EcoDiffError, match="norm"):
        find_sites(torch.nn.Linear(1, 1), ("norm",))


def test_flops_of_a_unit_against_a_count_by_hand():
    pipe = TINY["sdxl"]()
    sites = find_sites(pipe.unet)
    measured = with_flops(pipe.unet, sites, lambda: latents(pipe, steps=1))
    name = "mid_block.attentions.0.transformer_blocks.0."
    batch, tokens, text, width, head = 2, 16, 12, 32, 8
    self_attention = 2 * tokens * 4 * width * head + 4 * tokens * tokens * head
    cross = 2 * head * (tokens * 2 * width + text * 2 * 64) + 4 * tokens * text * head
    assert measured[name + "attn1"].flops_per_unit == batch * self_attention
    assert measured[name + "attn2"].flops_per_unit == batch * cross
    assert measured[name + "ff"].flops_per_unit == batch * 2 * tokens * 3 * width
    assert all(not module._forward_pre_hooks for module in pipe.unet.modules())


def test_network_order_goes_from_input_to_output():
    """diffusers names a U-Net's middle block after its up blocks, and FLUX's single blocks follow the double ones."""
    names = ["up_blocks.0.a.0.attn1", "mid_block.a.0.ff", "down_blocks.10.a.0.ff", "down_blocks.2.a.0.ff"]
    assert sorted([*names, "down_blocks.2.a.0.attn2"], key=network_order) == [
        "down_blocks.2.a.0.attn2", "down_blocks.2.a.0.ff", "down_blocks.10.a.0.ff", "mid_block.a.0.ff",
        "up_blocks.0.a.0.attn1",
    ]  # fmt: skip
    flux = ["single_transformer_blocks.0.attn", "transformer_blocks.1.attn", "transformer_blocks.0.ff"]
    assert sorted(flux, key=network_order) == flux[::-1]
