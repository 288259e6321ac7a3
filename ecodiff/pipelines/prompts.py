"""Prompts on their way into a pipeline's call: checked, encoded once each, and joined into batches.

A sample must be the same alone and in any batch. Each prompt is therefore encoded alone, and encodings are joined only
in a way that was seen to be the pipeline's own: the first time that two prompts run together, they are encoded together
as well, and the joined encodings have to be those (else `NotJoined`). `batches` runs what can be joined.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor

from ecodiff.errors import EcoDiffError
from ecodiff.storage.fingerprint import canonical

from .contents import Undescribed, describe


def checked_prompts(prompts, caller: str) -> list:
    """The prompts as a list, also those of a numpy array or a pandas series.

    A whole number is so many samples of a pipeline that takes no prompt, told apart by their noise alone: as many empty
    mappings. Raises EcoDiffError where there is none, one is empty or neither a string nor a mapping, or their forms
    differ.
    """
    if isinstance(prompts, int) and not isinstance(prompts, bool) and prompts > 0:
        return [{} for _ in range(prompts)]
    if isinstance(prompts, list) and prompts and all(prompt == {} for prompt in prompts):
        return prompts  # that were made of a number
    if hasattr(prompts, "tolist"):  # numpy, pandas, torch
        prompts = prompts.tolist()
    if isinstance(prompts, (str, bytes, Mapping)) or not isinstance(prompts, Sequence):
        raise EcoDiffError(
            f"{caller} needs a list of prompts, not {type(prompts).__name__}; put a single one in brackets."
        )
    prompts = list(prompts)
    for number, prompt in enumerate(prompts, 1):
        if not isinstance(prompt, (str, Mapping)):
            raise EcoDiffError(
                f"{caller}: prompt {number} is {prompt!r}, not a string (or a mapping of call arguments)."[:300]
            )
        if isinstance(prompt, str) and not _has_bytes(prompt):
            raise EcoDiffError(f"{caller}: prompt {number} is {prompt!r}, which no text file can hold."[:300])
    if not prompts or any(not prompt or (isinstance(prompt, str) and not prompt.strip()) for prompt in prompts):
        raise EcoDiffError(f"{caller} needs at least one prompt, and none may be empty.")
    forms = {frozenset(prompt) if isinstance(prompt, Mapping) else None for prompt in prompts}
    if len(forms) > 1:
        raise EcoDiffError(
            f"{caller} needs prompts of one form: all strings, or all mappings with the same call arguments."
        )
    return prompts


def _has_bytes(text: str) -> bool:
    """Whether a text can be written; half of a surrogate pair, from a wrongly decoded file, cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def differ(a: str | Mapping, b: str | Mapping) -> bool:
    """Whether two prompts differ; of two mappings only whether they are one object, since ``==`` fails on tensors."""
    if isinstance(a, str):
        return a != b
    return a is not b


def collate(prompts: list) -> dict:
    """Arguments of one call for several prompts: strings make ``prompt``, mappings are joined key by key."""
    if isinstance(prompts[0], str):
        return {"prompt": prompts}
    arguments: dict = {}
    for key in prompts[0]:
        values = [prompt[key] for prompt in prompts]
        arguments[key] = torch.cat(values) if isinstance(values[0], Tensor) else values
    return arguments


def collate_bare(prompt: str | Mapping) -> dict:
    """Arguments of one call for one prompt: what `collate` makes of it without its lists of one entry."""
    if isinstance(prompt, str):
        return {"prompt": prompt}
    return dict(prompt)


class NotJoined(EcoDiffError):
    """The encodings of these prompts cannot be joined as the pipeline itself would: run them one by one."""


def encoding_once(pipe):
    """A shallow copy of the pipeline with an ``encode_prompt`` that encodes each prompt alone and only once.

    It raises `NotJoined`, before the denoiser is called, for prompts whose encodings do not make a batch.
    """
    runner = object.__new__(type(pipe))
    runner.__dict__.update(vars(pipe))
    original = getattr(pipe, "encode_prompt", None)
    if original is None:
        return runner
    signature = inspect.signature(original)
    if "prompt" not in signature.parameters:
        return runner
    memory: dict = {}
    rules: dict = {}

    def encode(bound: inspect.BoundArguments, arguments: dict):
        bound.arguments.update(arguments)
        with torch.no_grad():
            return original(*bound.args, **bound.kwargs)

    def encode_once(bound: inspect.BoundArguments, arguments: dict):
        name = _name(arguments)
        if name is None:
            return encode(bound, arguments)
        if name not in memory:
            memory[name] = encode(bound, arguments)
        return memory[name]

    def encode_prompt(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        given = dict(bound.arguments)
        prompts = given.get("prompt")
        if not isinstance(prompts, list) or any(isinstance(value, Tensor) for value in given.values()):
            return original(*args, **kwargs)
        count = len(prompts)
        each = [_for_some(given, [number], count) for number in range(count)]
        rows = [encode_once(bound, arguments) for arguments in each]
        if count == 1:
            return rows[0]
        # The rule of joining is found with two different prompts, where there are. Two equal ones may hide what
        # belongs to one prompt and what to all, so a rule that was found with them is only for others like them.
        second = next((number for number, prompt in enumerate(prompts) if prompt != prompts[0]), 1)
        shared = {name: value for name, value in given.items() if value is each[0][name]}
        case = (_name(shared), prompts[second] == prompts[0])
        if case not in rules:
            own = encode(bound, _for_some(given, [0, second], count))
            rules[case] = joining_rule(rows[0], rows[second], own)
        return joined(rows, rules[case])

    runner.encode_prompt = encode_prompt
    return runner


def _for_some(given: Mapping, numbers: Sequence[int], count: int) -> dict:
    """The arguments for some of ``count`` prompts: lists of that length have an entry a prompt."""
    some = {}
    for name, value in given.items():
        if isinstance(value, list) and len(value) == count:
            value = [value[number] for number in numbers]
        elif name == "batch_size" and value == count:
            value = len(numbers)
        some[name] = value
    return some


def _name(arguments: Mapping) -> str | None:
    """A text that is the same for equal arguments; None where they have no description by value."""
    try:
        return canonical(describe(arguments))
    except Undescribed:
        return None


def joining_rule(a, b, own):
    """How two encodings ``a`` and ``b`` make ``own``, the pipeline's own encoding of both prompts together.

    The rule has the structure of ``own``. In the place of each value it has the dimension along which two tensors are
    put one after the other, "list" where two lists are, or "one" where both prompts share a value. Raises `NotJoined`.
    """
    if isinstance(own, Tensor) and isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.shape == b.shape == own.shape and near(a, own) and near(b, own):
            return "one"
        for dimension in range(own.dim()):
            if fits(a, b, own, dimension) and near(torch.cat([a, b], dimension), own):
                return dimension
    elif isinstance(own, (list, tuple)) and isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        if len(a) == len(b) == len(own):
            return [joining_rule(*parts) for parts in zip(a, b, own, strict=True)]
        if len(a) + len(b) == len(own) and all(map(alike, (*a, *b), own)):
            return "list"
    elif type(a) is type(b) is type(own) and isinstance(own, Mapping) and a.keys() == b.keys() == own.keys():
        return {name: joining_rule(a[name], b[name], own[name]) for name in own}
    elif alike(a, own) and alike(b, own):
        return "one"
    raise NotJoined("prompts that are encoded one by one do not make the batch that the pipeline makes of them")


def joined(rows: Sequence, rule):
    """Encodings of single prompts as one batch, by the rule that was found with two of them. Raises `NotJoined`."""
    first = rows[0]
    if rule == "one":
        return first
    if rule == "list":
        return type(first)(chain.from_iterable(rows))
    if isinstance(rule, int):
        try:
            return torch.cat(list(rows), rule)
        except RuntimeError as error:
            raise NotJoined(f"these prompts are encoded to different lengths ({error}): run them one by one") from error
    if isinstance(rule, Mapping):
        values = {}
        for name, part in rule.items():
            values[name] = joined([row[name] for row in rows], part)
        return type(first)(values)
    return type(first)(joined(parts, part) for parts, part in zip(zip(*rows, strict=True), rule, strict=True))


def fits(a: Tensor, b: Tensor, own: Tensor, dimension: int) -> bool:
    """Whether ``a`` and ``b``, one after the other along a dimension, have the shape of ``own``."""
    if not a.dim() == b.dim() == own.dim():
        return False
    shapes = [list(tensor.shape) for tensor in (a, b, own)]
    lengths = [shape.pop(dimension) for shape in shapes]
    return lengths[0] + lengths[1] == lengths[2] and shapes[0] == shapes[1] == shapes[2]


def near(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal up to the rounding of another batch shape."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    rounding = 1e-3 if torch.finfo(a.dtype).eps < 1e-6 else 3e-2  # fp32 and above; bf16 and fp16
    a, b = a.float(), b.float()
    return torch.linalg.vector_norm(a - b).item() <= rounding * torch.linalg.vector_norm(b).item() + 1e-12


def alike(a, b) -> bool:
    """Whether two values are equal by their contents, tensors up to rounding."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and near(a, b)
    return type(a) is type(b) and (a is b or _name({"": a}) == _name({"": b}) is not None)


def mix(*numbers: int) -> int:
    """One seed from several numbers, such as a run's seed and the number of a sample."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:7], "big")


def epoch_batch(samples: int, batch_size: int, seed: int, update: int) -> list[int]:
    """Sample indices of an update: each epoch visits every sample once, in an order of its own."""
    orders: dict[int, list[int]] = {}
    batch = []
    for position in range(update * batch_size, (update + 1) * batch_size):
        epoch, place = divmod(position, samples)
        if epoch not in orders:
            generator = torch.Generator().manual_seed(mix(seed, -1, epoch))
            orders[epoch] = torch.randperm(samples, generator=generator).tolist()
        batch.append(orders[epoch][place])
    return batch
