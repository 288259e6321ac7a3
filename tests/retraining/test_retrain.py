"""Retraining: the loss falls, only what should change changes, and the result is an ordinary pruned pipeline."""

import importlib
import math
import sys
from functools import wraps
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, StableDiffusionPipeline, UniPCMultistepScheduler
from tiny import PROMPTS, TINY, TOKENS, latents, tiny_flux, tiny_sd, tiny_sdxl, tiny_wan

from ecodiff.errors import EcoDiffError
from ecodiff.method.emptied import is_emptied
from ecodiff.method.sites import find_sites
from ecodiff.method.surgery import prune
from ecodiff.pipelines import conditioning
from ecodiff.pipelines.parts import denoiser
from ecodiff.retraining import losses, two_four
from ecodiff.retraining.retrain import RetrainConfig, Task, add_adapters, retrain

PICTURES = torch.randint(256, (4, 3, 16, 16), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
QUICK = {"steps": 2, "batch_size": 2, "lr": 1e-2, "rank": 2}


def config_for(pipe, **more):
    length = {"max_sequence_length": TOKENS} if hasattr(pipe, "transformer") else {}
    return RetrainConfig(**{**QUICK, "call": length, **more})


def quiet(pipe, **more):
    return retrain(pipe, PICTURES, PROMPTS, config_for(pipe, **more), progress=False)


def smaller(pipe):
    """Half of the units gone; of the first attention and the last feed-forward, all."""
    sites = find_sites(denoiser(pipe))
    mask = {name: torch.arange(site.units) % 2 == 0 for name, site in sites.items()}
    for kind, place in (("attention", 0), ("feed_forward", -1)):
        name = [name for name, site in sites.items() if site.kind == kind][place]
        mask[name] = torch.zeros_like(mask[name])
    return prune(pipe, mask)


def weights(pipe):
    return {name: value.clone() for name, value in denoiser(pipe).state_dict().items()}


def changed(before, after):
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def set_loss(pipe):
    """The objective on all four pictures, averaged over fixed noise and time steps."""
    task = Task(pipe, PICTURES, PROMPTS, config_for(pipe), torch.device("cpu"))
    with torch.no_grad():
        return sum(task.loss(range(4), torch.Generator().manual_seed(seed)).item() for seed in range(4)) / 4


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("model", TINY)
def test_the_loss_falls_on_every_pipeline_also_where_a_site_has_no_unit_left(model, method):
    pipe = smaller(TINY[model]())
    before, plain = set_loss(pipe), weights(pipe)
    rate = 3e-2 if method == "lora" else 3e-3
    better = quiet(pipe, method=method, steps=8, batch_size=4, lr=rate, rank=4)
    assert set_loss(better) < 0.95 * before
    assert not changed(plain, weights(pipe)) and set_loss(pipe) == before


@pytest.mark.slow
@pytest.mark.parametrize("model", TINY)
def test_straight_through_ends_in_2_4_weights_that_are_better_than_cut_ones(model):
    pipe = smaller(TINY[model]())
    cut = set_loss(two_four.sparsify(pipe))
    better = quiet(pipe, method="2:4", steps=8, batch_size=4, lr=3e-3)
    assert weights(better).keys() == weights(pipe).keys()
    layers = two_four.layers_2_4(denoiser(better))
    assert layers
    for layer in layers.values():
        groups = layer.weight.movedim(1, -1).reshape(-1, 4)
        assert ((groups == 0).sum(1) >= 2).all()
    assert set_loss(better) < 0.95 * cut


@pytest.mark.slow
@pytest.mark.parametrize("build", [tiny_sd, tiny_sdxl, tiny_flux])
def test_adapters_change_the_layers_of_the_sites_and_nothing_else(build):
    pipe = smaller(build())
    sites = find_sites(denoiser(pipe)).values()
    layers = {span.layer for site in sites for span in (*site.writers, *site.readers)}
    expected = {f"{layer}.weight" for layer in layers if denoiser(pipe).get_submodule(layer).weight.numel()}
    better = quiet(pipe)
    assert changed(weights(pipe), weights(better)) == expected
    only = {f"{span.layer}.weight" for s in sites if s.kind == "attention" for span in (*s.writers, *s.readers)}
    assert changed(weights(pipe), weights(quiet(pipe, kinds=("attention",)))) == only & expected


@pytest.mark.slow
def test_full_fine_tuning_changes_all_that_the_denoiser_uses_and_no_other_part():
    pipe = smaller(tiny_sdxl())
    others = {
        name: {key: value.clone() for key, value in part.state_dict().items()}
        for name, part in pipe.components.items()
        if isinstance(part, torch.nn.Module) and part is not denoiser(pipe)
    }
    better = quiet(pipe, method="full")
    before, after = weights(pipe), weights(better)
    readers = {"norm1": "attn1", "norm2": "attn2", "norm3": "ff.net.2"}

    def is_read(name):
        """Whether anything reads what this parameter's layer writes: a norm in front of an emptied part is not read."""
        block, _, norm = name.rpartition(".")[0].rpartition(".")
        if "transformer_blocks" not in block or norm not in readers:
            return True
        return not is_emptied(denoiser(pipe).get_submodule(f"{block}.{readers[norm]}"))

    assert changed(before, after) == {name for name, value in before.items() if value.numel() and is_read(name)}
    for name, values in others.items():
        assert better.components[name] is pipe.components[name]
        assert not changed(values, better.components[name].state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
def test_no_steps_give_the_same_pipeline_bit_for_bit(method):
    for build in (tiny_sd, tiny_flux):
        pipe = smaller(build())
        same = quiet(pipe, method=method, steps=0)
        assert torch.equal(latents(pipe), latents(same)) and denoiser(same) is not denoiser(pipe)


@pytest.mark.slow
@pytest.mark.parametrize("build", [tiny_sdxl, tiny_flux])
def test_merged_adapters_draw_what_unmerged_ones_do(build, monkeypatch):
    module, drawn = importlib.import_module("ecodiff.retraining.retrain"), {}
    merged = module._merged
    pipe = smaller(build())

    def look(network, config):
        drawn["unmerged"] = latents(module.with_denoiser(pipe, network))
        assert any("lora_B" in name for name in network.state_dict())
        return merged(network, config)

    monkeypatch.setattr(module, "_merged", look)
    better = quiet(pipe)
    assert (latents(better) - drawn["unmerged"]).abs().max() < 1e-4
    assert (latents(better) - latents(pipe)).abs().max() > 1e-2
    assert not any("lora" in name for name in weights(better))


@pytest.mark.slow
def test_the_result_is_saved_and_loaded_and_pruned_again_as_before(tmp_path):
    for build in (tiny_sd, tiny_flux):
        pipe = smaller(build())
        better = quiet(pipe)
        better.save_pretrained(tmp_path / build.__name__)
        loaded = DiffusionPipeline.from_pretrained(tmp_path / build.__name__)
        assert type(denoiser(loaded)) is type(denoiser(better)) is type(denoiser(pipe))
        assert not changed(weights(better), weights(loaded))
        assert torch.equal(latents(better), latents(loaded))
        assert {n: (v.shape, v.dtype) for n, v in weights(better).items()} == {
            n: (v.shape, v.dtype) for n, v in weights(pipe).items()
        }
        name, site = next(iter(find_sites(denoiser(better)).items()))
        assert latents(prune(better, {name: torch.zeros(site.units, dtype=torch.bool)})).isfinite().all()


@pytest.mark.slow
def test_same_seed_same_weights_and_random_state_stays():
    pipe = smaller(tiny_sd())
    torch.manual_seed(1)
    first = weights(quiet(pipe))
    state = torch.get_rng_state()
    torch.manual_seed(2)
    assert not changed(first, weights(quiet(pipe)))
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())
    assert changed(first, weights(quiet(pipe, seed=1)))


@pytest.mark.slow
def test_an_interruption_or_a_loss_that_is_not_finite_leaves_the_pipeline_untouched(monkeypatch):
    pipe = smaller(tiny_sdxl())
    denoiser(pipe).conv_in.weight.requires_grad_(False)
    before, flags = weights(pipe), [p.requires_grad for p in denoiser(pipe).parameters()]
    backward = Task.backward

    def interrupted(self, step):
        if step == 1:
            raise KeyboardInterrupt
        return backward(self, step)

    for method in ("lora", "full"):
        monkeypatch.setattr(Task, "backward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            quiet(pipe, method=method)
        monkeypatch.setattr(Task, "backward", lambda self, step: math.nan if step else backward(self, step))
        with pytest.raises(EcoDiffError, match="Step 2: loss nan"):
            quiet(pipe, method=method)
    assert not changed(before, weights(pipe))
    assert [p.requires_grad for p in denoiser(pipe).parameters()] == flags
    assert all(p.grad is None for p in denoiser(pipe).parameters()) and "forward" not in vars(denoiser(pipe))
    monkeypatch.undo()
    assert [p.requires_grad for p in denoiser(quiet(pipe)).parameters()] == flags


@pytest.mark.slow
def test_half_precision_pipelines_are_trained_in_fp32_and_come_back_as_they_were():
    pipe = smaller(tiny_sdxl()).to(torch.float16)
    pipe.vae.to(torch.float32)
    better = quiet(pipe, mixed_precision="bf16")
    assert {value.dtype for value in weights(better).values()} == {torch.float16}
    assert changed(weights(pipe), weights(better))
    assert not changed(weights(pipe), weights(quiet(pipe, steps=0)))


def test_micro_batches_make_steps_of_the_same_pictures(monkeypatch):
    pipe, seen = tiny_sd(), []
    loss = Task.loss
    monkeypatch.setattr(Task, "loss", lambda self, part, g: (seen.append(list(part)), loss(self, part, g))[1])
    quiet(pipe, steps=1, batch_size=4, micro_batch_size=3)
    assert [len(part) for part in seen] == [3, 1] and sorted(sum(seen, [])) == [0, 1, 2, 3]


def test_progress_says_what_it_will_cost_and_history_keeps_a_row_a_step(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    history = []
    retrain(tiny_sd(), PICTURES, PROMPTS, RetrainConfig(**QUICK), history=history)
    shown = capsys.readouterr()
    assert "2 steps of 2 pictures (lora), on cpu: about" in shown.err and "loss=" in shown.err
    assert [row["step"] for row in history] == [1, 2]
    assert all(row["loss"] > 0 and row["gradient_norm"] > 0 and row["seconds"] > 0 for row in history)


def test_a_denoiser_that_predicts_the_target_has_no_loss():
    x, generator = torch.randn(5, 4, 8, 8), torch.Generator
    noise = torch.randn(x.shape, generator=generator().manual_seed(7))
    for kind in ("epsilon", "v_prediction", "sample"):
        scheduler = DDPMScheduler(prediction_type=kind)
        share = scheduler.alphas_cumprod.sqrt(), (1 - scheduler.alphas_cumprod).sqrt()

        def exact(noisy, timestep, kind=kind, share=share):
            a, s = (value[timestep][:, None, None, None] for value in share)
            torch.testing.assert_close(noisy, a * x + s * noise)
            return SimpleNamespace(sample={"epsilon": noise, "v_prediction": a * noise - s * x, "sample": x}[kind])

        loss = losses.training_loss(scheduler)(exact, x, {}, generator().manual_seed(7))
        assert loss < 1e-12, kind

    def flow(noisy, timestep, guidance):
        share = timestep[:, None, None, None] / 1000
        torch.testing.assert_close(noisy, (1 - share) * x + share * noise)
        assert (guidance == 1).all()
        return SimpleNamespace(sample=noise - x)

    flow.config = {"guidance_embeds": True}
    assert losses.flow_loss(flow, x, {}, generator().manual_seed(7), time=1000.0) == 0


@pytest.mark.slow
def test_the_denoiser_is_told_what_the_pipelines_own_call_tells_it():
    told = {name: conditioning.conditioning(pipe := make(), PROMPTS[0], (16, 16), config_for(pipe).call)
            for name, make in TINY.items()}  # fmt: skip
    assert told["sd"].arguments["encoder_hidden_states"].shape == (1, TOKENS, 32)
    added = told["sdxl"].arguments["added_cond_kwargs"]
    assert added["time_ids"].tolist() == [[16, 16, 0, 0, 16, 16]] and added["text_embeds"].shape == (1, 32)
    assert (told["flux"].full_time, told["sd3"].full_time) == (1, 1000)
    assert told["flux"].arguments["guidance"].item() == 3.5  # what pictures are drawn with
    flux, settings = tiny_flux(), ((16, 16), config_for(tiny_flux()).call)
    rule = conditioning.rule_of_joining(flux, PROMPTS[:1] * 2, [told["flux"]] * 2, *settings)
    both = conditioning.join([told["flux"]] * 2, rule)
    assert both["img_ids"].shape == (16, 3) and both["pooled_projections"].shape == (2, 32)
    given = {**config_for(pipe := tiny_flux()).call, "guidance_scale": 2.0}
    assert conditioning.conditioning(pipe, PROMPTS[0], (16, 16), given).arguments["guidance"].item() == 2
    embeds = told["sd"].arguments["encoder_hidden_states"]
    again = conditioning.conditioning(tiny_sd(), {"prompt_embeds": embeds}, (16, 16), {"guidance_scale": 5.0})
    assert torch.equal(again.arguments["encoder_hidden_states"], embeds)


@pytest.mark.parametrize(
    "bad",
    [
        {"method": "dora"}, {"steps": -1}, {"steps": 1.5}, {"batch_size": 0}, {"micro_batch_size": 0}, {"rank": 0},
        {"lr": 0}, {"lr": math.nan}, {"alpha": -1.0}, {"clip_grad_norm": math.inf}, {"weight_decay": -1},
        {"weight_decay": None}, {"mixed_precision": "fp16"}, {"kinds": ()}, {"kinds": ("heads",)},
        {"lr": "fast"}, {"call": None},
    ],
)  # fmt: skip
def test_bad_settings_are_named(bad):
    with pytest.raises(EcoDiffError, match=next(iter(bad))):
        RetrainConfig(**bad)


def test_published_defaults():
    lora, full = RetrainConfig(), RetrainConfig(method="full")
    assert (lora.method, lora.steps, lora.batch_size, lora.rank) == ("lora", 10_000, 32, 16)
    assert (lora.learning_rate, full.learning_rate, RetrainConfig(lr=3e-4).learning_rate) == (1e-6, 1e-7, 3e-4)


@pytest.mark.parametrize(
    ("pictures", "captions", "message"),
    [
        (PICTURES.float(), PROMPTS, "uint8"), (PICTURES[0], PROMPTS, "uint8"), ([PICTURES], PROMPTS, "uint8"),
        (PICTURES[:, :2], PROMPTS, "uint8"), (PICTURES, PROMPTS[:3], "3 captions"), (PICTURES, "a cat", "list"),
        (PICTURES[:0], [], "at least one"), (PICTURES, [*PROMPTS[:3], " "], "empty"),
        (PICTURES[..., :15, :15], PROMPTS, "divisible by 8"), (PICTURES[:, None], PROMPTS, "VAE of images or videos"),
    ],
)  # fmt: skip
def test_bad_pictures_and_captions(pictures, captions, message):
    with pytest.raises(EcoDiffError, match=message):
        retrain(tiny_sd(), pictures, captions, RetrainConfig(**QUICK), progress=False)


def with_statistics(pipe):
    """The pipeline with a mean and a standard deviation of each channel of its VAE's latents that are not 0 and 1."""
    pipe.vae.register_to_config(latents_mean=[0.3, -0.2, 0.1, 0.0], latents_std=[0.5, 2.0, 1.5, 1.0])
    return pipe


@pytest.mark.parametrize("pictures", [PICTURES, PICTURES[:, None].repeat(1, 5, 1, 1, 1)], ids=["images", "clips"])
def test_a_pipeline_of_clips_is_retrained_on_images_and_on_clips(pictures):
    pipe, history = with_statistics(tiny_wan(None, second=False)), []
    pipe.scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    task = Task(pipe, pictures, PROMPTS, config_for(pipe), torch.device("cpu"))
    assert task.latents.shape == (4, 4, 1 if pictures.ndim == 4 else 2, 2, 2) and task.loss_of.func is losses.flow_loss
    retrain(pipe, pictures, PROMPTS, config_for(pipe, steps=12, lr=3e-2), history=history, progress=False)
    assert sum(row["loss"] for row in history[-4:]) < sum(row["loss"] for row in history[:4])


@pytest.mark.parametrize("make", [*TINY.values(), lambda: tiny_wan(None, second=False)], ids=[*TINY, "wan"])
@pytest.mark.parametrize("statistics", [False, True])
def test_images_become_latents_as_the_pipelines_own_ones_are_scaled(make, statistics, monkeypatch):
    pipe = with_statistics(make()) if statistics else make()
    told = PROMPTS[0], (16, 16), config_for(pipe).call
    scaled = conditioning.reads_as_said(pipe, *told)
    known = not statistics or isinstance(pipe, (type(tiny_sdxl()), type(tiny_wan(None, second=False))))
    assert scaled == known and "decode" not in vars(pipe.vae)  # others do not look at these statistics
    if not scaled:
        with pytest.raises(EcoDiffError, match="scales its latents otherwise"):
            quiet(pipe)


class Odd(StableDiffusionPipeline):
    """A pipeline whose loop does something with latents, predictions or times that no loss knows of."""

    fault = None

    @wraps(StableDiffusionPipeline.__call__)
    def __call__(self, *args, **kwargs):
        step, decode = self.scheduler.step, self.vae.decode
        if self.fault == "sign":
            self.scheduler.step = lambda output, *args, **more: step(-output, *args, **more)
        if self.fault == "time":
            self.scheduler.step = lambda output, time, *args, **more: step(output, 999 - time, *args, **more)
        if self.fault == "scale":
            self.vae.decode = lambda latents, *args, **more: decode(2 * latents, *args, **more)
        if self.fault == "twice":
            self.scheduler.step = lambda *args, **more: [step(*args, **more) for _ in range(2)][0]
        try:
            return super().__call__(*args, **kwargs)
        finally:
            vars(self.scheduler).pop("step", None)
            self.vae.decode = decode


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("sign", "changes what its denoiser predicts"),
        ("time", "where its scheduler says"),
        ("scale", "scales its latents otherwise"),
        ("twice", "2 times for 4 steps"),
    ],
)
def test_a_loop_that_does_otherwise_than_the_loss_supposes_is_refused(fault, reason):
    pipe = Odd(**tiny_sd().components, requires_safety_checker=False)
    before = weights(quiet(pipe, steps=1))
    Odd.fault = fault
    try:
        with pytest.raises(EcoDiffError, match=f"Odd cannot be trained on pictures here, since .*{reason}"):
            quiet(pipe)
    finally:
        Odd.fault = None
    assert not changed(before, weights(quiet(pipe, steps=1)))


@pytest.mark.parametrize("make", [*TINY.values(), lambda: tiny_wan(None, second=False)], ids=[*TINY, "wan"])
def test_ordinary_loops_do_what_the_loss_supposes(make):
    pipe = make()
    assert conditioning.otherwise_trained(pipe, PROMPTS[0], (16, 16), config_for(pipe).call) is None


@pytest.mark.slow
def test_what_cannot_be_retrained_says_why(monkeypatch):
    pipe = tiny_sd()
    pipe.scheduler = UniPCMultistepScheduler(prediction_type="score")
    with pytest.raises(EcoDiffError, match="UniPC.*does not say"):
        quiet(pipe)
    with pytest.raises(EcoDiffError, match="no argument 'sharpness'"):
        quiet(tiny_sd(), call={"sharpness": 2})
    with pytest.raises(EcoDiffError, match="no layers of the kinds modulation"):
        quiet(tiny_sd(), kinds=("modulation",))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "peft", None)
        with pytest.raises(EcoDiffError, match="needs peft"):
            add_adapters(denoiser(pipe), RetrainConfig())
    from peft import LoraConfig

    pipe = tiny_sd()
    pipe.unet.add_adapter(LoraConfig(r=1, target_modules=["to_q"]))
    with pytest.raises(EcoDiffError, match="has adapters"):
        quiet(pipe)
