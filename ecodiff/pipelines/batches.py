"""Several samples in one call, where each is what it is alone.

`form_of_samples` tries whether a pipeline treats the samples of a batch as it treats single ones; `in_batches` runs
them together or one by one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from ecodiff.errors import EcoDiffError

from .endings import failed, hands_out_latents
from .forward_hooks import eagerly
from .parts import denoiser, experts, sampling_loop
from .prompts import NotJoined, alike, collate, collate_bare, differ, fits, near
from .running import private_copy


@dataclass(frozen=True)
class Form:
    """How samples are given to a pipeline's call: so many together, or one by one, in lists or bare.

    size: samples in one call.  bare: a sample by itself, its prompt a string and not a list of one, its generator not
    in a list; there are pipelines that take nothing else.
    """

    size: int
    bare: bool = False

    def arguments(self, prompts: list, generators: list) -> dict:
        """The arguments of one call for these samples: what `collate` makes of the prompts, and their generators."""
        if self.bare:
            return {**collate_bare(prompts[0]), "generator": generators[0]}
        return {**collate(prompts), "generator": generators}


def form_of_samples(wanted: int, runner, prompts: Sequence, **call) -> Form:
    """How samples are given to this pipeline, ``wanted`` in one call where that is right.

    That is tried on two of them, the shortest and the longest, up to the denoiser's first call, which is not made: what
    it is given for both must be what it is given for each. Where it is not, the prompts have to run one by one; a
    warning says so, for that takes longer. ``runner``: `encoding_once` of a pipeline. ``call``: further arguments of
    its call.

    Raises EcoDiffError where the pipeline's call does not get as far as its denoiser with one of the prompts.
    """
    by_size = sorted(prompts, key=_size)
    others = [prompt for prompt in by_size if differ(prompt, by_size[0])] or by_size
    pair = [by_size[0], others[-1]]
    runner = private_copy(runner)
    lists = Form(1)
    try:
        first = _first_call(runner, lists, pair[:1], [0], call)
    except Exception as error:  # noqa: BLE001 (whatever a pipeline's own code may raise)
        bare = Form(1, bare=True)
        try:
            _first_call(runner, bare, pair[:1], [0], call)
        except Exception:  # noqa: BLE001
            if isinstance(error, EcoDiffError):
                raise
            raise failed(runner, error) from error
        if wanted > 1 and len(prompts) > 1:
            say_one_by_one(runner, f"it takes one prompt a call ({_line(error)})")
        return bare
    if wanted < 2 or len(prompts) < 2:
        return lists
    reason = ""
    try:
        second = _first_call(runner, lists, pair[1:], [1], call)
        both = _first_call(runner, Form(2), pair, [0, 1], call)
    except Exception as error:  # noqa: BLE001
        reason = f" ({_line(error)})"
    else:
        if both is None or _same_samples(first, second, both):
            return Form(wanted)
    say_one_by_one(runner, f"in a batch the denoiser would not be told of each what it is told of it alone{reason}")
    return lists


def say_one_by_one(runner, why: str) -> None:
    """Warn that prompts take longer than they would in batches."""
    warnings.warn(
        f"{type(runner).__name__}: prompts run one by one, which takes longer, since {why}.",
        stacklevel=4,  # past `form_of_samples` and who calls it
    )


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [repr(error)]
    return lines[0][:200]


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


class _Stopped(Exception):
    """Ends a sampling loop at the denoiser's first call; carries its arguments."""


@torch.no_grad()
def _first_call(runner, form: Form, prompts: list, seeds: list[int], call: Mapping):
    """The arguments of the denoiser's first call, (args, kwargs); None where the loop ends without one."""

    def stop(module, args, kwargs):
        raise _Stopped(args, kwargs)

    networks = experts(denoiser(runner))
    known = {"output_type": "latent", **call}
    if known["output_type"] == "latent" and not hands_out_latents(sampling_loop(runner)):
        del known["output_type"]
    handles = [network.register_forward_pre_hook(stop, with_kwargs=True, prepend=True) for network in networks]
    try:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        with eagerly(), torch.random.fork_rng([]):  # a trial must not change what is drawn without a generator
            runner(**form.arguments(prompts, generators), **known)
    except _Stopped as stopped:
        return stopped.args
    finally:
        for handle in handles:
            handle.remove()
    return None


def joins(runner, form: Form, prompts: list, call: Mapping) -> bool:
    """Whether these prompts make one batch; the pipeline's call is stopped at the denoiser's first call."""
    try:
        _first_call(private_copy(runner), form, prompts, list(range(len(prompts))), call)
    except NotJoined:
        return False
    return True


def _same_samples(a, b, both) -> bool:
    """Whether ``both``, which is given for two samples, is for each what is given for it alone, ``a`` and ``b``.

    Guidance may give each sample several times: all samples once and once again, or one sample after the other.
    """
    if isinstance(both, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and _same_tensors(a, b, both)
    if isinstance(both, Mapping):
        if not isinstance(a, Mapping) or not a.keys() == b.keys() == both.keys():
            return False
        return all(_same_samples(a[name], b[name], both[name]) for name in both)
    if isinstance(both, (list, tuple)):
        return isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and _same_lists(a, b, both)
    return alike(a, both) and alike(b, both)


def _same_tensors(a: Tensor, b: Tensor, both: Tensor) -> bool:
    if a.shape == b.shape == both.shape and near(a, both) and near(b, both):
        return True  # one value for all samples, such as the time
    for dimension in range(both.dim()):
        if not fits(a, b, both, dimension):
            continue
        if near(torch.cat([a, b], dimension), both):
            return True
        if a.shape == b.shape:
            in_turn = torch.stack([a, b], dimension + 1).flatten(dimension, dimension + 1)
            if near(in_turn, both):
                return True
    return False


def _same_lists(a: Sequence, b: Sequence, both: Sequence) -> bool:
    if len(a) == len(b) == len(both):
        return all(_same_samples(*parts) for parts in zip(a, b, both, strict=True))
    if len(a) + len(b) != len(both):
        return False
    if all(map(alike, [*a, *b], both)):
        return True
    in_turn = chain.from_iterable(zip(a, b, strict=False))
    return len(a) == len(b) and all(map(alike, in_turn, both))


def in_batches(samples: Sequence[int], size: int, run: Callable[[list[int]], None]) -> None:
    """Call ``run(numbers of samples)``, ``size`` at a time; one by one where their encodings do not make a batch.

    `NotJoined` comes before anything of such a batch is kept.
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
