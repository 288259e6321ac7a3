"""Methods: each score against a direct computation, units that do nothing go first, same seed same scores."""

import math
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from tiny import PROMPTS, TINY, latents, tiny_flux, tiny_sd, tiny_sd3, tiny_sdxl

import ecodiff
from ecodiff.errors import EcoDiffError
from ecodiff.lab.studies import cell, measure
from ecodiff.method.config import LearnConfig
from ecodiff.method.hooks import apply_gates
from ecodiff.method.sites import find_sites
from ecodiff.method.surgery import prune
from ecodiff.pipelines import running
from ecodiff.pipelines.parts import denoiser
from ecodiff.scores import METHODS, Sampling, prune_compensated, second_moments
from ecodiff.scores.calibration import columns, draw, mix
from ecodiff.scores.compensation import DAMPING, compensated, damped, time_weight
from ecodiff.scores.gauss_newton import random_signs
from ecodiff.scores.obs import from_moments
from ecodiff.scores.taylor import NoisePrediction, noised_input

SEEING = [name for name in METHODS if name not in ("random", "magnitude")]


def settings(pipe, **more):
    length = {"max_sequence_length": 12} if hasattr(pipe, "transformer") else {}
    call = {"height": 16, "width": 16, **length}
    return {"num_inference_steps": 2, "guidance_scale": 3.0, "call": call, "progress": False, "seed": 3, **more}


def score(name, pipe, prompts=tuple(PROMPTS[:2]), **more):
    quick = {"groups": 1} if name == "occlusion" else {}
    return METHODS[name](pipe, list(prompts), **settings(pipe, **quick, **more))


def close(a, b, **tolerance):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], **tolerance)


def first(pipe, kind):
    return next(site for site in find_sites(denoiser(pipe)).values() if site.kind == kind)


@pytest.mark.slow
@pytest.mark.parametrize("model", TINY)
@pytest.mark.parametrize("name", METHODS)
def test_scores_of_every_method_on_every_pipeline(name, model):
    pipe = TINY[model]()
    before = {key: value.clone() for key, value in denoiser(pipe).state_dict().items()}
    scores = score(name, pipe)
    sites = find_sites(denoiser(pipe))
    assert list(scores) == list(sites)
    for site, value in scores.items():
        assert value.shape == (sites[site].units,) and value.dtype == torch.float32 and value.device.type == "cpu"
        assert torch.isfinite(value).all() and not value.requires_grad and value.std(correction=0) >= 0
    assert any(value.unique().numel() > 1 for value in scores.values())
    close(scores, score(name, pipe), rtol=0, atol=0)
    assert all(torch.equal(value, before[key]) for key, value in denoiser(pipe).state_dict().items())
    assert all(parameter.requires_grad for parameter in denoiser(pipe).parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in denoiser(pipe).modules())


@pytest.mark.slow
@pytest.mark.parametrize("name", SEEING)
def test_batch_size_changes_nothing_and_the_seed_does(name):
    pipe = tiny_sd()
    one = score(name, pipe, PROMPTS[:3], batch_size=1)
    close(one, score(name, pipe, PROMPTS[:3], batch_size=2), rtol=2e-3, atol=1e-5)
    other = score(name, pipe, PROMPTS[:3], seed=4)
    assert any(not torch.allclose(one[site], other[site], rtol=1e-3) for site in one)


def zeroed(pipe):
    """Make the first head or neuron of each site do nothing: nothing writes it and nothing reads it."""
    for site in find_sites(denoiser(pipe)).values():
        with torch.no_grad():
            for dimension, spans in enumerate((site.writers, site.readers)):
                for span in spans:
                    denoiser(pipe).get_submodule(span.layer).weight.narrow(dimension, span.offset, span.size).zero_()
    return pipe


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in METHODS if name != "random"])
@pytest.mark.parametrize("make", [tiny_sdxl, tiny_flux])
def test_a_unit_that_does_nothing_has_the_lowest_score(name, make):
    pipe = zeroed(make())
    more = {"kinds": ("attention",)} if name == "occlusion" else {}
    for value in score(name, pipe, **more).values():
        assert value[0] == value.min()
        assert value[0] <= 1e-6 * value.max()


def test_occlusion_by_groups_gives_an_idle_neuron_nothing():
    pipe = zeroed(tiny_sd())
    scores = METHODS["occlusion"](pipe, PROMPTS[:1], **settings(pipe, groups=3, kinds=("feed_forward",)))
    assert all(value[0] == 0 < value[1:].min() for value in scores.values())


@pytest.mark.slow
def test_wanda_is_the_direct_computation():
    pipe = tiny_sdxl()
    site = first(pipe, "attention")
    layer = denoiser(pipe).get_submodule(site.readers[0].layer)
    seen = []
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, 1)))
    draw(pipe, PROMPTS[:2], Sampling(**settings(pipe)))
    handle.remove()
    x = torch.cat(seen)
    assert len(seen) == 2 and seen[0].shape[0] % 4 == 0  # steps; prompts times the halves of guidance
    metric = layer.weight.abs() * x.norm(dim=0) / math.sqrt(len(x))
    expected = metric.view(len(metric), site.units, site.unit_size).mean((0, 2))
    torch.testing.assert_close(score("wanda", pipe)[site.name], expected.detach())


@pytest.mark.parametrize("make", [tiny_sd, tiny_flux])
def test_taylor_is_the_slope_of_the_loss_in_a_gate(make):
    pipe = make()
    scores = score("taylor", pipe, threshold=0.0)
    loss = NoisePrediction.prepare(pipe, PROMPTS[:2], Sampling(**settings(pipe)))
    for kind in ("attention", "feed_forward"):
        site = first(pipe, kind)
        best = int(scores[site.name].argmax())

        def total(value, site=site, best=best):
            gate = torch.ones(site.units)
            gate[best] = value
            with torch.no_grad(), apply_gates(denoiser(pipe), {site.name: gate}):
                return sum(loss(step) for step in loss.steps)

        slope = (total(1.05) - total(0.95)) / 0.1
        assert scores[site.name][best].item() == pytest.approx(abs(slope), rel=0.02)


@pytest.mark.parametrize("make", [tiny_sd, tiny_flux])
def test_fisher_squares_the_slope_of_every_prompt_and_step(make):
    pipe = make()
    scores = score("fisher", pipe)
    loss = NoisePrediction.prepare(pipe, PROMPTS[:2], Sampling(**settings(pipe, batch_size=1)))
    site = first(pipe, "feed_forward")
    best = int(scores[site.name].argmax())

    def losses(value):
        gate = torch.ones(site.units)
        gate[best] = value
        with torch.no_grad(), apply_gates(denoiser(pipe), {site.name: gate}):
            return torch.tensor([replace(loss, recorded=[one])(step) for one in loss.recorded for step in loss.steps])

    slopes = (losses(1.05) - losses(0.95)) / 0.1
    assert len(slopes) == 4
    assert scores[site.name][best].item() == pytest.approx(slopes.square().sum().item(), rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("make", [tiny_sd, tiny_flux])
def test_gauss_newton_is_the_derivative_of_final_latents_along_random_signs(make):
    pipe, given = make(), settings(make(), probes=2)
    scores = METHODS["gauss-newton"](pipe, PROMPTS[:2], **given)
    close(METHODS["gauss-newton"](pipe, PROMPTS[:2], keep_last=0, **given), scores, rtol=0, atol=0)
    close(METHODS["gauss-newton"](pipe, PROMPTS[:2], keep_last=2, **given), scores, rtol=0, atol=0)
    sampling = {name: value for name, value in given.items() if name != "probes"}
    for kind in ("attention", "feed_forward"):
        site = first(pipe, kind)
        best = int(scores[site.name].argmax())

        def final(value, site=site, best=best):
            gate = torch.ones(site.units)
            gate[best] = value
            with apply_gates(denoiser(pipe), {site.name: gate}):
                return draw(pipe, PROMPTS[:2], Sampling(**sampling))

        slope = (final(1.02) - final(0.98)) / 0.04
        seeds = [[mix(given["seed"], probe, i) for i in range(2)] for probe in range(2)]
        signs = torch.stack([torch.stack([random_signs(slope.shape[1:], seed) for seed in row]) for row in seeds])
        assert signs.abs().eq(1).all() and abs(signs.mean()) < 0.3
        expected = (signs * slope).flatten(2).sum(-1).abs().mean() * math.sqrt(math.pi / 2)
        assert scores[site.name][best].item() == pytest.approx(expected.item(), rel=0.02)


@pytest.mark.slow
def test_gauss_newton_foretells_how_far_latents_move_when_a_gate_closes_a_little():
    """With many probes: ‖J_j‖ (1 - m) for the gate of one unit."""
    pipe = tiny_sd()
    site = first(pipe, "attention")
    scores = METHODS["gauss-newton"](pipe, PROMPTS[:1], **settings(pipe, probes=100))[site.name]
    whole = draw(pipe, PROMPTS[:1], Sampling(**settings(pipe)))
    for unit in range(site.units):
        gate = torch.ones(site.units)
        gate[unit] = 0.95
        with apply_gates(denoiser(pipe), {site.name: gate}):
            moved = (draw(pipe, PROMPTS[:1], Sampling(**settings(pipe))) - whole).norm()
        assert moved.item() == pytest.approx(scores[unit].item() * 0.05, rel=0.2)


@pytest.mark.slow
def test_methods_that_draw_do_so_on_accelerates_device(monkeypatch):
    asked = []

    @contextmanager
    def noticed(pipe, caller):
        asked.append(caller)
        yield

    monkeypatch.setattr(running, "on_device", noticed)
    pipe = tiny_sd()
    for method in METHODS:
        score(method, pipe)
    taylor = ["taylor.scores"] * 2  # Diff-Pruning, too
    slopes = ["fisher.scores", "gauss_newton.scores"]
    assert asked == ["wanda.norms", *taylor, *slopes, "occlusion.scores", "wanda.norms", "compensation.second_moments"]


@pytest.mark.slow
def test_taylor_needs_no_gradients_switched_on_by_the_caller():
    expected = score("taylor", tiny_sd())
    with torch.no_grad():
        close(score("taylor", tiny_sd()), expected, rtol=0, atol=0)


@pytest.mark.slow
def test_taylor_in_gates_is_weight_times_gradient_of_the_reading_layer():
    pipe = tiny_sd()
    scores = score("taylor", pipe, threshold=0.0)
    loss = NoisePrediction.prepare(pipe, PROMPTS[:2], Sampling(**settings(pipe)))
    denoiser(pipe).zero_grad()
    for step in loss.steps:
        loss(step, lambda part: part.backward())
    elementwise = score("diff-pruning", pipe, threshold=0.0)
    for site in find_sites(denoiser(pipe)).values():
        products = [
            (layer.weight * layer.weight.grad).sum(0).view(site.units, -1).sum(1)
            for layer in (denoiser(pipe).get_submodule(span.layer) for span in site.readers)
        ]
        torch.testing.assert_close(scores[site.name], sum(products).abs().detach(), rtol=1e-3, atol=1e-6)
        assert (elementwise[site.name] >= scores[site.name] - 1e-6).all()
        each = torch.zeros(site.units)
        for dimension, spans in enumerate((site.writers, site.readers)):
            for span in spans:
                weight = denoiser(pipe).get_submodule(span.layer).weight
                products = (weight * weight.grad).abs().sum(1 - dimension).detach()
                each += products[columns(span, site.units)].view(site.units, -1).sum(1)
        torch.testing.assert_close(elementwise[site.name], each, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_taylor_stops_where_the_loss_has_become_small():
    pipe = tiny_sd()
    loss = NoisePrediction.prepare(pipe, PROMPTS[:2], Sampling(**settings(pipe, num_inference_steps=5)))
    values = [loss(step) for step in loss.steps]
    assert loss.steps == [4, 3, 2, 1, 0]
    more = {"num_inference_steps": 5}
    all_steps = score("taylor", pipe, threshold=0.0, **more)
    early = score("taylor", pipe, threshold=0.999, **more)
    stopped = any(value < 0.999 * max(values[: i + 1]) for i, value in enumerate(values[:-1]))
    assert stopped and any(not torch.equal(early[name], all_steps[name]) for name in early)


def test_noised_input_of_each_family_of_schedulers():
    z, noise = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    for make in (tiny_sd, tiny_sdxl):
        scheduler = make().scheduler
        scheduler.set_timesteps(4)
        t = int(scheduler.timesteps[1])
        given, target = noised_input(scheduler, 1, z, noise)
        share = scheduler.alphas_cumprod[t]
        torch.testing.assert_close(given, share.sqrt() * z + (1 - share).sqrt() * noise, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(target, noise)
    scheduler = type(scheduler).from_config(scheduler.config, prediction_type="v_prediction")
    scheduler.set_timesteps(4)
    _, target = noised_input(scheduler, 1, z, noise)
    torch.testing.assert_close(target, share.sqrt() * noise - (1 - share).sqrt() * z, rtol=1e-4, atol=1e-4)
    scheduler = tiny_sd3().scheduler
    scheduler.set_timesteps(4)
    given, target = noised_input(scheduler, 1, z, noise)
    torch.testing.assert_close(given, (1 - scheduler.sigmas[1]) * z + scheduler.sigmas[1] * noise)
    torch.testing.assert_close(target, noise - z)


@pytest.mark.slow
@pytest.mark.parametrize("distance", ["moments", "paired"])
def test_occlusion_is_what_removing_a_head_does(distance):
    pipe = tiny_sdxl()
    site = first(pipe, "attention")
    scores = METHODS["occlusion"](pipe, PROMPTS[:2], **settings(pipe, kinds=("attention",), distance=distance))
    whole = draw(pipe, PROMPTS[:2], Sampling(**settings(pipe)))
    for unit in range(site.units):
        keep = torch.arange(site.units) != unit
        other = draw(prune(pipe, {site.name: keep}), PROMPTS[:2], Sampling(**settings(pipe)))
        if distance == "paired":
            expected = (whole - other).square().mean()
        else:
            expected = (whole.mean(0) - other.mean(0)).norm() + (whole.std(0) - other.std(0)).norm()
        torch.testing.assert_close(scores[site.name][unit], expected, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_occlusion_shares_the_effect_of_a_group_among_its_neurons():
    pipe = tiny_sd()
    scores = METHODS["occlusion"](pipe, PROMPTS[:2], **settings(pipe, groups=2, kinds=("feed_forward",)))
    site = first(pipe, "feed_forward")
    order = score("wanda", pipe)[site.name].argsort(stable=True)
    whole = draw(pipe, PROMPTS[:2], Sampling(**settings(pipe)))
    for group in order.tensor_split(2):
        keep = torch.ones(site.units, dtype=torch.bool)
        keep[group] = False
        other = draw(prune(pipe, {site.name: keep}), PROMPTS[:2], Sampling(**settings(pipe)))
        moved = (whole.mean(0) - other.mean(0)).norm() + (whole.std(0) - other.std(0)).norm()
        torch.testing.assert_close(scores[site.name][group].sum(), moved, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_occlusion_says_what_it_costs(capsys):
    pipe = tiny_sd()
    METHODS["occlusion"](pipe, PROMPTS[:1], **settings(pipe, groups=1, progress=True))
    heads = sum(site.units for site in find_sites(denoiser(pipe), ("attention",)).values())
    neurons = len(find_sites(denoiser(pipe), ("feed_forward",)))
    assert f"occlusion: {heads + neurons} trajectories of 1 prompts, about" in capsys.readouterr().err


def inputs_of(pipe, layer, **more):
    seen = []
    handle = (
        denoiser(pipe)
        .get_submodule(layer)
        .register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, -2).double()))
    )
    draw(pipe, PROMPTS[:2], Sampling(**settings(pipe, **more)))
    handle.remove()
    return seen


@pytest.mark.slow
def test_second_moments_weigh_early_steps_more():
    pipe = tiny_sd()
    layer = first(pipe, "feed_forward").readers[0].layer
    seen = inputs_of(pipe, layer, num_inference_steps=4)
    weights = [time_weight(step, 4) for step in range(4)]
    assert weights == sorted(weights, reverse=True) and weights[0] == 1 and weights[-1] == pytest.approx(0.5)
    expected = sum(w * x.T @ x for w, x in zip(weights, seen, strict=True)) / sum(
        w * len(x) for w, x in zip(weights, seen, strict=True)
    )
    found = second_moments(pipe, PROMPTS[:2], **settings(pipe, num_inference_steps=4))[layer]
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)
    in_parts = second_moments(pipe, PROMPTS[:2], memory_gb=1e-9, **settings(pipe, num_inference_steps=4))[layer]
    torch.testing.assert_close(in_parts, found)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["attention", "feed_forward"])
def test_obs_is_the_least_squares_error_without_the_unit(kind):
    pipe = tiny_sd3()
    moments = second_moments(pipe, PROMPTS[:2], **settings(pipe))
    scores = from_moments(pipe, moments)
    site = first(pipe, kind)
    for unit in (0, site.units - 1):
        expected = 0.0
        for span in site.readers:
            weight = denoiser(pipe).get_submodule(span.layer).weight.detach().double()
            h = damped(moments[span.layer], DAMPING)
            root = torch.linalg.cholesky(h).T  # ‖(W - W') rootᵀ‖² is the error on inputs with these second moments
            keep = torch.ones(len(h), dtype=torch.bool)
            keep[span.offset + unit * span.size : span.offset + (unit + 1) * span.size] = False
            best = torch.linalg.lstsq(root[:, keep], root @ weight.T).solution
            expected += (root @ weight.T - root[:, keep] @ best).square().sum().item()
            torch.testing.assert_close(
                compensated(weight, moments[span.layer], keep).double(), best.T, rtol=1e-3, atol=1e-5
            )
        assert scores[site.name][unit].item() == pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("make", [tiny_sd, tiny_sdxl, tiny_sd3, tiny_flux])
def test_compensation_lowers_the_error_of_every_layer(make):
    pipe = make()
    moments = second_moments(pipe, PROMPTS[:3], **settings(pipe))
    mask = {name: torch.arange(site.units) % 3 > 0 for name, site in find_sites(denoiser(pipe)).items()}
    plain, better = prune(pipe, mask), prune_compensated(pipe, mask, moments)
    changed = 0
    for layer, h in moments.items():
        weight, h = denoiser(pipe).get_submodule(layer).weight.double(), h.double()
        one, two = (denoiser(p).get_submodule(layer).weight.double() for p in (plain, better))
        keep = _columns_left(weight, one)
        errors = []
        for smaller in (one, two):
            rest = weight.clone()
            rest[:, keep] -= smaller
            errors.append(torch.einsum("oi,ij,oj->", rest, h, rest).item())
        assert errors[1] < errors[0]
        changed += 1
    assert changed == len(moments)
    unread = denoiser(better).state_dict()
    same = [torch.equal(value, unread[key]) for key, value in denoiser(plain).state_dict().items()]
    assert same.count(False) == len(moments)  # only the reading layers' weights differ


@pytest.mark.slow
@pytest.mark.parametrize("make", [tiny_sdxl, tiny_flux])
def test_a_pruned_model_is_adapted_to_prompts_in_one_call(make, tmp_path):
    pipe = make()
    mask = {name: torch.arange(site.units) % 3 > 0 for name, site in find_sites(denoiser(pipe)).items()}
    small = ecodiff.prune_adapted(pipe, mask, PROMPTS[:3], **settings(pipe))
    moments = second_moments(pipe, PROMPTS[:3], **settings(pipe))
    close(denoiser(small).state_dict(), denoiser(prune_compensated(pipe, mask, moments)).state_dict(), rtol=0, atol=0)
    small.save_pretrained(tmp_path / "small")
    assert torch.equal(latents(ecodiff.load(tmp_path / "small")), latents(small))


def _columns_left(weight, smaller):
    keep = (weight[:, :, None] == smaller[:, None, :]).all(0).any(1)
    assert int(keep.sum()) == smaller.shape[1]
    return keep


@pytest.mark.slow
def test_a_copied_neuron_costs_nothing_once_its_twin_is_adapted():
    pipe = tiny_sd()
    site = first(pipe, "feed_forward")
    with torch.no_grad():
        for span in site.writers:
            layer = denoiser(pipe).get_submodule(span.layer)
            layer.weight[span.offset + 1] = layer.weight[span.offset]
            layer.bias[span.offset + 1] = layer.bias[span.offset]
    moments = second_moments(pipe, PROMPTS[:3], **settings(pipe))
    scores = from_moments(pipe, moments, damping=1e-9)[site.name]
    others = scores[2:]
    assert scores[:2].max() < 1e-3 * others.median()
    mask = {site.name: torch.arange(site.units) != 1}
    sampling = Sampling(**settings(pipe))
    whole, plain, better = (
        draw(p, PROMPTS[:2], sampling)
        for p in (pipe, prune(pipe, mask), prune_compensated(pipe, mask, moments, damping=1e-9))
    )
    assert (better - whole).norm() < 0.05 * (plain - whole).norm()


@pytest.mark.slow
def test_a_site_without_units_needs_no_compensation():
    pipe = tiny_sd()
    site = first(pipe, "attention")
    mask = {site.name: torch.zeros(site.units, dtype=torch.bool)}
    small = prune_compensated(pipe, mask, second_moments(pipe, PROMPTS[:1], **settings(pipe)))
    sampling = Sampling(**settings(pipe))
    assert torch.equal(draw(small, PROMPTS[:1], sampling), draw(prune(pipe, mask), PROMPTS[:1], sampling))


def test_taylor_scores_modulation_layers():
    pipe = tiny_sd3()
    scores = score("taylor", pipe, kinds=("modulation",))
    assert scores.keys() == find_sites(denoiser(pipe), ("modulation",)).keys()
    assert all(torch.isfinite(value).all() and value.max() > 0 for value in scores.values())


@pytest.mark.parametrize("name", ["wanda", "obs"])
def test_methods_that_look_at_readers_refuse_modulation_layers(name):
    with pytest.raises(EcoDiffError, match="no layer reads the units of kind 'modulation'"):
        score(name, tiny_sd3(), kinds=("attention", "modulation"))


@pytest.mark.slow
def test_bad_input_is_named():
    pipe = tiny_sd()
    for name in SEEING:
        with pytest.raises(EcoDiffError, match="at least one prompt"):
            score(name, pipe, [])
        with pytest.raises(EcoDiffError, match="batch_size=0 must be at least 1"):
            score(name, pipe, batch_size=0)
    for name, wrong, message in (
        ("taylor", {"threshold": 1.0}, "share of the largest loss"),
        ("occlusion", {"distance": "fid"}, "is not one of moments, paired"),
        ("gauss-newton", {"probes": 0}, "at least one backward pass"),
        ("obs", {"time_weights": "none"}, "is not one of log, uniform"),
        ("obs", {"damping": 0.0}, "must be positive"),
    ):
        with pytest.raises(EcoDiffError, match=message):
            METHODS[name](pipe, PROMPTS[:1], **settings(pipe, **wrong))
    with pytest.raises(EcoDiffError, match="groups=0 must be at least 1"):
        METHODS["occlusion"](pipe, PROMPTS[:1], **settings(pipe, groups=0))
    site = first(pipe, "attention")
    with pytest.raises(EcoDiffError, match="no second moments of"):
        prune_compensated(pipe, {site.name: torch.arange(site.units) > 0}, {})


def test_noise_of_a_prompt_is_its_own():
    assert len({mix(0, i) for i in range(100)} | {mix(1, i) for i in range(100)}) == 200


@pytest.mark.slow
def test_a_comparison_calls_every_method_by_name(monkeypatch):
    monkeypatch.setenv("ECODIFF_RECORDS", "off")
    pipe = tiny_sd()
    config = LearnConfig(updates=1, batch_size=1, num_inference_steps=1, call={"height": 16, "width": 16})
    sites = find_sites(denoiser(pipe))
    seen = {name: measure.scores_of(pipe, name, PROMPTS[:1], config, 0) for name in ("learned", "random", "obs")}
    assert all(scores.keys() == sites.keys() for scores in seen.values())
    close(measure.scores_of(pipe, "obs+compensation", PROMPTS[:1], config, 0), seen["obs"], rtol=0, atol=0)
    mask = {name: torch.arange(site.units) > 0 for name, site in sites.items()}
    small, other = (measure.pruned_by(pipe, name, mask, PROMPTS[:1], config, 0) for name in ("obs", "obs+compensation"))
    layer = first(pipe, "feed_forward").readers[0].layer
    assert not torch.equal(*(denoiser(p).get_submodule(layer).weight for p in (small, other)))
    with pytest.raises(EcoDiffError, match="Unknown method 'best': take learned, random, magnitude"):
        measure.scores_of(pipe, "best", PROMPTS[:1], config, 0)
    assert len(cell.calibration("occlusion", ["a"] * 99)) == 8
    assert len(cell.calibration("wanda", ["a"] * 99)) == 32
    assert len(cell.calibration("gauss-newton", ["a"] * 99)) == 99
