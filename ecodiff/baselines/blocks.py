"""Removing whole blocks by the criteria of LAPTOP-Diff (Zhang et al., 2024) and SnapFusion (Li et al., 2023).

LAPTOP-Diff's is the automatic successor of BK-SDM's choice.

A residual or transformer block that returns what it was given can be left out. Its score is what that does to the
prediction at the states the whole model visits,

    error(S) = E_t ‖ε̂(z_t) - ε̂_S(z_t)‖² / size,

and the criterion rests on *additivity*: that error(S) is close to the sum of its blocks' errors. Then the best set for
a share of parameters is a knapsack. `errors` measures any sets, so additivity can be tested and not assumed.

SnapFusion's looks at images: `clip_scores`, what the CLIP score loses without a block for the work that it saves.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ecodiff.cost.trace import Given, trace
from ecodiff.errors import EcoDiffError
from ecodiff.method.generate import generate
from ecodiff.metrics.clip import Judge
from ecodiff.pipelines.forward_hooks import replaced_forward
from ecodiff.pipelines.parts import denoiser, one_denoiser, with_denoiser
from ecodiff.pipelines.prompts import encoding_once, mix
from ecodiff.pipelines.running import placed
from ecodiff.progress import progress_bar, say
from ecodiff.scores.calibration import Call, Sampling, draw

_HIDDEN = ("hidden_states", "input_tensor")
_BLOCKS = ("ResnetBlock2D", "BasicTransformerBlock", "JointTransformerBlock", "FluxTransformerBlock",
           "FluxSingleTransformerBlock")  # fmt: skip
_RESOLUTION = 5_000  # the knapsack counts parameters in shares of this


def candidates(model: nn.Module) -> dict[str, int]:
    """Blocks that can be left out with their numbers of parameters, in the order in which the network names them.

    They add to what they are given: residual blocks that keep the number of channels and transformer blocks, except a
    last joint block that drops its text stream.
    """
    sizes = {}
    for name, module in model.named_modules():
        if type(module).__name__ in _BLOCKS and _adds_to_its_input(module):
            sizes[name] = sum(parameter.numel() for parameter in module.parameters())
    return sizes


def _adds_to_its_input(block: nn.Module) -> bool:
    if getattr(block, "context_pre_only", False):  # the last joint block of SD3 returns no text
        return False
    if getattr(block, "up", False) or getattr(block, "down", False):  # another height and width
        return False
    same_channels = getattr(block, "in_channels", None) == getattr(block, "out_channels", None)
    return same_channels and getattr(block, "conv_shortcut", None) is None


@contextmanager
def left_out(model: nn.Module, names: Collection[str]) -> Iterator[None]:
    """Inside, these blocks return what they are given. Raises EcoDiffError for a name that is no candidate."""
    _check(model, names)
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(replaced_forward(model.get_submodule(name), _passing))
        yield


@placed
def errors(pipe, prompts: Sequence, sets: Sequence[Collection[str]], **sampling) -> list[float]:
    """error(S) of each set of blocks: the prediction's mean squared change over calls, at the whole model's states.

    Costs one call of the denoiser a set, beside each of the trajectory. ``sampling``: fields of ``Sampling``.
    """
    model, settings = denoiser(pipe), Sampling(**sampling)
    for names in sets:
        _check(model, names)
    totals, predictions = torch.zeros(len(sets), dtype=torch.float64), 0
    if settings.progress:
        say(f"blocks: {len(prompts)} prompts, {1 + len(sets)} times the work of drawing them")

    def see(call: Call) -> None:
        nonlocal predictions
        whole, batch = call.output[0].float(), len(call.output[0])
        for i, names in enumerate(sets):
            with left_out(model, names):
                # Not the module itself, whose hooks would see this call and call `see` again.
                other = call.network.forward(*call.args, **call.kwargs)[0].float()
            totals[i] += batch * (other - whole).square().mean().item()
        predictions += batch

    draw(pipe, prompts, settings, label="blocks", each_call=see)
    return (totals / predictions).tolist()


def scores(pipe, prompts: Sequence, **sampling) -> dict[str, float]:
    """error({b}) of every candidate b, {block name: error}; the lower, the earlier it goes."""
    names = list(_candidates_of(denoiser(pipe)))
    return dict(zip(names, errors(pipe, prompts, [(name,) for name in names], **sampling), strict=True))


@placed
def clip_scores(pipe, prompts: Sequence[str], judge: Judge, **sampling) -> dict[str, float]:
    """SnapFusion's score of every candidate: the CLIP score lost without it, for each GFLOP of a call that it costs.

    {block name: score}; the lower, the earlier it goes. Negative where images fit their prompts better without it. All
    images start from the same noise. Two things differ from the published search: work is counted, where that one
    measures milliseconds on a phone, and the model is taken as it is, where that one first trains it with blocks left
    out at random. It generates images of the prompts once more for each candidate. ``sampling``: fields of
    ``Sampling``.
    """
    model, settings, pipe = one_denoiser(pipe, "blocks.clip_scores"), Sampling(**sampling), encoding_once(pipe)
    names = list(_candidates_of(model))
    arguments: dict[str, Any] = {
        "num_inference_steps": settings.num_inference_steps,
        "guidance_scale": settings.guidance_scale,
        "batch_size": settings.batch_size,
        "progress": False,
    }
    seeds = [mix(settings.seed, i) for i in range(len(prompts))]
    prompt_features = judge.text_features(list(prompts))

    def clip_score() -> float:
        images = generate(pipe, prompts, seeds, **arguments, **settings.call)
        return 100 * (judge.image_features(images) * prompt_features).sum(-1).mean().item()

    calls: list[Call] = []
    draw(pipe, prompts[:1], settings, label="blocks", each_call=calls.append)
    inputs = inspect.signature(model.forward).bind(*calls[0].args, **calls[0].kwargs).arguments

    def flops(network: nn.Module) -> int:
        given = {name: Given(value) for name, value in inputs.items()}
        return trace(network, given, dtype=next(network.parameters()).dtype).flops.total

    whole_score, whole_flops = clip_score(), flops(model)
    result = {}
    for name in progress_bar(names, desc="blocks without", progress=settings.progress):
        with left_out(model, [name]):
            lost = whole_score - clip_score()
        saved = whole_flops - flops(denoiser(remove(pipe, [name])))
        result[name] = lost / (saved / 1e9)
    return result


def choose_in_order(scores: Mapping[str, float], parameters: Mapping[str, int], ratio: float) -> list[str]:
    """The blocks with the least scores, one by one, until at least ``ratio`` of the candidates' parameters are gone.

    Raises EcoDiffError for a ratio outside [0, 1).
    """
    _check_ratio(ratio)
    total = sum(parameters[name] for name in scores)
    gone, removed = 0, []
    for name in sorted(scores, key=scores.__getitem__):
        if gone >= ratio * total:
            break
        removed.append(name)
        gone += parameters[name]
    return [name for name in scores if name in removed]


def choose(scores: Mapping[str, float], parameters: Mapping[str, int], ratio: float) -> list[str]:
    """The blocks with the least sum of scores among all sets with at least ``ratio`` of the candidates' parameters.

    A 0-1 knapsack, exact up to rounding parameters up to 1/5,000 of their sum. Raises EcoDiffError for a ratio outside
    [0, 1).
    """
    _check_ratio(ratio)
    names, total = list(scores), sum(parameters[name] for name in scores)
    # Turned round: of all sets that stay and fit into the rest, the one whose scores sum up to the most.
    sizes = [-(-parameters[name] * _RESOLUTION // total) for name in names]  # rounded up
    room = sum(sizes)
    if ratio:
        room = int((1 - ratio) * _RESOLUTION + 1e-9)
    # best[space]: the most that the blocks so far give in that much space; stays[i][space]: whether i is among them.
    best, stays = [0.0] * (room + 1), [[False] * (room + 1) for _ in names]
    for i, (name, size) in enumerate(zip(names, sizes, strict=True)):
        for space in range(room, size - 1, -1):  # downwards, so that no block is taken twice
            if best[space - size] + scores[name] >= best[space]:
                best[space], stays[i][space] = best[space - size] + scores[name], True
    removed, space = [], room
    for i in reversed(range(len(names))):
        if stays[i][space]:
            space -= sizes[i]
        else:
            removed.append(names[i])
    return removed[::-1]


def remove(pipe, names: Collection[str]):
    """A pipeline whose denoiser lacks these blocks (a copy); other components are shared.

    It generates and is retrained like any other. `learn` and `prune` refuse it and diffusers cannot save it, since its
    config has no word for a missing block.
    """
    _check(denoiser(pipe), names)
    smaller = copy.deepcopy(denoiser(pipe))
    for name in names:
        owner, _, leaf = name.rpartition(".")
        block = smaller.get_submodule(name)
        setattr(smaller.get_submodule(owner), leaf, _Missing(type(block)))
    return with_denoiser(pipe, smaller)


class _Missing(nn.Module):
    """In the place of a block: returns what the block is given, in the block's form."""

    def __init__(self, block: type[nn.Module]):
        super().__init__()
        self.block = block

    def forward(self, *args, **kwargs):
        return _through(inspect.signature(partial(self.block.forward, self)), self.block.__name__)(*args, **kwargs)


def _passing(forward):
    return _through(inspect.signature(forward), type(forward.__self__).__name__)


def _through(signature: inspect.Signature, kind: str):
    """A forward with this signature that returns what it is given, as blocks of this kind return what they make of
    it: hidden states, or those of text and image."""
    two_streams = kind in ("JointTransformerBlock", "FluxTransformerBlock", "FluxSingleTransformerBlock")

    def passed(*args, **kwargs) -> Tensor | tuple[Tensor, Tensor]:
        arguments = signature.bind(*args, **kwargs).arguments
        hidden = next(arguments[name] for name in _HIDDEN if name in arguments)
        if two_streams:
            return arguments["encoder_hidden_states"], hidden
        return hidden

    return passed


def _candidates_of(model: nn.Module) -> dict[str, int]:
    """`candidates`; raises EcoDiffError where there are none."""
    blocks = candidates(model)
    if not blocks:
        raise EcoDiffError(f"{type(model).__name__} has no blocks that are known here and can be left out.")
    return blocks


def _check_ratio(ratio: float) -> None:
    if not 0 <= ratio < 1:
        raise EcoDiffError(f"choose: ratio={ratio} is the share of the blocks' parameters to remove, in [0, 1).")


def _check(model: nn.Module, names: Collection[str]) -> None:
    known = candidates(model)
    for name in names:
        if name not in known:
            raise EcoDiffError(f"{name!r} is no block that can be left out; candidates(model) lists them.")
