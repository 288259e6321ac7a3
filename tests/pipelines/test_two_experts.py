"""Pipelines with several denoisers, such as Wan 2.2: all of them are gated, learned, scored, pruned, saved, counted."""

import copy

import pytest
import torch
from tiny import PROMPTS, TOKENS, tiny_wan

import ecodiff
from ecodiff.cost.counting import cost
from ecodiff.errors import EcoDiffError
from ecodiff.method.sites import with_flops
from ecodiff.method.surgery import fold_gates
from ecodiff.method.trajectory import final_latents
from ecodiff.pipelines.parts import denoiser, experts, with_denoiser
from ecodiff.scores import METHODS, obs, prune_adapted

# The boundary lies at t = 600 of 1000: of three steps (t = 1000, 500, 1) the first expert makes one, the second two.
CALL = {"height": 16, "width": 16, "num_frames": 5, "max_sequence_length": TOKENS}


@pytest.fixture(scope="module")
def wan():
    return tiny_wan()


def drawn(pipe, prompts=PROMPTS[:2], **more):
    generator = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    with torch.no_grad():
        return final_latents(
            pipe, prompts, gradients=False, num_inference_steps=3, guidance_scale=2.0, generator=generator,
            **{**CALL, **more},
        )  # fmt: skip


def config(**more):
    settings = {"updates": 2, "batch_size": 2, "num_inference_steps": 3, "guidance_scale": 2.0, "call": CALL}
    return ecodiff.LearnConfig(**{**settings, **more})


SAMPLING = {"num_inference_steps": 3, "guidance_scale": 2.0, "call": CALL, "progress": False, "batch_size": 2}


def both(names):
    """Whether names of sites of both experts are there."""
    return {name.startswith("transformer_2.") for name in names} == {True, False}


def a_mask(pipe, keep=lambda units: torch.arange(units) % 3 > 0):
    return {name: keep(site.units) for name, site in ecodiff.find_sites(denoiser(pipe)).items()}


def test_sites_of_the_second_are_named_after_its_component(wan):
    sites = ecodiff.find_sites(denoiser(wan))
    first, second = ecodiff.find_sites(wan.transformer), ecodiff.find_sites(wan.transformer_2)
    assert list(sites) == [*first, *(f"transformer_2.{name}" for name in second)]
    network = denoiser(wan)
    for name, site in sites.items():
        owner = wan.transformer_2 if name.startswith("transformer_2.") else wan.transformer
        assert network.get_submodule(name) is owner.get_submodule(name.removeprefix("transformer_2."))
        assert all(network.get_submodule(span.layer).weight is not None for span in site.writers + site.readers)
    assert dict(network.named_parameters()).keys() == {
        *dict(wan.transformer.named_parameters()),
        *(f"transformer_2.{name}" for name, _ in wan.transformer_2.named_parameters()),
    }


def test_an_expert_that_is_never_called_is_none():
    assert denoiser(pipe := tiny_wan(boundary_ratio=None)) is pipe.transformer
    assert denoiser(pipe := tiny_wan(second=False)) is pipe.transformer
    assert experts(denoiser(tiny_wan()))[0] is not None


def test_gates_change_both_and_checkpointing_is_exact(wan):
    network = denoiser(wan)
    sites = ecodiff.find_sites(network)
    found = []
    for checkpoint in (True, False):
        gates = {name: torch.full((site.units,), 0.7, requires_grad=True) for name, site in sites.items()}
        with ecodiff.apply_gates(network, gates, sites):
            latents = final_latents(
                wan, PROMPTS[:1], checkpoint=checkpoint, keep_last=0, num_inference_steps=3, guidance_scale=2.0,
                generator=torch.Generator().manual_seed(0), **CALL,
            )  # fmt: skip
            latents.square().mean().backward()
        found.append(gates)
    for name in sites:
        assert found[0][name].grad.abs().sum() > 0
        assert torch.equal(found[0][name].grad, found[1][name].grad)


@pytest.mark.parametrize("alone", ["transformer", "transformer_2"])
def test_gates_on_one_expert_alone_get_gradients_too(wan, alone):
    network = getattr(wan, alone)
    gates = {n: torch.full((s.units,), 0.7, requires_grad=True) for n, s in ecodiff.find_sites(network).items()}
    with ecodiff.apply_gates(network, gates):
        final_latents(
            wan, PROMPTS[:1], keep_last=0, num_inference_steps=3, guidance_scale=2.0,
            generator=torch.Generator().manual_seed(0), **CALL,
        ).square().mean().backward()  # fmt: skip
    assert all(gate.grad.abs().sum() > 0 for gate in gates.values())


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"gate_draw": "trajectory"}, {"objective": "step"}, {"checkpoint": False}])
def test_learning_moves_gates_of_both(wan, more):
    gates = ecodiff.learn(wan, PROMPTS[:2], config(**more), progress=False)
    assert both(gates.log_alpha)
    assert all((value != 3.0).all() for value in gates.log_alpha.values())


@pytest.mark.slow
def test_learning_goes_on_after_an_interruption(wan, tmp_path):
    shorter, longer = config(updates=1, target_open=None), config(updates=2, target_open=None)
    whole = ecodiff.learn(wan, PROMPTS[:2], longer, progress=False)
    ecodiff.learn(wan, PROMPTS[:2], shorter, progress=False, resume_dir=tmp_path)
    rest = ecodiff.learn(wan, PROMPTS[:2], longer, progress=False, resume_dir=tmp_path)
    assert all(torch.equal(whole.log_alpha[name], rest.log_alpha[name]) for name in whole.log_alpha)
    other = tiny_wan()
    other.transformer_2.proj_out.bias.data += 1
    with pytest.raises(EcoDiffError, match="another run"):
        ecodiff.learn(other, PROMPTS[:2], longer, progress=False, resume_dir=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_scores_both(wan, method):
    scores = METHODS[method](wan, PROMPTS[:2], **SAMPLING)
    sites = ecodiff.find_sites(denoiser(wan))
    assert scores.keys() == sites.keys()
    assert all(value.abs().sum() > 0 for value in scores.values())
    mask = ecodiff.make_mask(scores, sites, 0.25)
    assert sum(int((~keep).sum()) for keep in mask.values()) > 0


def test_pruned_is_masked_saved_and_loaded(wan, tmp_path):
    mask = a_mask(wan)
    before = drawn(wan)
    with ecodiff.apply_gates(denoiser(wan), mask):
        masked = drawn(wan)
    small = ecodiff.prune(wan, mask)
    assert torch.equal(drawn(wan), before) and not torch.allclose(masked, before, atol=1e-3)
    assert torch.allclose(drawn(small), masked, atol=1e-5)
    for name in ("transformer", "transformer_2"):
        sizes = [sum(p.numel() for p in getattr(pipe, name).parameters()) for pipe in (wan, small)]
        assert sizes[1] < sizes[0]
        assert type(getattr(small, name)).__name__ == "PrunedWanTransformer3DModel"
    small.save_pretrained(tmp_path / "small")
    assert torch.equal(drawn(ecodiff.load(tmp_path / "small")), drawn(small))


def test_a_mask_of_one_expert_leaves_the_other_whole(wan):
    mask = {name: keep for name, keep in a_mask(wan).items() if name.startswith("transformer_2.")}
    small = ecodiff.prune(wan, mask)
    assert [find_units(part) for part in experts(denoiser(small))][0] == find_units(wan.transformer)
    assert find_units(small.transformer_2) != find_units(wan.transformer_2)
    with pytest.raises(EcoDiffError, match="transformer_2.nothing"):
        ecodiff.prune(wan, {"transformer_2.nothing": torch.ones(3, dtype=torch.bool)})


def find_units(network):
    return {name: site.units for name, site in ecodiff.find_sites(network).items()}


def test_gates_are_saved_loaded_and_folded(wan, tmp_path):
    sites = ecodiff.find_sites(denoiser(wan))
    log_alpha = {name: torch.linspace(-1, 2, site.units) for name, site in sites.items()}
    gates = ecodiff.Gates.from_tensors(log_alpha, denoiser(wan))
    gates.save(tmp_path / "gates.safetensors")
    again = ecodiff.Gates.load(tmp_path / "gates.safetensors", denoiser(wan))
    assert all(torch.equal(again.log_alpha[name], log_alpha[name]) for name in sites)
    with ecodiff.apply_gates(denoiser(wan), again.deterministic()):
        gated = drawn(wan)
    assert torch.allclose(drawn(fold_gates(wan, again.deterministic())), gated, atol=1e-5)


def test_compensation_adapts_both(wan):
    mask = a_mask(wan, lambda units: torch.arange(units) < units - 1)
    plain, adapted = ecodiff.prune(wan, mask), prune_adapted(wan, mask, PROMPTS[:2], **SAMPLING)
    for a, b in zip(experts(denoiser(plain)), experts(denoiser(adapted)), strict=True):
        changed = [n for (n, p), q in zip(a.named_parameters(), b.parameters(), strict=True) if not torch.equal(p, q)]
        assert changed
    assert both(obs(wan, PROMPTS[:2], **SAMPLING))


@pytest.mark.slow
def test_flops_of_sites_and_cost_count_both(wan):
    network = denoiser(wan)
    sites = with_flops(network, ecodiff.find_sites(network), lambda: drawn(wan))
    assert all(site.flops_per_unit > 0 for site in sites.values())
    whole = cost(wan, size=16, frames=5, steps=3, guidance=2.0, text_tokens=TOKENS)
    assert whole.parameters["total"] == sum(p.numel() for part in experts(network) for p in part.parameters())
    assert whole.calls == 6
    # Two of three calls are the second's, so pruning it alone saves two thirds of what pruning both does.
    one = {name: keep for name, keep in a_mask(wan).items() if name.startswith("transformer_2.")}
    part = cost(wan, size=16, frames=5, steps=3, guidance=2.0, text_tokens=TOKENS, mask=one).pruned.flops.total
    full = cost(wan, size=16, frames=5, steps=3, guidance=2.0, text_tokens=TOKENS, mask=a_mask(wan)).pruned.flops.total
    assert full < part < whole.flops.total
    assert abs((whole.flops.total + 2 * full) / 3 - part) <= 3


def test_pictures_are_drawn_and_kept_by_both(wan, tmp_path):
    settings = {"num_inference_steps": 3, "guidance_scale": 2.0, "progress": False, **CALL}
    frames = ecodiff.generate(wan, PROMPTS[:2], [0, 1], cache_dir=tmp_path, **settings)
    assert frames.dtype == torch.uint8 and len(frames) == 2 and frames.shape[-2:] == (16, 16)
    other = with_denoiser(wan, copy.deepcopy(denoiser(wan)))
    other.transformer_2.proj_out.bias.data += 0.5
    changed = ecodiff.generate(other, PROMPTS[:2], [0, 1], cache_dir=tmp_path, **settings)
    assert not torch.equal(frames, changed)


def test_what_works_on_one_denoiser_says_so(wan):
    pictures = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    with pytest.raises(EcoDiffError, match="retrain.*transformer, transformer_2"):
        ecodiff.retrain(wan, pictures, PROMPTS[:2], progress=False)
    with pytest.raises(EcoDiffError, match="several denoisers"):
        from ecodiff.baselines.deepcache import deepcache

        with deepcache(wan):
            pass


def test_a_pipeline_without_a_known_denoiser_names_its_networks():
    class Cascade:
        components = {"prior": tiny_wan().transformer, "tokenizer": object()}

    with pytest.raises(EcoDiffError, match=r"Cascade has no denoiser .* prior \(WanTransformer3DModel\)"):
        denoiser(Cascade())
