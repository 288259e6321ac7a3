"""Hard concrete against closed forms and against noise; gates in a running denoiser; λ on disk."""

import math

import pytest
import torch
from safetensors.torch import save_file
from tiny import latents, tiny_flux, tiny_sd3, tiny_sdxl

from ecodiff import EcoDiffError, Gates, HardConcrete, apply_gates, denoiser, find_sites
from ecodiff.method.sites import KINDS

LAMBDA = torch.linspace(-6, 6, 41)
STRATA = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000  # uniform noise without luck


@pytest.mark.parametrize("delta", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("temperature", [0.83, 0.4])
def test_prob_open_is_the_share_of_open_samples(delta, temperature):
    gate = HardConcrete(temperature=temperature, delta=delta)
    share = torch.stack([(gate.sample(value.expand(STRATA.shape), STRATA) > 0).double().mean() for value in LAMBDA])
    assert (gate.prob_open(LAMBDA) - share).abs().max() < 2e-5
    assert torch.allclose(gate.expected_l0(LAMBDA), share.sum().float(), atol=1e-3)


def test_monte_carlo_with_a_generator_agrees_too():
    gate, generator = HardConcrete(delta=0.1), torch.Generator().manual_seed(0)
    z = gate.sample(torch.full((100_000,), -1.0), torch.rand(100_000, generator=generator))
    p = gate.prob_open(torch.tensor(-1.0)).item()
    assert 0.05 < p < 0.95
    assert abs((z > 0).float().mean().item() - p) < 4 * math.sqrt(p * (1 - p) / 100_000)


def test_without_delta_prob_open_is_louizos_formula():
    gate = HardConcrete(delta=0.0)
    expected = torch.sigmoid(LAMBDA - 0.83 * math.log(0.1 / 1.1))
    assert torch.allclose(gate.prob_open(LAMBDA), expected, atol=1e-6)


def test_share_of_gates_at_exactly_one():
    # P(z = 1) mirrors P(z = 0) because gamma and zeta lie symmetrically about 1/2
    gate = HardConcrete(delta=0.1)
    ones = torch.stack([(gate.sample(value.expand(STRATA.shape), STRATA) == 1).double().mean() for value in LAMBDA])
    assert (ones - (1 - gate.prob_open(-LAMBDA))).abs().max() < 2e-5


def test_deterministic_gate_is_the_median():
    gate = HardConcrete()
    median = torch.stack([gate.sample(value.expand(STRATA.shape), STRATA).median() for value in LAMBDA])
    assert (gate.deterministic(LAMBDA) - median).abs().max() < 1e-4


@pytest.mark.parametrize(("delta", "bound"), [(0.5, 3.089), (0.1, 4.388), (0.0, math.inf)])
def test_saturation_is_where_the_gradient_dies(delta, bound):
    gate = HardConcrete(delta=delta)
    assert gate.saturation == pytest.approx(bound, abs=5e-4)
    if bound == math.inf:
        return

    def gradient(value, u):
        log_alpha = torch.tensor(value, requires_grad=True)
        return torch.autograd.grad(gate.sample(log_alpha, u), log_alpha)[0].item()

    least = torch.tensor(0.0)  # the noise that closes most
    assert gradient(gate.saturation + 1e-3, least) == 0
    assert gradient(gate.saturation - 1e-3, least) != 0
    assert gradient(5.0, least) == 0  # the paper's start (App. E)


@pytest.mark.parametrize("delta", [0.1, 0.5])
def test_l0_saturation_is_where_the_closed_form_goes_flat(delta):
    gate = HardConcrete(delta=delta)
    for shift, alive in ((-1e-2, True), (1e-2, False)):
        value = torch.tensor(gate.l0_saturation + shift, requires_grad=True)
        assert (torch.autograd.grad(gate.prob_open(value), value)[0].item() > 0) is alive


def test_low_precision_is_computed_in_fp32():
    gate, value = HardConcrete(), torch.tensor([2.0])
    for result in (
        gate.sample(value.bfloat16(), torch.tensor([0.3], dtype=torch.bfloat16)),
        gate.deterministic(value.bfloat16()),
        gate.prob_open(value.half()),
    ):
        assert result.dtype == torch.float32
    assert torch.equal(gate.deterministic(value.bfloat16()), gate.deterministic(value))


def test_impossible_distribution_is_refused():
    for wrong in ({"gamma": 0.1}, {"zeta": 0.9}, {"temperature": 0}, {"delta": -1}):
        with pytest.raises(EcoDiffError, match="needs temperature"):
            HardConcrete(**wrong)


def test_sample_draws_once_for_all_sites_and_repeats():
    sites = find_sites(tiny_sdxl().unet)
    gates = Gates.start(sites, 0.5)
    first = gates.sample(torch.Generator().manual_seed(7))
    again = gates.sample(torch.Generator().manual_seed(7))
    other = gates.sample(torch.Generator().manual_seed(8))
    assert all(torch.equal(first[name], again[name]) for name in sites)
    assert not all(torch.equal(first[name], other[name]) for name in sites)
    assert len({value.item() for part in first.values() for value in part if 0 < value < 1}) > 500
    sum(part.sum() for part in first.values()).backward()
    assert any(value.grad.abs().sum() > 0 for value in gates.log_alpha.values())


def test_samples_of_several_are_drawn_one_after_the_other():
    gates = Gates.start(find_sites(tiny_sd3().transformer), 0.5)
    together, generator = gates.sample(torch.Generator().manual_seed(7), samples=3), torch.Generator().manual_seed(7)
    for i in range(3):
        one = gates.sample(generator)
        assert all(torch.equal(together[name][i], one[name]) for name in gates.sites)


@pytest.mark.parametrize("build", [tiny_sdxl, tiny_sd3, tiny_flux])
def test_each_sample_of_a_batch_can_have_gates_of_its_own(build):
    pipe = build()
    model = denoiser(pipe)
    gates = Gates.start(find_sites(model, KINDS), 0.5)
    values = {name: value.detach() for name, value in gates.sample(torch.Generator().manual_seed(1), 2).items()}
    with torch.no_grad():
        with apply_gates(model, values):
            both = latents(pipe, n=2)
        for i in range(2):
            with apply_gates(model, {name: value[i] for name, value in values.items()}):
                assert torch.allclose(latents(pipe, n=2)[i], both[i], atol=1e-4)
    assert not torch.allclose(both[0], latents(pipe, n=2)[0], atol=1e-2)
    three = {name: torch.ones(3, site.units) for name, site in gates.sites.items()}
    with pytest.raises(EcoDiffError, match="3 samples have gates of their own"), apply_gates(model, three):
        latents(pipe, n=2)


@pytest.mark.parametrize("build", [tiny_sdxl, tiny_sd3, tiny_flux])
def test_open_gates_change_nothing_and_hooks_go(build):
    pipe = build()
    model = denoiser(pipe)
    before = latents(pipe)
    ones = {name: torch.ones(site.units) for name, site in find_sites(model, KINDS).items()}
    with apply_gates(model, ones):
        assert torch.equal(latents(pipe), before)
    with (
        pytest.raises(RuntimeError, match="on purpose"),
        apply_gates(model, {name: 0 * one for name, one in ones.items()}),
    ):
        assert not torch.allclose(latents(pipe), before)
        raise RuntimeError("on purpose")
    assert torch.equal(latents(pipe), before)
    assert all(not m._forward_pre_hooks and not m._forward_hooks for m in model.modules())


def test_a_head_gate_scales_that_head_of_the_attention_product():
    """Eq. 9: out = W_o [m_1 head_1; ...; m_h head_h] + b, computed by hand."""
    attention = tiny_sdxl().unet.mid_block.attentions[0].transformer_blocks[0].attn1
    block = torch.nn.ModuleDict({"attn": attention})
    x = torch.randn(2, 5, attention.query_dim, generator=torch.Generator().manual_seed(0))
    gate = torch.linspace(0.2, 1, attention.heads)
    q, k, v = (
        layer(x).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
        for layer in (attention.to_q, attention.to_k, attention.to_v)
    )
    heads = torch.softmax(q @ k.mT * attention.scale, -1) @ v * gate[:, None, None]
    expected = attention.to_out[0](heads.transpose(1, 2).flatten(2))
    with torch.no_grad(), apply_gates(block, {"attn": gate}):
        assert torch.allclose(attention(x), expected, atol=1e-6)


def test_gradients_reach_the_gates_through_both_streams():
    model = tiny_flux().transformer
    names = [name for name in find_sites(model) if name.endswith(".attn")]
    assert names
    for site in names[:1]:
        attention = model.get_submodule(site)
        gate = torch.ones(attention.heads, requires_grad=True)
        x, context = torch.randn(1, 6, 64), torch.randn(1, 3, 64)
        with apply_gates(model, {site: gate}):
            image, text = attention(x, context)
        for stream in (image, text):
            (gradient,) = torch.autograd.grad(stream.square().sum(), gate, retain_graph=True)
            assert (gradient.abs() > 0).all()


def test_a_function_is_asked_once_for_each_call_of_a_module():
    pipe = tiny_sd3()
    sites = find_sites(pipe.transformer)
    asked = []

    def draw(name):
        asked.append(name)
        return torch.ones(sites[name].units)

    with apply_gates(pipe.transformer, draw, sites):
        latents(pipe, steps=3)
    assert {name: asked.count(name) for name in sites} == {name: 3 for name in sites}


def test_activations_keep_their_dtype():
    layer = torch.nn.ModuleDict({"ff": tiny_sdxl().unet.mid_block.attentions[0].transformer_blocks[0].ff}).bfloat16()
    gate = torch.full((layer.ff.net[2].in_features,), 0.5)
    x = torch.randn(1, 2, layer.ff.net[0].proj.in_features).bfloat16()
    with torch.no_grad(), apply_gates(layer, {"ff": gate}):
        assert layer.ff(x).dtype == torch.bfloat16


def test_gates_that_do_not_fit_are_refused():
    model = tiny_sdxl().unet
    name = next(iter(find_sites(model)))
    with pytest.raises(EcoDiffError, match="not a site"), apply_gates(model, {"nowhere.attn1": torch.ones(2)}):
        pass
    for wrong in (torch.ones(99), torch.ones(2, 99), torch.ones(0, 1), torch.ones(())):
        with pytest.raises(EcoDiffError, match="units"), apply_gates(model, {name: wrong}):
            pass


@pytest.fixture
def saved(tmp_path):
    model = tiny_sdxl().unet
    gates = Gates.start(find_sites(model), 2.0, HardConcrete(delta=0.1))
    for i, value in enumerate(gates.log_alpha.values()):
        value.data.add_(torch.randn(value.shape, generator=torch.Generator().manual_seed(i)))
    gates.history.append({"update": 1, "loss": 0.25})
    gates.save(tmp_path / "gates.safetensors")
    return gates, model, tmp_path / "gates.safetensors"


def test_gates_come_back_as_they_were(saved):
    gates, model, path = saved
    back = Gates.load(path, model)
    assert list(back.log_alpha) == list(gates.log_alpha)
    assert all(torch.equal(back.log_alpha[name], gates.log_alpha[name]) for name in gates.log_alpha)
    assert (back.distribution, back.history, back.sites) == (gates.distribution, gates.history, gates.sites)
    assert list(path.parent.iterdir()) == [path]


def test_damaged_files_are_refused(saved, tmp_path):
    _, model, path = saved
    content = path.read_bytes()
    changed = {
        "truncated": (content[:-10], "not a readable"),
        "empty": (b"", "not a readable"),
        "weights": (content[:-8] + bytes([content[-8] ^ 1]) + content[-7:], "checksum"),
        "settings": (content.replace(b"0.83", b"0.84"), "checksum"),
    }
    for what, (bytes_, message) in changed.items():
        (tmp_path / what).write_bytes(bytes_)
        with pytest.raises(EcoDiffError, match=message):
            Gates.load(tmp_path / what, model)
    with pytest.raises(EcoDiffError, match="not a readable"):
        Gates.load(tmp_path / "absent", model)
    save_file({"x": torch.ones(1)}, tmp_path / "foreign")
    with pytest.raises(EcoDiffError, match="from_tensors"):
        Gates.load(tmp_path / "foreign", model)


def test_lambda_of_another_model_is_refused(saved):
    gates, _, path = saved
    with pytest.raises(EcoDiffError, match="another model"):
        Gates.load(path, tiny_flux().transformer)
    with pytest.raises(EcoDiffError, match="another model"):
        Gates.load(path, tiny_sdxl(attention_head_dim=(2, 2)).unet)
    with pytest.raises(EcoDiffError, match="no λ for site"):
        Gates(gates.sites, dict(list(gates.log_alpha.items())[1:]))


def test_failed_save_leaves_nothing(saved, tmp_path):
    gates, _, path = saved
    with pytest.raises(EcoDiffError, match="nothing was written"):
        gates.save(tmp_path / "no" / "such" / "folder.safetensors")
    (tmp_path / "taken").mkdir()
    with pytest.raises(EcoDiffError, match="nothing was written"):
        gates.save(tmp_path / "taken")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["gates.safetensors", "taken"]
