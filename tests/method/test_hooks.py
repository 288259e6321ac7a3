"""Hooks act on compiled denoisers, and a hook that never runs is an error; so are settings that would act silently."""

import math
from dataclasses import replace

import pytest
import torch
from diffusers import FluxTransformer2DModel
from tiny import latents, tiny_flux, tiny_sd

from ecodiff.baselines.blocks import errors, left_out
from ecodiff.baselines.deepcache import deepcache
from ecodiff.cost.watch import flops_while
from ecodiff.errors import EcoDiffError
from ecodiff.method.gates import Gates, fresh_gates
from ecodiff.method.generate import generate
from ecodiff.method.hooks import apply_gates
from ecodiff.method.learn import LearnConfig, learn
from ecodiff.method.sites import find_sites, with_flops
from ecodiff.pipelines.forward_hooks import eagerly, hooked, replaced_forward
from ecodiff.pipelines.parts import denoiser
from ecodiff.retraining.config import RetrainConfig
from ecodiff.scores import METHODS, Sampling, obs, wanda

CALL = {"height": 16, "width": 16, "max_sequence_length": 12}
QUICK = LearnConfig(updates=1, batch_size=1, num_inference_steps=2, call=CALL, target_open=None, weight=0.1)
SAMPLING = {"num_inference_steps": 1, "call": CALL, "progress": False}
PROMPTS = ["a red apple"]
DOUBLE, SINGLE = "transformer_blocks.0.attn", "single_transformer_blocks.0.proj_mlp"


def small():
    """FLUX with one block of either kind: quick to compile."""
    pipe = tiny_flux()
    torch.manual_seed(2)
    config = {**pipe.transformer.config, "num_layers": 1, "num_single_layers": 1}
    pipe.transformer = FluxTransformer2DModel.from_config(config).eval()
    return pipe


def half(model):
    """Gates that close every second unit."""
    return {name: (torch.arange(site.units) % 2).float() for name, site in find_sites(model).items()}


def learned(pipe, config=QUICK, **more):
    return learn(pipe, PROMPTS, config, progress=False, **more).log_alpha


def close(a, b):
    return a.keys() == b.keys() and all(torch.allclose(a[name], b[name], rtol=1e-4, atol=1e-6) for name in a)


def whole_in_place(pipe):
    pipe.transformer.compile(backend="eager")


def whole_wrapped(pipe):
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")


def blocks_in_place(pipe):
    pipe.transformer.compile_repeated_blocks(backend="eager")


def blocks_wrapped(pipe):
    for blocks in (pipe.transformer.transformer_blocks, pipe.transformer.single_transformer_blocks):
        blocks[0] = torch.compile(blocks[0], backend="eager")


@pytest.fixture(scope="module")
def eager():
    """What an uncompiled pipeline gives."""
    pipe = small()
    sites = find_sites(pipe.transformer)
    with apply_gates(pipe.transformer, half(pipe.transformer), sites):
        gated = latents(pipe)
    return {
        "plain": latents(pipe),
        "gated": gated,
        "flops": with_flops(pipe.transformer, sites, lambda: latents(pipe, steps=1)),
        "all flops": flops_while(pipe.transformer, lambda: latents(pipe, steps=1)),
        "wanda": wanda(pipe, PROMPTS, **SAMPLING),
        "obs": obs(pipe, PROMPTS, **SAMPLING),
        "learned": learned(pipe),
    }


@pytest.mark.slow
@pytest.mark.parametrize("way", [whole_in_place, whole_wrapped, blocks_in_place, blocks_wrapped])
def test_a_compiled_denoiser_is_gated_scored_counted_and_learned_like_any_other(way, eager):
    pipe = small()
    way(pipe)
    assert torch.allclose(latents(pipe), eager["plain"], atol=1e-5)  # compiled now
    model = denoiser(pipe)
    with apply_gates(model, half(model)):
        assert torch.allclose(latents(pipe), eager["gated"], atol=1e-5)
    assert torch.allclose(latents(pipe), eager["plain"], atol=1e-5)
    assert with_flops(model, find_sites(model), lambda: latents(pipe, steps=1)) == eager["flops"]
    assert flops_while(model, lambda: latents(pipe, steps=1)) == eager["all flops"]
    assert close(wanda(pipe, PROMPTS, **SAMPLING), eager["wanda"])
    assert close(learned(pipe), eager["learned"])


def test_what_was_compiled_is_still_compiled_afterwards():
    compiled = []

    def counting(graph, inputs):
        compiled.append(graph)
        return graph.forward

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(2, 2)

        def forward(self, x):
            return self.layer(x) + 1

    net, x = Net(), torch.ones(1, 2)
    net.compile(backend=counting)
    plain = net(x)
    graphs = len(compiled)
    with hooked(net, "test") as hooks:
        hooks.before("layer", lambda given: 2 * given)
        assert torch.equal(net(x), net.layer.forward(2 * x) + 1)
    assert torch.equal(net(x), plain)
    assert graphs and len(compiled) == graphs
    with eagerly(), eagerly():
        net(torch.ones(3, 2))
    assert len(compiled) == graphs


# Hooks that never run


def bypassed(way):
    """A pipeline whose first attention uses its output layer without calling it."""
    pipe = small()
    attention = pipe.transformer.get_submodule(DOUBLE)
    layer = attention.to_out[0]

    class Around(torch.nn.Module):
        """Stands where the layer is called, while the layer stays where it is named."""

        def forward(self, x):
            return layer.forward(x) if way == "forward" else torch.nn.functional.linear(x, layer.weight, layer.bias)

    original, around = attention.processor, Around()

    class Processor:
        def __call__(self, attn, *args, **kwargs):
            attn.to_out[0] = around
            try:
                return original(attn, *args, **kwargs)
            finally:
                attn.to_out[0] = layer

    attention.processor = Processor()
    return pipe


@pytest.mark.slow
@pytest.mark.parametrize("way", ["forward", "weight"])
def test_a_layer_that_is_used_without_being_called_is_named(way):
    pipe = bypassed(way)
    model = pipe.transformer
    named = f"never ran .* '{DOUBLE}'"
    with pytest.raises(EcoDiffError, match="apply_gates: 1 of .* " + named), apply_gates(model, half(model)):
        latents(pipe, steps=1)
    with pytest.raises(EcoDiffError, match=named):
        with_flops(model, find_sites(model), lambda: latents(pipe, steps=1))
    for method in ("wanda", "taylor", "fisher", "gauss-newton", "obs", "occlusion"):
        with pytest.raises(EcoDiffError, match="never ran"):
            METHODS[method](pipe, PROMPTS, **SAMPLING)
    for objective in ("final", "step"):
        with pytest.raises(EcoDiffError, match="learn: 1 of .* " + named):
            learned(pipe, replace(QUICK, objective=objective))


def test_it_is_named_before_the_second_batch_is_drawn():
    pipe, calls = bypassed("forward"), []
    pipe.transformer.register_forward_hook(lambda *what: calls.append(1))
    with pytest.raises(EcoDiffError, match="learn: .* never ran"):
        learn(pipe, ["a cat", "a pizza", "a rocket"], QUICK, progress=False)
    assert len(calls) == 1 + QUICK.num_inference_steps  # one call on which the sites are tried


@pytest.mark.slow
def test_a_site_that_is_excluded_may_stay_unused():
    pipe = bypassed("weight")
    others = find_sites(pipe.transformer).keys() - {DOUBLE}
    for given in (QUICK, replace(QUICK, objective="step")):
        assert learned(pipe, given, exclude=[DOUBLE]).keys() == others
    for method in ("wanda", "magnitude", "random"):
        assert METHODS[method](pipe, PROMPTS, exclude=(DOUBLE,), **SAMPLING).keys() == others
    with apply_gates(pipe.transformer, {name: half(pipe.transformer)[name] for name in others}):
        latents(pipe, steps=1)
    with pytest.raises(EcoDiffError, match="exclude: 'nowhere' is not a site"):
        learned(pipe, exclude=["nowhere"])


def test_a_site_whose_gates_were_never_drawn_is_named():
    pipe = small()
    block = pipe.transformer.single_transformer_blocks[0]
    layer = block.proj_mlp
    gates = Gates.start(find_sites(pipe.transformer), 1.0)
    original = block.forward

    def around(*args, **kwargs):
        block._modules["proj_mlp"] = torch.nn.Sequential()
        block._modules["proj_mlp"].forward = layer.forward
        try:
            return original(*args, **kwargs)
        finally:
            block._modules["proj_mlp"] = layer

    block.forward = around
    with pytest.raises(EcoDiffError, match=f"never ran .* '{SINGLE}'"):
        with apply_gates(pipe.transformer, fresh_gates(gates, 1), gates.sites, gates.log_alpha.values()):
            latents(pipe, steps=1)


def test_a_block_that_is_skipped_is_named_and_errors_of_the_block_come_first():
    pipe = small()
    values = {SINGLE: half(pipe.transformer)[SINGLE]}
    pipe.transformer.single_transformer_blocks[0].forward = lambda hidden_states, encoder_hidden_states, *a, **k: (
        encoder_hidden_states,
        hidden_states,
    )
    with pytest.raises(EcoDiffError, match="never ran"), apply_gates(pipe.transformer, values):
        latents(pipe, steps=1)
    with pytest.raises(EcoDiffError, match="never ran"), apply_gates(pipe.transformer, values):
        pass
    with pytest.raises(ZeroDivisionError), apply_gates(pipe.transformer, values):
        1 / 0  # noqa: B018
    with apply_gates(pipe.transformer, values, must_run=False):
        latents(pipe, steps=1)


def test_a_layer_that_is_called_by_keyword_is_gated():
    layers = torch.nn.ModuleDict({"ff": small().transformer.transformer_blocks[0].ff})
    gate = torch.linspace(0, 1, layers.ff.net[2].in_features)
    x = torch.randn(1, 3, layers.ff.net[0].proj.in_features)
    hidden = layers.ff.net[0](x)
    with torch.no_grad(), apply_gates(layers, {"ff": gate}):
        assert torch.allclose(layers.ff.net[2](input=hidden), layers.ff.net[2].forward(hidden * gate), atol=1e-6)


def test_a_wrapped_forward_that_is_never_called_is_named():
    model = small().transformer
    with pytest.raises(EcoDiffError, match="was never called"), replaced_forward(model, lambda forward: forward):
        pass
    assert "forward" not in vars(model)
    with pytest.raises(EcoDiffError, match="was never called"):
        flops_while(model, lambda: None)
    block = "transformer_blocks.0"
    with pytest.raises(EcoDiffError, match="was never called"), left_out(model, [block]):
        pass
    assert errors(small(), PROMPTS, [[block]], **SAMPLING)[0] > 0


def test_feature_reuse_of_a_denoiser_that_never_runs_is_named():
    pipe = tiny_sd()
    with pytest.raises(EcoDiffError, match="never"), deepcache(pipe):
        pass
    with deepcache(pipe) as reuse:
        latents(pipe, steps=3)
    assert reuse.reused == 2


# Settings that would act silently


@pytest.mark.slow
def test_the_callers_autocast_and_gradient_mode_do_not_change_what_is_learned(eager):
    pipe = small()
    with torch.autocast("cpu", torch.bfloat16):
        assert close(learned(pipe), eager["learned"])
    with torch.no_grad():
        assert close(learned(pipe), eager["learned"])
    with torch.inference_mode():
        assert close(learned(pipe), eager["learned"])


@pytest.mark.slow
@pytest.mark.parametrize("bad", [0.2, 0.7, "3", None, math.nan, torch.tensor(0.5), 2**64])
def test_seeds_that_are_no_whole_numbers_are_refused(bad):
    for make in (LearnConfig, Sampling, RetrainConfig):
        with pytest.raises(EcoDiffError, match="seed"):
            make(seed=bad)
    with pytest.raises(EcoDiffError, match="seed"):
        generate(small(), PROMPTS, [bad], progress=False)


def test_whole_numbers_of_other_types_are_the_same_seed():
    import numpy

    assert LearnConfig(seed=numpy.int64(3)) == LearnConfig(seed=3)
    assert repr(Sampling(seed=torch.tensor(3)).seed) == "3"


@pytest.mark.slow
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_guidance_that_is_not_finite_is_refused(bad):
    for make in (LearnConfig, Sampling):
        with pytest.raises(EcoDiffError, match="guidance_scale=.* not finite"):
            make(guidance_scale=bad)
        with pytest.raises(EcoDiffError, match="true_cfg_scale=.* not finite"):
            make(call={"true_cfg_scale": bad})
    with pytest.raises(EcoDiffError, match="guidance_scale=.* not finite"):
        generate(small(), PROMPTS, [0], guidance_scale=bad, progress=False)
    with pytest.raises(EcoDiffError, match="true_cfg_scale=.* not finite"):
        generate(small(), PROMPTS, [0], true_cfg_scale=bad, progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("updates", [1, 2])
def test_lambda_that_overflows_in_a_step_is_an_error_and_not_saved(updates, tmp_path, monkeypatch):
    step, done = torch.optim.Adam.step, []

    def overflowing(self, *args, **kwargs):
        result = step(self, *args, **kwargs)
        done.append(1)
        if len(done) == updates:
            self.param_groups[0]["params"][0].data[0] = math.inf
        return result

    monkeypatch.setattr(torch.optim.Adam, "step", overflowing)
    config = replace(QUICK, updates=updates, save_every=1)
    with pytest.raises(EcoDiffError, match=f"Update {updates}: λ after the optimiser's step: not finite") as caught:
        learned(small(), config, resume_dir=tmp_path)
    assert all(value.isfinite().all() for value in caught.value.gates.log_alpha.values())
    assert (tmp_path / "state.safetensors").exists() == (updates > 1)
