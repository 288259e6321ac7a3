"""Several samples in one call, where each is what it is alone.

`together` tries whether a pipeline treats the samples of a batch as it treats single ones; `in_batches` runs them
together or one by one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from .forward_hooks import eagerly
from .parts import denoiser, experts
from .prompts import NotJoined, alike, collate, fits, near
from .running import private_copy


def together(runner, prompts: Sequence, **call) -> bool:
    """Whether a call for several prompts tells the denoiser, for each, what a call for it alone does.

    Tried on two of them, the shortest and the longest, up to the denoiser's first call, which is not made: what it is
    given for both must be what it is given for each. ``runner``: `encoding_once` of a pipeline. ``call``: further
    arguments of its call. A pipeline for which this is False has to run one by one; a warning says
    so, for that takes longer.
    """
    if len(prompts) < 2:
        return True
    by_size = sorted(prompts, key=_size)
    different = (prompt for prompt in reversed(by_size) if _differ(prompt, by_size[0]))
    pair = [by_size[0], next(different, by_size[-1])]
    runner, seen = private_copy(runner), []
    for some, seeds in (([pair[0]], [0]), ([pair[1]], [1]), (pair, [0, 1])):
        try:
            seen.append(_first_call(runner, some, seeds, call))
        except Exception as error:  # noqa: BLE001 (whatever a pipeline's own code may raise)
            if len(some) == 1:
                return True  # it does not run at all so, and the call itself will say why
            seen.append(error)
    why = seen[2] if isinstance(seen[2], Exception) else None
    if why is None and (seen[2] is None or _same_samples(seen[0], seen[1], seen[2])):
        return True
    name = type(runner).__name__
    warnings.warn(
        f"{name}: prompts run one by one, which takes longer, since in a batch the denoiser would not be told of each "
        f"what it is told of it alone{f' ({why})' if why else ''}.",
        stacklevel=4,
    )
    return False


def size_together(wanted: int, runner, prompts: Sequence, **call) -> int:
    """How many samples run in one call: ``wanted`` where they may run `together`, else 1."""
    if wanted > 1 and not together(runner, prompts, **call):
        return 1
    return wanted


def _size(prompt: str | Mapping) -> int:
    """How long a prompt is: letters, and numbers of its tensors."""
    if isinstance(prompt, str):
        return len(prompt)
    size = 0
    for part in prompt.values():
        if isinstance(part, Tensor):
            size += part.numel()
        elif isinstance(part, str):
            size += len(part)
    return size


def _differ(a: str | Mapping, b: str | Mapping) -> bool:
    return a != b if isinstance(a, str) else a is not b


class _Stopped(Exception):
    """Ends a sampling loop at the denoiser's first call; carries its arguments."""


@torch.no_grad()
def _first_call(runner, prompts: list, seeds: list[int], call: Mapping):
    def stop(module, args, kwargs):
        raise _Stopped(args, kwargs)

    networks = experts(denoiser(runner))
    handles = [network.register_forward_pre_hook(stop, with_kwargs=True, prepend=True) for network in networks]
    try:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        with eagerly(), torch.random.fork_rng([]):
            runner(generator=generators, **collate(prompts), **call)
    except _Stopped as stopped:
        return stopped.args
    finally:
        for handle in handles:
            handle.remove()
    return None  # the denoiser was not called at all


def _same_samples(a, b, both) -> bool:
    """Whether what is given for two samples is, for each, what is given for it alone. Guidance may give each sample
    several times: all samples once and once again, or one sample after the other."""
    if isinstance(both, Tensor):
        if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
            return False
        if a.shape == b.shape == both.shape and near(a, both) and near(b, both):
            return True
        for dimension in range(both.dim()):
            if not fits(a, b, both, dimension):
                continue
            if near(torch.cat([a, b], dimension), both):
                return True
            if a.shape == b.shape and near(torch.stack([a, b], dimension + 1).flatten(dimension, dimension + 1), both):
                return True
        return False
    if isinstance(both, Mapping):
        return (
            isinstance(a, Mapping)
            and a.keys() == b.keys() == both.keys()
            and all(_same_samples(a[name], b[name], both[name]) for name in both)
        )
    if isinstance(both, (list, tuple)):
        if not (isinstance(a, (list, tuple)) and isinstance(b, (list, tuple))):
            return False
        if len(a) == len(b) == len(both):
            return all(_same_samples(*parts) for parts in zip(a, b, both, strict=True))
        if len(a) + len(b) != len(both):
            return False
        taken_in_turn = [part for parts in zip(a, b, strict=False) for part in parts]
        return all(map(alike, [*a, *b], both)) or (len(a) == len(b) and all(map(alike, taken_in_turn, both)))
    return alike(a, both) and alike(b, both)


def in_batches(samples: Sequence[int], size: int, run: Callable[[list[int]], None]) -> None:
    """``run(numbers of samples)``, ``size`` at a time; one by one where their encodings do not make a batch.

    `NotJoined` comes before the denoiser's first call, so nothing of such a batch has run yet.
    """
    waiting = [list(samples[first : first + size]) for first in range(0, len(samples), size)]
    while waiting:
        batch = waiting.pop(0)
        try:
            run(batch)
        except NotJoined:
            if len(batch) == 1:
                raise
            waiting[:0] = [[sample] for sample in batch]
