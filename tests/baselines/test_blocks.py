"""Block removal: a left out block passes on what it is given, scores are the errors of one, the knapsack is exact."""

from itertools import combinations

import pytest
import torch
from tiny import PROMPTS, TINY, latents, tiny_sd, tiny_sdxl
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ecodiff.baselines.blocks import (
    candidates,
    choose,
    choose_in_order,
    clip_scores,
    errors,
    left_out,
    remove,
    scores,
)
from ecodiff.errors import EcoDiffError
from ecodiff.method.generate import generate
from ecodiff.pipelines.parts import denoiser
from ecodiff.pipelines.prompts import mix


def settings(pipe, **more):
    length = {"max_sequence_length": 12} if hasattr(pipe, "transformer") else {}
    return {"num_inference_steps": 2, "guidance_scale": 3.0, "call": {"height": 16, "width": 16, **length},
            "progress": False, **more}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("model", TINY)
def test_every_candidate_can_go_on_every_pipeline(model):
    pipe = TINY[model]()
    found = candidates(denoiser(pipe))
    assert len(found) >= 1
    before = latents(pipe)
    for name, parameters in found.items():
        smaller = remove(pipe, [name])
        count = [sum(p.numel() for p in denoiser(p_).parameters()) for p_ in (pipe, smaller)]
        assert count[0] - count[1] == parameters
        with left_out(denoiser(pipe), [name]):
            expected = latents(pipe)
        assert torch.equal(latents(smaller), expected) and not torch.equal(expected, before)
    assert torch.equal(latents(pipe), before)


@pytest.mark.slow
def test_a_block_that_adds_nothing_has_the_lowest_score():
    pipe = tiny_sdxl()
    name = next(name for name in candidates(pipe.unet) if name.endswith("transformer_blocks.0"))
    block = pipe.unet.get_submodule(name)
    for layer in (block.attn1.to_out[0], block.attn2.to_out[0], block.ff.net[2]):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    found = scores(pipe, PROMPTS[:2], **settings(pipe))
    assert found.keys() == candidates(pipe.unet).keys()
    assert found[name] < 1e-10 < min(value for other, value in found.items() if other != name)


def test_error_of_a_set_is_the_change_of_the_prediction():
    pipe = tiny_sd()
    names = list(candidates(pipe.unet))[:2]
    changes = []

    def hook(module, args, kwargs, output):
        with left_out(module, names):
            changes.append((module.forward(*args, **kwargs)[0] - output[0]).square().mean().item())

    handle = pipe.unet.register_forward_hook(hook, with_kwargs=True)
    from ecodiff.scores.calibration import Sampling, draw

    draw(pipe, PROMPTS[:1], Sampling(**settings(pipe)))
    handle.remove()
    both, none, one = errors(pipe, PROMPTS[:1], [names, [], names[:1]], **settings(pipe))
    assert both == pytest.approx(sum(changes) / len(changes), rel=1e-4)
    assert none == 0 and one == pytest.approx(scores(pipe, PROMPTS[:1], **settings(pipe))[names[0]])


def test_choice_is_the_cheapest_set_that_is_large_enough():
    generator = torch.Generator().manual_seed(0)
    names = [f"block {i}" for i in range(9)]
    for ratio in (0.0, 0.1, 0.35, 0.7):
        costs = dict(zip(names, torch.rand(9, generator=generator).tolist(), strict=True))
        sizes = dict(zip(names, (100 * torch.randint(1, 9, (9,), generator=generator)).tolist(), strict=True))
        total = sum(sizes.values())
        sets = [s for n in range(10) for s in combinations(names, n) if sum(sizes[b] for b in s) >= ratio * total]
        best = min(sum(costs[b] for b in s) for s in sets)
        chosen = choose(costs, sizes, ratio)
        assert sum(sizes[b] for b in chosen) >= ratio * total
        # Sizes are rounded up to 1/5000 of their sum: at most one rounding step a block may be lost.
        nearby = [s for s in sets if sum(sizes[b] for b in s) >= ratio * total + 9 * total / 5000]
        assert best - 1e-9 <= sum(costs[b] for b in chosen) <= min(sum(costs[b] for b in s) for s in nearby) + 1e-9


class Redness:
    """A judge that likes red pictures, whatever the caption: features are the mean colour and a constant."""

    def image_features(self, images):
        return images.double().mean((2, 3)) / 255

    def text_features(self, captions):
        return torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.double).repeat(len(captions), 1)


@pytest.mark.slow
@pytest.mark.parametrize("model", [tiny_sd, TINY["flux"]])
def test_clip_score_of_a_block_is_what_pictures_lose_for_the_work_it_costs(model):
    pipe = model()
    options = settings(pipe)
    found = clip_scores(pipe, PROMPTS[:2], Redness(), seed=3, **options)
    assert found.keys() == candidates(denoiser(pipe)).keys()
    name = list(found)[-1]
    steps = {"num_inference_steps": 2, "guidance_scale": 3.0}
    drawn = [
        generate(p, PROMPTS[:2], [mix(3, 0), mix(3, 1)], progress=False, **steps, **options["call"])
        for p in (pipe, remove(pipe, [name]))
    ]
    lost = 100 * (drawn[0][:, 0].double().mean() - drawn[1][:, 0].double().mean()) / 255
    work = []
    for p in (pipe, remove(pipe, [name])):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            latents(p, steps=1, guidance_scale=3.0)
        work.append(counter.get_total_flops())
    assert found[name] == pytest.approx(lost.item() / ((work[0] - work[1]) / 1e9), rel=1e-3)


def test_blocks_go_in_order_until_enough_are_gone():
    costs, sizes = {"a": 3.0, "b": -1.0, "c": 0.5, "d": 9.0}, {"a": 10, "b": 20, "c": 30, "d": 40}
    assert choose_in_order(costs, sizes, 0) == []
    assert choose_in_order(costs, sizes, 0.2) == ["b"]
    assert choose_in_order(costs, sizes, 0.55) == ["a", "b", "c"]


def test_bad_input_is_named():
    pipe = tiny_sd()
    with pytest.raises(EcoDiffError, match="'conv_in' is no block that can be left out"):
        remove(pipe, ["conv_in"])
    with pytest.raises(EcoDiffError, match="ratio=1 is the share"):
        choose({"a": 1.0}, {"a": 1}, 1)
    with pytest.raises(EcoDiffError, match="ratio=-0.1 is the share"):
        choose_in_order({"a": 1.0}, {"a": 1}, -0.1)
