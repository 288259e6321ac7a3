"""Costs counted without weights: against hand counts, published numbers, and real runs of tiny pipelines."""

import json
import sys
from dataclasses import replace
from functools import cache

import pytest
import torch
from tiny import TINY, TOKENS, call_kwargs, tiny_sd
from torch import nn

from ecodiff import EcoDiffError, LearnConfig, learn, prune
from ecodiff.__main__ import main
from ecodiff.cost import presets
from ecodiff.cost.counting import cost, fit
from ecodiff.cost.solve import solve
from ecodiff.cost.trace import trace
from ecodiff.cost.units import CONTEXT, FRAGMENTS, parse_bytes, usable
from ecodiff.lab import paper
from ecodiff.method.gates import Gates
from ecodiff.method.hooks import apply_gates
from ecodiff.method.mask import make_mask
from ecodiff.method.sites import find_sites
from ecodiff.method.trajectory import final_latents
from ecodiff.pipelines.parts import denoiser

PARAMETERS = {
    "sd15": 859_520_964,
    "sd2": 865_910_724,
    "sdxl": 2_567_463_684,
    "sd3-medium": 2_028_328_000,
    "sd3.5-large": 8_056_627_520,
    "flux-schnell": 11_891_178_560,
    "flux-dev": 11_901_408_320,
    "pixart-sigma": 610_856_096,
    "sana": 1_604_462_752,
    "wan-1.3b": 1_418_996_800,
    "flux2-klein-4b": 3_875_544_576,
    "wan2.2-5b": 4_999_787_712,
    "z-image-turbo": 6_154_908_736,
    "hunyuanvideo-1.5": 8_326_608_160,
    "flux2-klein-9b": 9_078_581_248,
    "krea-2": 12_820_073_036,
    "ltx-2": 18_876_174_592,
    "qwen-image": 20_430_401_088,
    "wan2.2-14b": 28_576_983_168,
    "flux2-dev": 32_223_281_152,
}


@cache
def tiny(name):
    return TINY[name]()


@cache
def counted(name="sd2", **options):
    """Full-size counts are shared by the tests: each takes seconds."""
    return cost(name, inner=False, **options)


@cache
def forward(name):
    """One forward of one sample at the preset's size, without gradients."""
    p, network = presets.preset(name), presets.preset(name).build()
    shapes, _ = presets.inputs(network, presets.Geometry(1, p.size[0] // 8, p.size[1] // 8, 1, p.text_tokens))
    return trace(network, shapes, dtype=torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("name", PARAMETERS)
def test_presets_have_the_published_number_of_parameters(name):
    p = presets.preset(name)
    assert sum(parameter.numel() for parameter in p.build().parameters()) == PARAMETERS[name] == p.parameters
    assert presets.preset(p.id) is not None


SOURCES = {path.stem: json.loads(path.read_text()).get("source", {}) for path in presets.FOLDER.glob("*.json")}
SOURCED = {name: source for name, source in SOURCES.items() if "weights" in source}
ANNOUNCED = {name: source for name, source in SOURCES.items() if "published" in source}


@pytest.mark.parametrize("name", ANNOUNCED)
def test_presets_have_the_billions_that_are_announced(name):
    printed = ANNOUNCED[name]["published"]
    digits = len(printed.partition(".")[2])
    assert f"{presets.preset(name).parameters / 1e9:.{digits}f}" == printed


@pytest.mark.slow
@pytest.mark.parametrize("name", SOURCED)
def test_presets_fill_the_published_weights_file(name):
    source, network = SOURCED[name], presets.preset(name).build()
    width = getattr(torch, source["weights_dtype"]).itemsize
    size = width * sum(tensor.numel() for tensor in network.state_dict().values())
    if "weights_bytes" in source:  # what the file has beside its tensors is a header of names and shapes
        assert 0 < source["weights_bytes"] - size < 150 * len(network.state_dict())
    else:  # printed to hundredths, each file on its own
        assert abs(sum(source["weights_gb"]) - size / 1e9) <= 0.005 * len(source["weights_gb"]) + 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flux2-klein-4b", "z-image-turbo", "krea-2", "qwen-image", "ltx-2", "wan2.2-5b"])
def test_presets_of_2026_are_counted_and_pruned(name):
    """Removing a fifth of the units removes parameters and operations of one call, and hardly more than a fifth.

    Which units go is random, and those of blocks that see the image cost more operations than those that see the text.
    """
    whole = cost(name, ratio=0.2, steps=1, guidance=0.0, inner=False)
    small = whole.pruned
    assert 0.8 <= small.parameters["total"] / whole.parameters["total"] < 0.95
    assert 0.79 <= small.flops.total / whole.flops.total < 1.0
    assert whole.flops.linear > 2 * whole.parameters["total"]  # each weight meets many tokens


def test_two_experts_of_a_preset_are_counted_both(monkeypatch):
    small = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32, "text_dim": 16}
    p = presets.preset("wan2.2-14b")
    one, two = (replace(p, config={**p.config, **small}, experts=count) for count in (1, 2))
    counts = {}
    for each in (one, two):
        monkeypatch.setattr(presets, "preset", lambda name, each=each: each)
        counts[each.experts] = cost("wan2.2-14b", size=64, frames=5, steps=2, inner=False)
    assert counts[2].parameters["total"] == 2 * counts[1].parameters["total"]
    assert counts[2].picture_flops == counts[1].picture_flops  # each step calls one of them


def test_presets_are_all_tested():
    assert set(presets.names()) == set(PARAMETERS)


def test_flops_of_one_linear_layer():
    flops = trace(nn.Linear(5, 7), {"input": (2, 3, 5)}, dtype=torch.float32).flops
    assert (flops.linear, flops.convolution, flops.attention) == (2 * 2 * 3 * 5 * 7, 0, 0)


@pytest.mark.parametrize("bias", [True, False])
def test_flops_of_a_linear_layer_whose_input_is_not_contiguous(bias):
    class Transposed(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(5, 7, bias=bias)

        def forward(self, x):
            return self.linear(x.transpose(1, 2))

    flops = trace(Transposed(), {"x": (2, 5, 3)}, dtype=torch.float32).flops
    assert (flops.linear, flops.attention) == (2 * 2 * 3 * 5 * 7, 0)


def test_flops_of_one_convolution():
    flops = trace(nn.Conv2d(4, 6, 3, padding=1, stride=2), {"input": (2, 4, 8, 8)}, dtype=torch.float32).flops
    assert (flops.linear, flops.convolution, flops.attention) == (0, 2 * 2 * 6 * 4 * 9 * 4 * 4, 0)


def test_flops_of_one_attention():
    from diffusers.models.attention_processor import Attention

    attention = Attention(query_dim=8, heads=2, dim_head=4, cross_attention_dim=6, bias=False)
    flops = trace(
        attention, {"hidden_states": (3, 5, 8), "encoder_hidden_states": (3, 7, 6)}, dtype=torch.float32
    ).flops
    assert flops.linear == 2 * 3 * (5 * 8 * 8 + 2 * 7 * 6 * 8 + 5 * 8 * 8)
    assert flops.attention == 2 * (2 * 3 * 2 * 5 * 7 * 4)
    assert flops.paper == flops.linear and flops.total == flops.linear + flops.attention


@pytest.mark.slow
def test_table_1_counts_five_forwards_of_flux_at_256_text_tokens():
    published = next(row["gflop"] for row in paper.table("table1") if row["model"] == "FLUX" and row["ratio"] == 0)
    assert round(5 * forward("flux-schnell").flops.paper / 1e12) * 1000 == published == 281_000


@pytest.mark.slow
def test_table_1_counts_eighty_forwards_of_sdxl():
    published = next(row["gflop"] for row in paper.table("table1") if row["model"] == "SDXL" and row["ratio"] == 0)
    once = forward("sdxl").flops.paper
    assert round(80 * once / 1e12) * 1000 == published == 478_000
    assert {round(n * once / 1e12) for n in (50, 100)} == {
        299,
        598,
    }  # the caption's 50 steps, without and with guidance


def test_table_1_prints_nominal_gflop_for_pruned_models():
    rows = paper.table("table1")
    base = {row["model"]: row["gflop"] for row in rows if row["ratio"] == 0}
    for row in rows:
        if row["gflop"]:
            assert abs(row["gflop"] - (1 - row["ratio"]) * base[row["model"]]) <= 500  # printed in thousands


@pytest.mark.slow
def test_published_masks_leave_the_parameters_of_table_1():
    from ecodiff.method.surgery import prune_denoiser

    network = presets.preset("sdxl").build()
    for column, billion in (("kept_10", 2.343), ("kept_20", 2.114)):
        mask = {row["site"]: torch.arange(row["units"]) < row[column] for row in paper.table("sdxl_lambda")}
        left = sum(parameter.numel() for parameter in prune_denoiser(network, mask).parameters())
        assert round(left / 1e9, 3) == billion


@pytest.mark.slow
def test_cost_grows_with_steps_and_batch():
    one = counted(steps=2)
    more_steps, more_pictures = counted(steps=5), counted(steps=2, batch=2)
    assert more_steps.update_peak(checkpoint=False) > 1.5 * one.update_peak(checkpoint=False)
    assert more_steps.update_peak() - one.update_peak() < 0.01 * one.update_peak()
    assert more_pictures.saved == pytest.approx(2 * one.saved, rel=0.01)
    assert more_pictures.inference_peak() > one.inference_peak()
    assert more_pictures.flops == one.flops  # of one sample
    assert more_steps.picture_flops.paper == pytest.approx(2.5 * one.picture_flops.paper)
    peaks = [more_steps.update_peak(keep_last=k) for k in range(6)]
    assert peaks[0] == peaks[1] and peaks == sorted(peaks) and peaks[5] == more_steps.update_peak(checkpoint=False)
    assert peaks[2] < peaks[3] < peaks[4]


@pytest.mark.slow
def test_guidance_doubles_the_work():
    guided, free = counted(steps=2), counted(steps=2, guidance=1.0)
    assert guided.forwards == 2 * free.forwards and guided.flops == free.flops
    assert guided.saved == pytest.approx(2 * free.saved, rel=0.01)


@pytest.mark.slow
def test_pruning_by_ratio_and_by_mask():
    pruned = counted(steps=2, ratio=0.2).pruned
    original = counted(steps=2)
    removable = original.parameters["attention"] + original.parameters["feed_forward"]
    assert pruned.parameters["total"] == pytest.approx(original.parameters["total"] - 0.2 * removable, rel=0.02)
    assert pruned.flops.paper < original.flops.paper and pruned.saved < original.saved
    assert pruned.flops.convolution == original.flops.convolution
    assert pruned.weights < original.weights and "random" in pruned.pruning
    pipe = tiny("sd")
    sites = find_sites(pipe.unet)
    scores = {name: torch.rand(site.units, generator=torch.Generator().manual_seed(1)) for name, site in sites.items()}
    mask = make_mask(scores, sites, 0.4)
    kept = {name: int(keep.sum()) for name, keep in mask.items()}
    by_mask, by_counts = (cost(pipe, size=16, mask=m, inner=False).pruned for m in (mask, kept))
    assert by_mask == by_counts
    already = cost(prune(pipe, mask), size=16, inner=False)
    assert already.parameters["total"] == by_mask.parameters["total"] and already.flops == by_mask.flops


@pytest.mark.slow
def test_budget_decides_keep_last():
    two = counted(steps=20)
    budget = (two.update_peak(keep_last=7) + 0.5e9 + 1e6) / 0.97
    assert two.max_keep_last(int(budget)) == 7
    assert two.max_keep_last("2TB") == 20
    assert two.max_keep_last("1GB") is None


@pytest.mark.slow
def test_a_configuration_is_made_to_fit_a_memory_budget():
    pipe, prompts = tiny("sd"), ["a cat", "a dog"]
    pipe.set_progress_bar_config(disable=True)
    size = {"height": 16, "width": 16}
    config = LearnConfig(updates=2, batch_size=2, num_inference_steps=4, call=size, keep_last=0, target_open=None)
    need = [cost(pipe, size=16, batch=2, steps=4, inner=False).update_peak(keep_last=k) for k in range(5)]
    assert need[1] < need[2] < need[4]
    room_for_two = round((need[2] + 500_000_000) / 0.97) + 2  # the third step does not fit any more
    assert fit(pipe, config, prompts[0], room_for_two) == replace(config, checkpoint=True, keep_last=2)
    assert fit(pipe, config, prompts[0], "8GB") == replace(config, checkpoint=True, keep_last=4)
    with pytest.raises(EcoDiffError, match="even with one step at a time.*micro_batch_size"):
        fit(pipe, config, prompts[0], "510MB")
    with pytest.raises(EcoDiffError, match="amount of memory"):
        fit(pipe, config, prompts[0], "much")


@pytest.mark.slow
def test_a_run_goes_on_with_more_memory_to_the_same_mask(tmp_path):
    pipe, prompts = tiny("sd"), ["a cat", "a dog"]
    pipe.set_progress_bar_config(disable=True)
    size = {"height": 16, "width": 16}
    config = LearnConfig(updates=2, batch_size=2, num_inference_steps=4, call=size, keep_last=0, target_open=None)
    free = learn(pipe, prompts, config, progress=False)
    first = learn(pipe, prompts, replace(config, updates=1, keep_last=2), resume_dir=tmp_path, progress=False)
    assert len(first.history) == 1
    roomy = fit(pipe, config, prompts[0], "8GB")
    again = learn(pipe, prompts, roomy, resume_dir=tmp_path, progress=False)
    assert all(torch.equal(again.log_alpha[name], value) for name, value in free.log_alpha.items())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux"])
def test_predicted_bytes_against_a_real_run(name):
    """Saved bytes within 5 %, peaks of all variants within 10 % of what torch's allocator reports on the CPU."""
    pipe, steps, batch = tiny(name), 4, 6 if name != "sd3" else 16
    pipe.set_progress_bar_config(disable=True)
    network, guidance = denoiser(pipe), 5.0
    arguments = call_kwargs(pipe, n=1, steps=steps, guidance_scale=guidance)
    arguments.update(prompt=arguments["prompt"] * batch)
    arguments.pop("output_type")
    tokens = {"sd3": 24, "flux": 12}.get(name)
    size = 32 if name == "sd3" else 48  # tiny_sd3 knows positions up to 16 x 16
    arguments.update(height=size, width=size)
    predicted = cost(pipe, size=size, batch=batch, steps=steps, guidance=guidance, dtype="fp32", text_tokens=tokens)

    gates = Gates.start(find_sites(network), 3.0)
    weights = {t.untyped_storage().data_ptr() for t in (*network.parameters(), *network.buffers())}
    saved = []

    def update(**options):
        for value in gates.log_alpha.values():
            value.grad = None
        with apply_gates(network, gates.sample(torch.Generator().manual_seed(0)), gates.sites):
            final_latents(
                pipe, **(arguments | {"generator": torch.Generator().manual_seed(0)}), **options
            ).sum().backward()

    original, calls = network.forward, {}

    def watched(*args, **kwargs):
        def remember(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                calls[storage.data_ptr()] = storage.nbytes()
            return tensor

        calls.clear()
        with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
            result = original(*args, **kwargs)
        saved.append(sum(calls.values()))
        return result

    network.forward = watched
    try:
        update(checkpoint=False)
    finally:
        del network.forward
    assert predicted.saved == pytest.approx(saved[-1], rel=0.05)

    loaded = predicted.weights + predicted.text_encoders + predicted.vae
    for options, prediction in (
        ({"checkpoint": False}, predicted.update_peak(checkpoint=False)),
        ({"keep_last": 1}, predicted.update_peak()),
        ({"keep_last": 3}, predicted.update_peak(keep_last=3)),
    ):
        assert prediction - loaded == pytest.approx(_peak(lambda options=options: update(**options)), rel=0.1), options
    network.enable_gradient_checkpointing()
    try:
        assert predicted.update_peak(inner=True) - loaded == pytest.approx(_peak(lambda: update(keep_last=1)), rel=0.1)
    finally:
        network.disable_gradient_checkpointing()


def _peak(run):
    """Most bytes alive at once while `run()` runs, above what was alive before: events of torch's own allocator."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


@pytest.mark.slow
def test_activation_checkpointing_inside_the_denoiser():
    whole = cost(tiny("sdxl"), size=64, steps=3)
    assert whole.update_peak(inner=True) < whole.update_peak()
    assert whole.update_peak(inner=True, offload=True) < whole.update_peak(inner=True)


def test_sizes_of_memory():
    assert [parse_bytes(t) for t in ("24GB", "8 GiB", "512MB", "1.5 TB", 10)] == [
        24 * 10**9,
        2**33,
        512 * 10**6,
        15 * 10**11,
        10,
    ]
    assert usable("24GB") == round(24e9 * 0.97) - 500_000_000
    for nonsense in ("", "GB", "-3GB", "24 bananas", "0GB", None, True):
        with pytest.raises(EcoDiffError, match="amount of memory"):
            parse_bytes(nonsense)


@pytest.mark.parametrize(
    "options",
    [
        {"batch": 0}, {"batch": 1.5}, {"steps": 0}, {"steps": "many"}, {"guidance": -1}, {"dtype": "int8"},
        {"size": 1001},
        {"size": (512,)}, {"size": -8}, {"ratio": 1.0}, {"ratio": -0.1}, {"ratio": 0.2, "mask": {}}, {"text_tokens": 0},
        {"mask": {"nowhere": 3}},
    ],
)  # fmt: skip
def test_nonsense_gets_one_sentence(options):
    with pytest.raises(EcoDiffError) as error:
        cost(tiny("sd"), **{"size": 16, "inner": False, **options})
    assert len(str(error.value).splitlines()) == 1


def test_unknown_models_are_named():
    with pytest.raises(EcoDiffError, match="sdxl"):
        cost("sdxxl")
    with pytest.raises(EcoDiffError, match="pipeline is needed"):
        cost(42)


@pytest.mark.slow
def test_command(capsys, monkeypatch):
    assert main(["cost", "sd2", "--ratio", "0.2", "--steps", "10", "--batch", "2", "--gpu", "24GB"]) == 0
    shown = capsys.readouterr().out
    assert (
        "865.9 M" in shown
        and "Learning a mask: " in shown
        and "keep_last=" in shown
        and "Drawing after pruning" in shown
    )
    monkeypatch.setattr(sys.modules["ecodiff.cost"], "cost", lambda *_, **__: counted(steps=2))
    assert main(["cost", "sd2", "--gpu", "8GB", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert (
        row["parameters"]["total"] == PARAMETERS["sd2"]
        and row["update_peak"]["plain"] > row["update_peak"]["checkpointed"]
    )
    assert main(["cost", "--list"]) == 0
    assert "flux-dev" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ["cost", "sdxxl"],
        ["cost", "sd2", "--gpu", "some"],
        ["cost", "sd2", "--size", "1x2x3"],
        ["cost", "sd2", "--steps", "0"],
        ["cost", "sd2", "--fits", "8GB", "--ratio", "0.2"],
        ["cost", "sd2", "--fits", "8GB", "--time", "0.8"],
    ],
)
def test_command_errors(arguments, capsys):
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_published_tables_are_kept_as_printed():
    assert paper.claim("sdxl_plain_memory") == 1400
    for row in paper.table("table12"):  # App. N: one factor for all models
        assert row["carbon_g"] / row["gpu_hours"] == pytest.approx(75, rel=0.001)
    with pytest.raises(EcoDiffError):
        paper.table("table99")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "guidance"), [("sd", 5.0), ("sdxl", 1.0), ("sd3", 5.0), ("flux", 3.5)])
def test_the_pipeline_shows_the_arguments_of_a_class_that_is_not_known(name, guidance, monkeypatch):
    """Captured from the pipeline's own loop, the cost is the one that is counted from the known arguments."""
    pipe = TINY[name]()
    options = {"size": 32, "batch": 3, "steps": 4, "guidance": guidance, "inner": False}
    tokens = None if name in ("sd", "sdxl") else TOKENS
    known = cost(pipe, **options, text_tokens=2 * TOKENS if name == "sd3" else tokens, ratio=0.3)
    before = {key: repr(value) for key, value in vars(pipe.scheduler).items()}
    monkeypatch.setattr(presets, "INPUTS", {})
    shown = cost(pipe, **options, text_tokens=tokens, ratio=0.3)
    assert shown.flops == known.flops and shown.forwards == known.forwards and shown.calls == known.calls
    assert shown.parameters == known.parameters and shown.pruned.parameters == known.pruned.parameters
    assert shown.saved == pytest.approx(known.saved, rel=1e-3)
    assert shown.update_peak() == pytest.approx(known.update_peak(), rel=1e-3)
    assert before == {key: repr(value) for key, value in vars(pipe.scheduler).items()}
    assert "forward" not in vars(denoiser(pipe))


@pytest.mark.slow
def test_a_denoiser_of_another_class_is_costed_by_its_pipelines_own_call():
    pipe = _tiny_dit()
    asked = {"call": {"class_labels": [1, 2]}, "batch": 2}
    counted = cost(pipe, steps=3, guidance=4.0, **asked)
    assert counted.denoiser == "DiTTransformer2DModel" and (counted.calls, counted.forwards) == (3, 6)
    assert counted.size == (32, 32)  # 8 x 8 latents of a VAE that halves twice
    assert counted.flops.linear > 0 and counted.flops.attention > 0 and counted.saved > 0
    unguided = cost(pipe, steps=3, guidance=1.0, **asked)
    assert unguided.saved < counted.saved
    smaller = cost(pipe, steps=3, **asked, ratio=0.5, kinds=("feed_forward",)).pruned
    assert smaller.flops.linear < counted.flops.linear
    with pytest.raises(EcoDiffError, match="call={"):
        cost(pipe, steps=3)
    with pytest.raises(EcoDiffError, match="no argument 'prompt'"):
        cost(pipe, call={"prompt": "a cat"})
    with pytest.raises(EcoDiffError, match="mapping"):
        cost(pipe, call="a cat")


def _tiny_dit():
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        patch_size=2, num_embeds_ada_norm=10,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8), norm_num_groups=4, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
    )  # fmt: skip
    pipe = DiTPipeline(transformer, vae, DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.slow
def test_the_smallest_ratio_that_is_enough_is_found():
    found = solve("sd2", time=0.9)
    assert found.cost.pruned.picture_flops.total <= 0.9 * found.cost.picture_flops.total
    one_less = cost("sd2", ratio=found.ratio - 0.01, inner=False)
    assert one_less.pruned.picture_flops.total > 0.9 * one_less.picture_flops.total


def test_memory_to_fit_into_gives_the_ratio_and_the_mask():
    pipe = tiny_sd()
    need = cost(pipe, size=16).inference_peak()
    sites = find_sites(pipe.unet)
    scores = {name: torch.arange(site.units).float() for name, site in sites.items()}
    budget = round((need * 0.97 + CONTEXT) / (1 - FRAGMENTS))
    found = solve(pipe, fits=budget, scores=scores, size=16)
    assert 0 < found.ratio < 1 and found.cost.pruned.inference_peak() <= usable(budget)
    kept = {name: int(keep.sum()) for name, keep in found.mask.items()}
    assert kept == {name: int(keep.sum()) for name, keep in make_mask(scores, sites, found.ratio).items()}
    nothing_to_do = solve(pipe, fits="80GB", size=16)
    assert nothing_to_do.ratio == 0


@pytest.mark.parametrize(
    "goal, message",
    [({}, "either"), ({"fits": 1, "time": 0.5}, "either"), ({"time": 0}, "above 0"), ({"fits": "1MB"}, "needs")],
)
def test_a_goal_that_cannot_be_met_is_one_sentence(goal, message):
    with pytest.raises(EcoDiffError, match=message):
        solve(tiny_sd(), size=16, **goal)
