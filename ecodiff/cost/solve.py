"""The other way round: the smallest ratio with which a model fits into memory, or is as fast as asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ecodiff.errors import EcoDiffError
from ecodiff.method.mask import make_mask

from .counting import Cost, Counter
from .units import gb, usable

HUNDREDTHS = 100  # ratios are tried in steps of one hundredth, up to 0.99


@dataclass(frozen=True)
class Solved:
    """The smallest ratio that does what was asked for, its mask {site: bool [units]}, and the cost before and after."""

    ratio: float
    mask: dict[str, Tensor]
    cost: Cost


def solve(
    model,
    *,
    fits: int | str | None = None,
    time: float | None = None,
    offload: bool = False,
    scores: Mapping[str, Tensor] | None = None,
    scope: str = "kind",
    count: str = "units",
    round_to: int | str | Mapping[str, int | str] = 1,
    batch: int = 1,
    **setting,
) -> Solved:
    """The smallest ratio, in hundredths, with which generating costs no more than asked for.

    Args:
        model: as for `cost`.
        fits: memory of the device, bytes or text such as "8GB", into which generating has to fit.
        time: share of the original's operations per image, such as 0.8. Operations stand for time here: how much
            faster a device becomes depends on its kernels, and is to be measured there.
        offload: components are on the device one at a time (``pipe.enable_model_cpu_offload()``).
        scores: which units go first, {site: [units]} (None: chosen at random, which costs the same where all units of
            a kind are of one size).
        scope, count, round_to: as for `make_mask`, with scores; ``round_to`` in any case.
        batch, **setting: the arguments of `cost`: size, frames, steps, guidance, dtype, text_tokens, call, kinds.

    Raises EcoDiffError where neither or a wrong goal is given, and where not even 99 % are enough, saying what is left.
    """
    if (fits is None) == (time is None):
        raise EcoDiffError("solve: give either the memory to fit into (fits) or the share of time (time).")
    if time is not None and not 0 < time <= 1:
        raise EcoDiffError(f"solve: time is the share of the original's operations, above 0 and at most 1, not {time}.")
    counter = Counter(model, batch, inner=False, **setting)
    sites = counter.sites()

    def at(ratio: float) -> Solved:
        if scores is None:
            mask = counter.random_mask(ratio, round_to)
        else:
            mask = make_mask(scores, sites, ratio, scope=scope, count=count, round_to=round_to)
        how = f"{ratio:.0%} of the units of each kind, chosen at random"
        if scores is not None:
            how = f"{ratio:.0%} of the {count}, by the scores (scope {scope})"
        return Solved(ratio, mask, counter.with_pruned(mask, how))

    def enough(cost: Cost) -> bool:
        assert cost.pruned is not None
        if fits is not None:
            return cost.pruned.inference_peak(offload=offload) <= usable(fits)
        assert time is not None
        return cost.pruned.picture_flops.total <= time * cost.picture_flops.total

    best = at((HUNDREDTHS - 1) / HUNDREDTHS)
    if not enough(best.cost):
        assert best.cost.pruned is not None
        left = gb(best.cost.pruned.inference_peak(offload=offload))
        if time is not None:
            left = f"{best.cost.pruned.picture_flops.total / best.cost.picture_flops.total:.0%} of the operations"
        raise EcoDiffError(
            f"solve: even without 99 % of its units {best.cost.model} needs {left}, more than asked for."
        )
    low, high = -1, HUNDREDTHS - 1  # the smallest ratio that is enough lies above `low` and is at most `high`
    while high - low > 1:
        middle = (low + high) // 2
        tried = at(middle / HUNDREDTHS)
        if enough(tried.cost):
            best, high = tried, middle
        else:
            low = middle
    return best
