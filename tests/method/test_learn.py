"""Learning: λ move the right way, the same run gives the same λ (also after an interruption), bad input is named."""

import json
import math
import sys
import warnings
from dataclasses import replace

import pytest
import torch
from tiny import PROMPTS, QUICK, SIZE, TINY, call_kwargs, quiet, sized, tiny_flux, tiny_sd, tiny_sdxl

from ecodiff.errors import EcoDiffError
from ecodiff.method.gates import Gates, fresh_gates
from ecodiff.method.hooks import apply_gates
from ecodiff.method.learn import LearnConfig, Task, learn, prices_of_open_gates
from ecodiff.method.resume import Folder
from ecodiff.method.sites import find_sites
from ecodiff.pipelines.parts import denoiser
from ecodiff.pipelines.prompts import encoding_once, epoch_batch


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow
@pytest.mark.parametrize("model", TINY)
def test_learns_on_every_pipeline(model):
    pipe = TINY[model]()
    gates = quiet(pipe, config=replace(QUICK, updates=2, call=sized(pipe)))
    assert gates.log_alpha.keys() == find_sites(denoiser(pipe)).keys()
    assert all(value.dtype == torch.float32 and not value.requires_grad for value in gates.log_alpha.values())
    assert any((value != 3.0).any() for value in gates.log_alpha.values())
    assert [row["update"] for row in gates.history] == [1, 2]
    for row in gates.history:
        assert row["loss"] == pytest.approx(row["reconstruction"] + QUICK.weight * row["regulariser"])
        assert {"open_attention", "open_feed_forward", "seconds", "gradient_norm"} <= row.keys()
    json.dumps(gates.history)


@pytest.mark.slow
def test_a_unit_that_does_nothing_closes_before_one_that_matters():
    pipe = tiny_sd()
    name = next(name for name in find_sites(denoiser(pipe)) if name.endswith("ff"))
    layer = denoiser(pipe).get_submodule(name).net[2]
    half = layer.in_features // 2
    layer.weight.data[:, :half] = 0
    layer.weight.data[:, half:] *= 20
    gates = quiet(
        pipe, config=replace(QUICK, updates=24, kinds=("feed_forward",), log_alpha_start=1.0, lr=0.3, weight=0.1)
    )
    idle, useful = gates.scores()[name].split(half)
    assert idle.std() < 1e-3  # only the regulariser moves them, all alike
    assert useful.mean() > idle.mean() + 1
    assert (useful[:, None] > idle).float().mean() > 0.9


@pytest.mark.slow
def test_learning_warns_of_nothing():
    """Warnings would stand in a chapter's output, with a folder of the machine."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quiet(tiny_sd(), config=replace(QUICK, updates=1))
        quiet(tiny_sd(), config=replace(QUICK, updates=1, gate_draw="trajectory", target_open=None))


@pytest.mark.slow
def test_with_zero_weight_and_open_gates_nothing_moves():
    gates = quiet(tiny_sd(), config=replace(QUICK, weight=0.0, log_alpha_start=60.0, updates=2))
    assert all((value == 60.0).all() for value in gates.log_alpha.values())
    assert gates.history[0]["reconstruction"] < 1e-9


@pytest.mark.slow
def test_pipeline_is_left_as_it_was():
    pipe = tiny_sdxl()
    before = {key: value for key, value in vars(pipe).items() if key != "_internal_dict"}
    scheduler = {key: repr(value) for key, value in vars(pipe.scheduler).items()}
    quiet(pipe)
    assert {key: value for key, value in vars(pipe).items() if key != "_internal_dict"} == before
    assert {key: repr(value) for key, value in vars(pipe.scheduler).items()} == scheduler
    assert all(p.requires_grad and p.grad is None for p in denoiser(pipe).parameters())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in denoiser(pipe).modules())


@pytest.mark.slow
def test_same_seed_same_result_and_checkpointing_changes_nothing():
    pipe = tiny_sd()
    torch.manual_seed(1)
    first = quiet(pipe)
    state = torch.get_rng_state()
    second = quiet(pipe, config=replace(QUICK, checkpoint=False))
    assert torch.equal(state, torch.get_rng_state())
    assert same(first.log_alpha, second.log_alpha)
    assert same(first.log_alpha, quiet(pipe, config=replace(QUICK, keep_last=QUICK.num_inference_steps)).log_alpha)
    assert not same(first.log_alpha, quiet(pipe, config=replace(QUICK, seed=1)).log_alpha)


@pytest.mark.slow
def test_samples_with_gates_of_their_own_can_be_run_together_or_one_by_one():
    first = {}
    for size in (None, 1):
        for draw in ("sample", "trajectory"):
            config = replace(QUICK, updates=1, gate_draw=draw, micro_batch_size=size)
            first[draw, size] = quiet(tiny_sd(), config=config).history[0]
    for name in ("reconstruction", "gradient_norm"):
        assert first["sample", 1][name] == pytest.approx(first["sample", None][name], rel=1e-4)
        # One sample at a time, a trajectory's gates are the sample's.
        assert first["trajectory", 1][name] == pytest.approx(first["sample", 1][name], rel=1e-6)
        assert first["trajectory", None][name] != pytest.approx(first["sample", None][name], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("draw", ["trajectory", "sample", "call"])
def test_an_interrupted_run_continues_to_the_same_result(tmp_path, monkeypatch, draw):
    pipe, config = (
        tiny_sd(),
        replace(QUICK, gate_draw=draw, micro_batch_size=1, noises_per_prompt=2, save_every=2, optimizer="adamw"),
    )
    whole = quiet(pipe, config=config)
    update, teachers = Task.update, []

    def killed(self, gates, optimizer, number):
        if number == 3:
            raise KeyboardInterrupt
        return update(self, gates, optimizer, number)

    monkeypatch.setattr(Task, "update", killed)
    with pytest.raises(KeyboardInterrupt):
        quiet(pipe, config=config, resume_dir=tmp_path)
    monkeypatch.setattr(Task, "update", update)
    latents = Task.latents
    monkeypatch.setattr(
        Task, "latents", lambda self, i, gradients: (gradients or teachers.append(i), latents(self, i, gradients))[1]
    )
    resumed = quiet(tiny_sd(), config=config, resume_dir=tmp_path)
    assert teachers == [[0]]  # all are read from disk; the first shows that samples are as they were
    assert same(whole.log_alpha, resumed.log_alpha)
    assert [{**row, "seconds": 0} for row in whole.history] == [{**row, "seconds": 0} for row in resumed.history]
    assert whole.snapshots.keys() == resumed.snapshots.keys() == {0, 2, 4}
    assert all(same(whole.snapshots[update], resumed.snapshots[update]) for update in (0, 2, 4))
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} == {".safetensors"}


@pytest.mark.slow
def test_a_finished_run_can_be_read_again_and_made_longer(tmp_path):
    pipe, config = tiny_sd(), replace(QUICK, target_open=None)
    short = quiet(pipe, config=replace(config, updates=2), resume_dir=tmp_path)
    assert same(short.log_alpha, quiet(pipe, config=replace(config, updates=2), resume_dir=tmp_path).log_alpha)
    assert same(quiet(pipe, config=config, resume_dir=tmp_path).log_alpha, quiet(pipe, config=config).log_alpha)
    with pytest.raises(EcoDiffError, match="holds 4 updates"):
        quiet(pipe, config=replace(config, updates=2), resume_dir=tmp_path)


@pytest.mark.slow
def test_a_run_on_a_line_to_a_target_cannot_be_made_longer(tmp_path):
    quiet(tiny_sd(), config=replace(QUICK, updates=2), resume_dir=tmp_path)
    with pytest.raises(EcoDiffError, match=r"config.updates was 2, is 4\): choose another resume_dir"):
        quiet(tiny_sd(), resume_dir=tmp_path)


def test_resume_refuses_another_run_and_damaged_files(tmp_path):
    pipe = tiny_sd()
    config = replace(QUICK, updates=1)
    quiet(pipe, config=config, resume_dir=tmp_path)
    with pytest.raises(EcoDiffError, match="config.weight was 4.0, is 1.0"):
        quiet(pipe, config=replace(config, weight=1.0), resume_dir=tmp_path)
    with pytest.raises(EcoDiffError, match="another run .prompts"):
        quiet(pipe, PROMPTS[:2], config=config, resume_dir=tmp_path)
    other = tiny_sd()
    denoiser(other).conv_out.weight.data.add_(1e-3)
    with pytest.raises(EcoDiffError, match="another run .weights"):
        quiet(other, config=config, resume_dir=tmp_path)
    file = tmp_path / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(EcoDiffError, match="not a readable file"):
        quiet(pipe, config=config, resume_dir=tmp_path)
    (tmp_path / "plain").write_text("")
    with pytest.raises(EcoDiffError, match="cannot be made"):
        quiet(pipe, config=config, resume_dir=tmp_path / "plain")


def test_two_runs_at_once_in_one_folder_are_refused(tmp_path):
    folder = Folder(tmp_path, {})
    with folder, pytest.raises(EcoDiffError, match="another run is writing there"):
        quiet(tiny_sd(), config=replace(QUICK, updates=1), resume_dir=tmp_path)


@pytest.mark.slow
def test_a_full_disk_leaves_what_was_saved_before(tmp_path, monkeypatch):
    pipe, config = tiny_sd(), replace(QUICK, target_open=None)
    quiet(pipe, config=replace(config, updates=1), resume_dir=tmp_path)
    before = (tmp_path / "state.safetensors").read_bytes()

    def full(self, data):
        with open(self, "wb") as file:
            file.write(data[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(EcoDiffError, match="No space left"):
        quiet(pipe, config=config, resume_dir=tmp_path)
    assert (tmp_path / "state.safetensors").read_bytes() == before
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_lambda(tmp_path, monkeypatch):
    pipe, update, seen = tiny_sd(), Task.update, []

    def diverging(self, gates, optimizer, number):
        row = update(self, gates, optimizer, number)
        seen.append({name: value.detach().clone() for name, value in gates.log_alpha.items()})
        return row | ({"loss": math.nan} if number == 2 else {})

    monkeypatch.setattr(Task, "update", diverging)
    with pytest.raises(EcoDiffError, match="Update 3: loss nan") as caught:
        quiet(pipe, resume_dir=tmp_path)
    assert same(caught.value.gates.log_alpha, seen[1])
    assert same(Gates.load(tmp_path / "last_good.safetensors", denoiser(pipe)).log_alpha, seen[1])


def test_text_encoders_run_once_a_prompt_and_give_what_the_pipeline_gives():
    for make in (tiny_sdxl, tiny_flux):
        pipe = make()
        taken = call_kwargs(pipe, n=3, steps=2)
        calls = []
        handle = pipe.text_encoder.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        once = encoding_once(pipe)
        pipe.set_progress_bar_config(disable=True)
        first = once(**taken).images
        used = len(calls)
        once(**call_kwargs(pipe, n=3, steps=2))
        assert len(calls) == used
        handle.remove()
        assert torch.allclose(first, pipe(**call_kwargs(pipe, n=3, steps=2)).images, atol=1e-4)


@pytest.mark.slow
def test_prompts_may_be_mappings_of_call_arguments():
    pipe = tiny_sd()
    with torch.no_grad():
        rows = [pipe.encode_prompt(p, "cpu", 1, True) for p in PROMPTS]
    prompts = [{"prompt_embeds": text, "negative_prompt_embeds": empty} for text, empty in rows]
    a, b = quiet(pipe, prompts), quiet(pipe)
    assert all(torch.allclose(a.log_alpha[name], b.log_alpha[name], atol=1e-3) for name in a.log_alpha)


def test_a_denoiser_that_cannot_be_learned_on_is_named(capsys):
    pipe = tiny_sd()
    pipe.unet.half()
    with pytest.raises(EcoDiffError, match="learn: UNet2DConditionModel is in float16, where gradients"):
        quiet(pipe)
    pipe = tiny_sd()
    peft = pytest.importorskip("peft")
    pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(EcoDiffError, match=r"has adapters \(default\): fuse and unload them first"):
        quiet(pipe)


def test_modules_without_units_are_named_before_the_start(capsys, monkeypatch):
    skipped = {"mid_block.attn": "its norm spans all heads"}
    monkeypatch.setattr(sys.modules["ecodiff.method.learn"], "skipped_modules", lambda network: skipped)
    learn(tiny_sd(), PROMPTS, replace(QUICK, updates=1))
    assert "no units in 1 modules, such as mid_block.attn (its norm spans all heads)" in capsys.readouterr().err


def test_a_model_that_could_not_be_pruned_is_refused_before_anything_is_learned(monkeypatch):
    pipe = tiny_sd()
    name = next(name for name in find_sites(denoiser(pipe)) if name.endswith("attn1"))
    pipe.unet.get_submodule(name).fuse_projections()
    monkeypatch.setattr(sys.modules["ecodiff.method.learn"], "Task", None)  # never reached
    with pytest.raises(EcoDiffError, match="learn: .* such as fused projections .*: undo that first"):
        learn(pipe, PROMPTS, replace(QUICK, updates=1))


@pytest.mark.slow
def test_an_offloaded_pipeline_keeps_its_weights_until_backward_is_over(monkeypatch):
    pipe, freed = tiny_sd(), []
    pipe._all_hooks = [object()]
    monkeypatch.setattr(type(pipe), "maybe_free_model_hooks", lambda self: freed.append(torch.is_grad_enabled()))
    learn(pipe, PROMPTS, QUICK, progress=False, check=False)
    # The teacher, drawn without gradients, ends its calls as ever; then only the end of learning frees anything.
    # One batch of it runs twice, to see that samples come out again.
    teacher = math.ceil(len(PROMPTS) / QUICK.batch_size) + 1
    assert len(freed) == teacher + 1


def test_reconstruction_is_normalised_by_the_teachers_variance():
    task = Task(tiny_sd(), PROMPTS, QUICK, torch.device("cpu"))
    teacher = 7 * torch.randn(64, 4, 8, 8)
    other = 7 * torch.randn(64, 4, 8, 8)
    task.scale = teacher.var().item()
    assert task.reconstruction(other, teacher).item() == pytest.approx(2, rel=0.05)
    task.config = replace(QUICK, reconstruction="norm")
    assert task.reconstruction(other, teacher).item() == pytest.approx(math.sqrt(2), rel=0.05)
    task.config, task.scale = replace(QUICK, reconstruction="norm", normalize=False), 1.0
    assert task.reconstruction(other, teacher).item() == pytest.approx(
        (other - teacher).flatten(1).norm(dim=1).mean().item(), rel=1e-5
    )


def test_regularisers():
    sites = find_sites(denoiser(tiny_flux()), ("attention", "feed_forward", "modulation"))
    gates = Gates.start(sites, 1.0)
    open_share = gates.distribution.prob_open(torch.ones(1)).item()
    prices = prices_of_open_gates(gates, "l0")
    assert [price.item() for price in prices.values()] == pytest.approx([open_share] * 3)
    with torch.no_grad():
        for value in gates.log_alpha.values():
            value.fill_(-2.0)
    loss = sum(prices_of_open_gates(gates, "l1").values())
    assert loss.item() == pytest.approx(4.0)  # two of three kinds, as published
    loss.backward()
    assert all((value.grad is None) == (sites[name].kind == "modulation") for name, value in gates.log_alpha.items())


def test_beta_acts_on_a_kind_while_more_of_its_gates_are_open_than_asked_for():
    pipe, config = tiny_sd(), replace(QUICK, updates=10, target_open=0.6, weight=5.0)
    task = Task(encoding_once(pipe), PROMPTS[:2], config, torch.device("cpu"))
    gates = Gates.start(find_sites(denoiser(pipe)), 3.0, config.distribution)
    start = gates.distribution.prob_open(torch.tensor(3.0)).item()
    assert 0.9 < start and set(task.weights(gates, 0).values()) == {5.0}
    line = [start + (0.6 - start) * done / 10 for done in range(1, 11)]
    assert line[-1] == pytest.approx(0.6)
    middle = torch.logit(torch.tensor((line[4] + line[5]) / 2)) - (torch.logit(torch.tensor(start)) - 3)
    for name, site in gates.sites.items():
        if site.kind == "attention":
            gates.log_alpha[name].data.fill_(middle)
    assert gates.distribution.prob_open(middle).item() == pytest.approx((line[4] + line[5]) / 2, abs=1e-4)
    per_update = (line[4] - line[5]) / 0.02  # of β, as the line falls: 0.5, 1.5, ... updates below the share
    expected = [5.0 * min(1, max(0, (update - 4.5) * per_update)) for update in range(10)]
    assert 0 < expected[5] < 5.0 == expected[-1]
    assert [task.weights(gates, update)["attention"] for update in range(10)] == pytest.approx(expected, abs=0.02)
    assert {task.weights(gates, update)["feed_forward"] for update in range(10)} == {5.0}


def test_without_a_target_beta_acts_on_closed_gates_too():
    # With this δ a gate can be closed for any noise.
    config = replace(QUICK, target_open=None, regulariser="l1", delta=0.5)
    task = Task(encoding_once(tiny_sd()), PROMPTS[:2], config, torch.device("cpu"))
    gates = Gates.start(find_sites(denoiser(task.pipe)), -20.0, config.distribution)
    assert all(gates.distribution.prob_open(value).sum() == 0 for value in gates.log_alpha.values())
    assert task.weights(gates, 0) == {"attention": config.weight, "feed_forward": config.weight}


@pytest.mark.slow
def test_a_target_keeps_more_gates_open():
    config = replace(QUICK, updates=40, num_inference_steps=1, weight=20.0, target_open=None)
    far = quiet(tiny_sd(), config=config).history[-1]
    near = quiet(tiny_sd(), config=replace(config, target_open=0.8)).history[-1]
    assert all(near[kind] > far[kind] + 0.4 for kind in ("open_attention", "open_feed_forward"))


def test_learning_rates_are_set_per_kind():
    gates = quiet(tiny_sd(), config=replace(QUICK, lr={"attention": 0.0, "feed_forward": 0.2}, updates=2))
    for name, site in gates.sites.items():
        assert (gates.log_alpha[name] == 3.0).all() == (site.kind == "attention")


def test_every_epoch_visits_every_sample_once():
    drawn = [i for update in range(5) for i in epoch_batch(10, 4, 0, update)]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10)) and drawn[:10] != drawn[10:]


@pytest.mark.slow
def test_published_presets_and_the_dead_start():
    sdxl, flux = LearnConfig.paper("sdxl"), LearnConfig.paper("flux")
    assert (sdxl.weight, sdxl.delta, sdxl.lr["attention"], sdxl.lr["feed_forward"], sdxl.lr["modulation"]) == (
        0.5,
        0.5,
        0.15,
        0.15,
        0,
    )
    assert (flux.weight, flux.delta, flux.lr["attention"], flux.lr["feed_forward"], flux.lr["modulation"]) == (
        0.1,
        0.1,
        0.05,
        1,
        0.5,
    )
    assert {sdxl.updates, flux.updates} == {400} and {sdxl.batch_size, flux.batch_size} == {4}
    quick = replace(sdxl, updates=2, num_inference_steps=2, call=SIZE)
    with pytest.warns(UserWarning, match="above 3.089"):
        gates = quiet(tiny_sd(), config=quick)
    for name, value in gates.log_alpha.items():  # the L1 alone moved λ: all of a site alike
        assert (value == value[0]).all() and value[0] < 5, name
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="λ starts")
        quiet(tiny_sd(), config=LearnConfig.paper("sdxl", "code", updates=1, num_inference_steps=2, call=SIZE))
    with pytest.warns(UserWarning, match="L0 regulariser has exactly zero gradient"):
        quiet(tiny_sd(), config=replace(QUICK, updates=1, delta=0.1))


def test_progress_says_what_it_will_cost(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    learn(tiny_sd(), PROMPTS, replace(QUICK, updates=1))
    shown = capsys.readouterr()
    assert "1 updates of 2 samples, 2 steps each, on cpu: about" in shown.err
    assert "loss=" in shown.err and "open=" in shown.err


@pytest.mark.parametrize(
    "bad",
    [
        {"updates": 0}, {"batch_size": 0}, {"micro_batch_size": 0}, {"weight": -1}, {"weight": math.nan},
        {"lr": math.inf}, {"lr": {"attention": 0.1}}, {"optimizer": "sgd"}, {"regulariser": "l2"},
        {"gate_draw": "step"}, {"mixed_precision": "fp16"}, {"target_open": 1.2}, {"target_open": 0}, {"keep_last": -1},
        {"clip_grad_norm": 0}, {"log_alpha_start": math.nan}, {"temperature": 0},
    ],
)  # fmt: skip
def test_bad_configurations_are_named(bad):
    with pytest.raises(EcoDiffError, match=next(iter(bad))):
        LearnConfig(**bad)


@pytest.mark.slow
@pytest.mark.parametrize("prompts", [[], "a cat", [""], ["a cat", "  "], ["a cat", {"prompt_embeds": 0}], None])
def test_bad_prompts(prompts):
    with pytest.raises(EcoDiffError, match="prompt"):
        quiet(tiny_sd(), prompts)


def test_unknown_preset_and_missing_sites():
    with pytest.raises(EcoDiffError, match="sd3"):
        LearnConfig.paper("sd3")
    with pytest.raises(EcoDiffError, match="no sites of the kinds modulation"):
        quiet(tiny_sd(), config=replace(QUICK, kinds=("modulation",)))


@pytest.mark.slow
@pytest.mark.parametrize("draw", ["trajectory", "call"])
@pytest.mark.parametrize("make", [tiny_sd, tiny_flux])
def test_the_step_objective_is_the_mean_error_of_single_calls(make, draw):
    """Gradient and loss against the plain sum over recorded calls, by automatic differentiation through all of them."""
    pipe = make()
    call = {k: v for k, v in call_kwargs(pipe).items() if k in ("height", "width", "max_sequence_length")}
    config = replace(QUICK, num_inference_steps=3, call=call, objective="step", delta=0.1)
    sites = find_sites(denoiser(pipe), config.kinds)
    task = Task(encoding_once(pipe), PROMPTS[:2], config, torch.device("cpu"))
    gates = Gates.start(sites, 1.0, config.distribution)
    values = gates.sample(torch.Generator().manual_seed(0), 2) if draw == "trajectory" else fresh_gates(gates, 2)
    calls = []
    handle = denoiser(pipe).register_forward_hook(lambda m, a, k, o: calls.append((a, k, o[0])), with_kwargs=True)
    task.latents([0, 1], gradients=False)
    handle.remove()
    torch.manual_seed(3)
    with apply_gates(denoiser(pipe), values, sites):
        errors = [(denoiser(pipe)(*a, **k)[0] - o).square().mean() / o.var() for a, k, o in calls]
    expected = torch.stack(errors).mean()
    gradients = torch.autograd.grad(expected, list(gates.log_alpha.values()), retain_graph=True)
    torch.manual_seed(3)
    loss = task.stepwise([0, 1], values, gates, 1.0)
    assert len(calls) == 3 and loss == pytest.approx(expected.item(), rel=1e-4)
    for value, gradient in zip(gates.log_alpha.values(), gradients, strict=True):
        assert torch.allclose(value.grad, gradient, rtol=1e-3, atol=1e-7)


def test_learning_one_step_at_a_time_closes_gates_and_says_what_it_cannot_do():
    pipe = tiny_sd()
    gates = quiet(pipe, config=replace(QUICK, objective="step"))
    assert gates.history[-1]["regulariser"] < gates.history[0]["regulariser"]
    with pytest.raises(EcoDiffError, match="objective='step' takes reconstruction='mse'"):
        LearnConfig(objective="step", reconstruction="norm")
