"""DeepCache (Ma et al., 2024): deep features of a U-Net change slowly between steps, so most steps reuse the last ones.

No parameter goes; calls do. Every ``interval``-th step runs the whole U-Net and keeps what its deep blocks return. The
steps between run the ``depth`` outermost blocks on either side alone, which read the kept feature where the deep part
would have been. It needs the skip connections around the deep part: transformers have none, so FLUX and SD3 are out.

The published code cuts inside blocks (its branch 0 runs one layer of the outermost block), and finds its place in the
schedule by the first equal time step. Here the cut is between blocks, and steps are counted as the scheduler makes
them, from 0 for every new schedule.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial, wraps
from typing import Any

import torch
from torch import nn

from ecodiff.errors import EcoDiffError
from ecodiff.pipelines.forward_hooks import hooked, replaced_forward
from ecodiff.pipelines.parts import one_denoiser


@dataclass
class Reuse:
    """What happened while the cache was on: ``calls`` of the U-Net, and how many of them were ``reused``."""

    calls: int = 0
    reused: int = 0
    step: int = 0
    call: int = 0  # number of the present call within its step; -1 before the first
    running: bool = field(default=True, repr=False)  # whether deep blocks run in the present call
    kept: dict = field(default_factory=dict, repr=False)  # (call within its step, block) -> what the block returned

    def forget(self) -> None:
        self.step, self.call = 0, -1
        self.kept.clear()


@contextmanager
def deepcache(pipe, interval: int = 3, depth: int = 1) -> Iterator[Reuse]:
    """Inside, the pipeline generates with feature reuse; on leaving, it is as before.

    Args:
        pipe: a pipeline whose denoiser is a U-Net; pruned ones, too (App. I.2).
        interval: the deep part runs in steps 0, interval, 2 · interval, ...; 1 changes nothing.
        depth: blocks on either side that run in every step, from 1 to one less than there are.

    Yields the count of calls. Kept are the outputs of the deep blocks of one step (for each call in it, where guidance
    calls twice). Raises EcoDiffError for a denoiser that is no U-Net, an interval or depth out of range, and, inside,
    where gradients are asked for.
    """
    model = one_denoiser(pipe, "deepcache")
    deep = deep_blocks(model, depth)
    if isinstance(interval, bool) or not isinstance(interval, int) or interval < 1:
        raise EcoDiffError(f"deepcache: interval={interval!r} must be a whole number of steps, at least 1.")
    reuse = Reuse()
    reuse.forget()

    def begin(latents):
        if torch.is_grad_enabled() and interval > 1:
            raise EcoDiffError("deepcache: kept features have no gradient; learn the mask first, then draw with reuse.")
        reuse.call += 1
        reuse.calls += 1
        # Nothing is known of a call that no refreshing step made, such as one of guidance that begins late.
        known = all((reuse.call, name) in reuse.kept for name in deep)
        refreshing = reuse.step % interval == 0
        reuse.running = refreshing or not known
        if not reuse.running:
            reuse.reused += 1

    scheduler_class = type(pipe.scheduler)
    pipe.scheduler.__class__ = _counting(scheduler_class, reuse)
    try:
        with ExitStack() as stack:
            stack.enter_context(hooked(model, "deepcache")).before("", begin)
            for name, block in deep.items():
                stack.enter_context(replaced_forward(block, partial(_kept_forward, name=name, reuse=reuse)))
            yield reuse
    finally:
        pipe.scheduler.__class__ = scheduler_class
        reuse.kept.clear()  # features are large, and the caller may keep the counts


def deep_blocks(model: nn.Module, depth: int) -> dict[str, nn.Module]:
    """The blocks between the ``depth`` outermost ones of either side, {name: module}."""
    if not all(hasattr(model, name) for name in ("down_blocks", "mid_block", "up_blocks")):
        raise EcoDiffError(
            f"deepcache: {type(model).__name__} has no skip connections around a deep part; only U-Nets have them."
        )
    count = len(model.down_blocks)
    if isinstance(depth, bool) or not isinstance(depth, int) or not 1 <= depth < count:
        raise EcoDiffError(f"deepcache: depth={depth!r} must be from 1 to {count - 1} for a U-Net of {count} blocks.")
    deep = {f"down_blocks.{i}": model.down_blocks[i] for i in range(depth, count)}
    if model.mid_block is not None:
        deep["mid_block"] = model.mid_block
    return deep | {f"up_blocks.{i}": model.up_blocks[i] for i in range(count - depth)}


def _kept_forward(forward, name: str, reuse: Reuse):
    """The block's forward, or in its place what it returned in the same call of an earlier step."""

    @wraps(forward)
    def kept(*args, **kwargs):
        place = reuse.call, name
        if reuse.running:
            reuse.kept[place] = forward(*args, **kwargs)
        return reuse.kept[place]

    return kept


def _counting(cls: Any, reuse: Reuse) -> type:
    """The scheduler's class, counting its steps.

    A class and not an attribute, so that copies of the scheduler (every run may work on one) count themselves and not
    the original.
    """

    class Counting(cls):
        @wraps(cls.set_timesteps)  # pipelines look at the signatures
        def set_timesteps(self, *args, **kwargs):
            reuse.forget()
            return super().set_timesteps(*args, **kwargs)

        @wraps(cls.step)
        def step(self, *args, **kwargs):
            result = super().step(*args, **kwargs)
            reuse.step += 1
            reuse.call = -1
            return result

    Counting.__name__, Counting.__qualname__, Counting.__module__ = cls.__name__, cls.__qualname__, cls.__module__
    return Counting
