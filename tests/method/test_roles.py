"""Sites by role: feed-forwards and attentions that no older family has are found, and removed equals masked in each."""

import copy
import threading

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import Flux2Transformer2DModel, LTXVideoTransformer3DModel, WanTransformer3DModel
from diffusers.models.attention import LuminaFeedForward
from diffusers.models.transformers.auraflow_transformer_2d import AuraFlowFeedForward
from diffusers.models.transformers.sana_transformer import GLUMBConv
from diffusers.models.transformers.transformer_flux2 import Flux2FeedForward
from diffusers.models.transformers.transformer_kandinsky import Kandinsky5FeedForward
from diffusers.models.transformers.transformer_krea2 import Krea2Attention, Krea2SwiGLU
from diffusers.models.transformers.transformer_sana_video import GLUMBTempConv
from diffusers.models.transformers.transformer_sana_wm import GLUMBConvTemp
from tiny import random_mask, trained
from torch import nn

from ecodiff import EcoDiffError, find_sites, make_mask, skipped_modules
from ecodiff.method.hooks import apply_gates
from ecodiff.method.pruned import SelectedNorm, cut_units
from ecodiff.method.roles import feed_forward_roles
from ecodiff.method.surgery import prune_denoiser
from ecodiff.method.trial import failing_sites


class Blocks(nn.Module):
    """A network of one numbered block that holds one module."""

    def __init__(self, module):
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"part": module})])

    def forward(self, x):
        return self.blocks[0]["part"](x)


class Pairs(nn.Module):
    """A gated feed-forward whose layer writes value and gate of each neuron side by side."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(8, 24), nn.Linear(12, 8)

    def forward(self, x):
        value, gate = self.first(x).unflatten(-1, (-1, 2)).unbind(-1)
        return self.last(value * gate.sigmoid())


class Mixing(nn.Module):
    """Neurons are divided by the size of all of them, so that none can go without changing the others."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x):
        hidden = self.first(x)
        return self.last(hidden / hidden.norm(dim=-1, keepdim=True))


FEED_FORWARDS = {
    "lumina": lambda: LuminaFeedForward(8, 16, multiple_of=4),
    "auraflow": lambda: AuraFlowFeedForward(8, 12),
    "flux2": lambda: Flux2FeedForward(8),
    "kandinsky5": lambda: Kandinsky5FeedForward(8, 20),
    "krea2": lambda: Krea2SwiGLU(8, 12),
    "pairs": Pairs,
}


@pytest.mark.parametrize("name", FEED_FORWARDS)
def test_a_feed_forward_is_known_by_what_it_does(name):
    torch.manual_seed(0)
    model = Blocks(FEED_FORWARDS[name]())
    (site,) = find_sites(model).values()
    assert (site.name, site.kind) == ("blocks.0.part", "feed_forward")
    x, keep = torch.randn(2, 3, 8), torch.arange(site.units) % 3 > 0
    whole = model(x)
    with apply_gates(model, {site.name: keep}):
        masked = model(x)
    before = sum(parameter.numel() for parameter in model.parameters())
    cut_units(model, {site.name: site}, {site.name: keep})
    assert before - sum(p.numel() for p in model.parameters()) == int((~keep).sum()) * site.params_per_unit
    torch.testing.assert_close(model(x), masked)
    assert (whole - masked).abs().max() > 1e-4


@pytest.mark.parametrize("form", ["sana", "sana with a norm", "sana video", "sana wm"])
def test_a_channel_through_a_depthwise_convolution_is_a_neuron(form):
    torch.manual_seed(0)
    feed_forward, inputs = {
        "sana": lambda: (GLUMBConv(6, 6, 2), (torch.randn(2, 6, 3, 4),)),
        "sana with a norm": lambda: (GLUMBConv(6, 6, 2, norm_type="rms_norm"), (torch.randn(2, 6, 3, 4),)),
        "sana video": lambda: (GLUMBTempConv(6, 6, 2), (torch.randn(2, 2, 3, 4, 6),)),
        "sana wm": lambda: (GLUMBConvTemp(6, 12, use_bias=(True, True, True)), (torch.randn(2, 24, 6), (2, 3, 4))),
    }[form]()
    model = Blocks(feed_forward)
    run = feed_forward.eval()
    (site,) = find_sites(model).values()
    assert (site.units, len(site.writers)) == (12, 4)
    for kept in (7, site.min_units):
        keep = torch.arange(site.units) % 12 < kept
        small = copy.deepcopy(model)
        with torch.no_grad(), apply_gates(model, {site.name: keep}):
            masked = run(*inputs)
        cut_units(small, {site.name: site}, {site.name: keep})
        removed = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in small.parameters())
        assert removed == int((~keep).sum()) * site.params_per_unit
        with torch.no_grad():
            torch.testing.assert_close(small.blocks[0]["part"](*inputs), masked, rtol=1e-4, atol=1e-5)
            assert (run(*inputs) - masked).abs().max() > 1e-4


class Block(nn.Module):
    """A block whose feed-forward has no module of its own."""

    def __init__(self):
        super().__init__()
        self.attn = Krea2Attention(48, num_heads=3, num_kv_heads=3)
        self.ff_in, self.ff_out = nn.Linear(48, 160), nn.Linear(80, 48)

    def forward(self, x):
        value, gate = self.ff_in(x + self.attn(x)).chunk(2, dim=-1)
        return self.ff_out(value * gate.sigmoid())


def test_a_feed_forward_without_a_module_of_its_own():
    torch.manual_seed(0)
    model = nn.ModuleDict({"blocks": nn.ModuleList([Block()])})
    model.forward = lambda x: model["blocks"][0](x)
    sites = find_sites(model)
    site = sites["blocks.0.ff_out"]
    assert (site.kind, site.units, len(site.writers)) == ("feed_forward", 80, 2)
    x = torch.randn(1, 4, 48)
    keep = {name: torch.arange(site.units) % 3 > 0 for name, site in sites.items()}
    with apply_gates(model, keep):
        masked = model(x)
    cut_units(model, sites, keep)
    torch.testing.assert_close(model(x), masked)


def test_neurons_that_depend_on_each_other_are_no_site_and_are_named():
    assert feed_forward_roles(Mixing()) is None
    assert not find_sites(Blocks(Mixing()))
    assert "one by one" in skipped_modules(Blocks(Mixing()))["blocks.0.part"]


def test_roles_are_found_while_a_model_is_loaded_in_another_dtype():
    """diffusers makes models on the meta device, in the dtype of their weights."""
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        with init_empty_weights():
            model = Blocks(Krea2SwiGLU(8, 36))
            sites = find_sites(model)
    finally:
        torch.set_default_dtype(default)
    assert [site.units for site in sites.values()] == [36]


class PackedExperts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up, self.down = nn.Parameter(torch.zeros(2, 8, 24)), nn.Parameter(torch.zeros(2, 12, 8))


def test_what_is_not_reached_is_named_the_largest_first():
    odd = nn.ModuleDict(
        {
            "attention": nn.MultiheadAttention(4, 2),
            "experts": PackedExperts(),
            "mixing": Blocks(Mixing()),
            "fine": Blocks(Krea2SwiGLU(8, 12)),
        }
    )
    assert list(skipped_modules(odd)) == ["experts", "mixing.blocks.0.part", "attention"]
    assert "packed" in skipped_modules(odd)["experts"]


def test_looking_for_roles_leaves_random_numbers_as_they_are():
    model = Blocks(Krea2SwiGLU(8, 28))
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    assert find_sites(model)
    assert torch.equal(torch.rand(3), expected)


def flux2():
    model = Flux2Transformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=32,
        timestep_guidance_channels=256,
        axes_dims_rope=[4, 4, 4, 4],
    )
    places = torch.cartesian_prod(*[torch.arange(n) for n in (1, 4, 4, 1)])[None]
    return model, {
        "hidden_states": torch.randn(1, 16, 4),
        "encoder_hidden_states": torch.randn(1, 5, 32),
        "img_ids": places,
        "txt_ids": torch.zeros(1, 5, 4, dtype=torch.long),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([1.0]),
    }


def wan():
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=3,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=20,
        num_layers=2,
        rope_max_seq_len=32,
    )
    return model, {
        "hidden_states": torch.randn(1, 4, 2, 4, 4),
        "encoder_hidden_states": torch.randn(1, 5, 16),
        "timestep": torch.tensor([500]),
    }


def ltx():
    model = LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=3,
        attention_head_dim=8,
        cross_attention_dim=24,
        num_layers=1,
        caption_channels=16,
    )
    return model, {
        "hidden_states": torch.randn(1, 2 * 3 * 3, 4),
        "encoder_hidden_states": torch.randn(1, 5, 16),
        "timestep": torch.tensor([500.0]),
        "encoder_attention_mask": torch.ones(1, 5, dtype=torch.bool),
        "num_frames": 2,
        "height": 3,
        "width": 3,
    }


DENOISERS = {"flux2": flux2, "wan": wan, "ltx": ltx}


@pytest.fixture(params=DENOISERS)
def called(request):
    """A denoiser, and a function that runs one for the same input."""
    torch.manual_seed(0)
    model, inputs = DENOISERS[request.param]()

    def run(network):
        with torch.no_grad():
            return network(**inputs, return_dict=False)[0]

    return trained(model), run


def test_removed_is_masked_also_saved_and_pruned_again(called, tmp_path):
    model, run = called
    sites = find_sites(model)
    reached = sum(site.units * site.params_per_unit for site in sites.values())
    assert reached > 0.2 * sum(parameter.numel() for parameter in model.parameters())
    assert failing_sites(model, sites, lambda: run(model)) == {}
    mask = random_mask(model, seed=2)
    with apply_gates(model, mask):
        masked = run(model)
    pruned = prune_denoiser(model, mask)
    torch.testing.assert_close(run(pruned), masked, rtol=1e-4, atol=1e-4)
    assert (run(model) - masked).abs().max() > 1e-3

    pruned.save_pretrained(tmp_path)
    loaded = type(pruned).from_pretrained(tmp_path)
    assert torch.equal(run(loaded), run(pruned))

    left = find_sites(loaded)
    again = {name: torch.arange(site.units) < max(site.units - 1, site.min_units) for name, site in left.items()}
    with apply_gates(loaded, again):
        masked = run(loaded)
    torch.testing.assert_close(run(prune_denoiser(loaded, again)), masked, rtol=1e-4, atol=1e-4)


def test_what_a_norm_over_all_heads_sees_stays(called):
    model, _ = called
    if isinstance(model, Flux2Transformer2DModel):
        pytest.skip("its norms see one head at a time")
    sites = {name: site for name, site in find_sites(model).items() if site.kind == "attention"}
    mask = {name: torch.arange(site.units) != 1 for name, site in sites.items()}
    pruned = prune_denoiser(model, mask)
    name = next(iter(sites))
    attention, before = pruned.get_submodule(name), model.get_submodule(name)
    assert attention.to_q.out_features == before.to_q.out_features
    assert attention.to_v.out_features == before.to_v.out_features * 2 // 3
    assert isinstance(attention.norm_q, SelectedNorm) and attention.heads == 2


def test_a_site_that_must_keep_a_unit_keeps_its_best(called):
    model, _ = called
    sites = find_sites(model)
    scores = {name: torch.arange(site.units).float() for name, site in sites.items()}
    mask = make_mask(scores, sites, 0.99, scope="local")
    for name, site in sites.items():
        if site.min_units:
            assert mask[name][-1] and mask[name].sum() == 1
    name = next((name for name, site in sites.items() if site.min_units), None)
    if name is None:
        return  # it is known what each of its modules returns without units
    with pytest.raises(EcoDiffError, match=f"'{name}' must keep at least 1 unit"):
        prune_denoiser(model, {name: torch.zeros(sites[name].units, dtype=torch.bool)})


def test_the_channels_that_a_saved_norm_returns_are_checked(tmp_path):
    torch.manual_seed(0)
    model, _ = wan()
    pruned = prune_denoiser(model, random_mask(model, seed=2))
    norm = next(module for module in pruned.modules() if isinstance(module, SelectedNorm))
    norm.index[0] = norm.index[1]
    pruned.save_pretrained(tmp_path)
    with pytest.raises(EcoDiffError, match="two in one place"):
        type(pruned).from_pretrained(tmp_path)


def test_an_output_gate_and_shared_key_heads_go_with_their_heads():
    torch.manual_seed(0)
    model = Blocks(Krea2Attention(48, num_heads=6, num_kv_heads=3))
    (site,) = find_sites(model).values()
    assert (site.units, site.unit_size) == (3, 16)
    assert {span.layer.rpartition(".")[2]: span.size for span in site.writers} == {
        "to_q": 16,
        "to_k": 8,
        "to_v": 8,
        "to_gate": 16,
    }
    x, keep = torch.randn(2, 5, 48), torch.tensor([True, False, True])
    with apply_gates(model, {site.name: keep}):
        masked = model(x)
    cut_units(model, {site.name: site}, {site.name: keep})
    torch.testing.assert_close(model(x), masked)


class FixedWidth(Krea2Attention):
    """Reshapes by a number that nobody knows to belong to its heads."""

    def forward(self, x):
        return super().forward(x.reshape(*x.shape[:2], self.all_channels)) + 0 * self.to_q(x).view(
            *x.shape[:2], self.all_channels
        ).sum(-1, keepdim=True)


def test_a_module_that_cannot_lose_a_unit_is_found_before_anything_is_learned():
    torch.manual_seed(0)
    attention = FixedWidth(48, 6, 6)
    attention.all_channels = 48
    model = Blocks(attention)
    sites = find_sites(model)
    failing = failing_sites(model, sites, lambda: model(torch.randn(1, 4, 48)))
    assert list(failing) == ["blocks.0.part"] and "with 5 of its 6 units it does not run" in failing["blocks.0.part"]


class Like(nn.Module):
    """Something like an attention, with some of its parts."""

    def __init__(self, heads=2, **parts):
        super().__init__()
        if heads is not None:
            self.heads = heads
        for name, part in parts.items():
            setattr(self, name, part)


def test_what_looks_like_an_attention_and_is_none_is_named():
    reads = nn.ModuleList([nn.Linear(8, 8), nn.Dropout()])
    odd = {
        "queries": Like(to_q=None, to_k=nn.Linear(8, 8), to_v=nn.Linear(8, 8), to_out=reads),
        "output layer": Like(pre_only=True, qkv=nn.Linear(8, 24)),
        "how many heads": Like(heads=None, qkv=nn.Linear(8, 24), to_out=nn.Linear(8, 8)),
    }
    assert not find_sites(nn.ModuleDict(odd))
    for word, reason in skipped_modules(nn.ModuleDict(odd)).items():
        assert word in reason


@pytest.mark.parametrize("held", [threading.Lock(), torch.ones(2, requires_grad=True) * 2], ids=["lock", "no leaf"])
def test_a_module_that_cannot_be_copied_is_not_judged(held):
    feed_forward = Krea2SwiGLU(8, 12)
    feed_forward.held = held
    model = Blocks(feed_forward)
    sites = find_sites(model)
    assert sites and failing_sites(model, sites, lambda: model(torch.randn(1, 3, 8))) == {}
