"""Prompts on their way into a pipeline's call: checked, encoded once each, and joined into batches.

A sample must be the same alone and in any batch. Each prompt is therefore encoded alone, and encodings are joined only
in a way that was seen to be the pipeline's own: the first time that two prompts run together, they are encoded together
as well, and the joined encodings have to be those (else `NotJoined`). `batches` runs what can be joined.
"""

from __future__ import annotations

import codecs
import hashlib
import inspect
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ecodiff.errors import EcoDiffError
from ecodiff.storage.fingerprint import canonical

from .contents import Undescribed, describe


def checked_prompts(prompts, caller: str) -> list:
    """The prompts as a list, also those of a numpy array or a pandas series.

    Raises EcoDiffError where there is none, one is empty or neither a string nor a mapping, or their forms differ.
    """
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
    if not prompts or any(not prompt or (isinstance(prompt, str) and not prompt.strip()) for prompt in prompts):
        raise EcoDiffError(f"{caller} needs at least one prompt, and none may be empty.")
    first = prompts[0]
    for prompt in prompts:
        form = set(prompt) if isinstance(prompt, Mapping) else None
        if form != (set(first) if isinstance(first, Mapping) else None):
            raise EcoDiffError(
                f"{caller} needs prompts of one form: all strings, or all mappings with the same call arguments."
            )
    return prompts


def read_prompts(path: str | os.PathLike) -> list[str]:
    """The prompts of a text file, one a line; empty lines are left out. UTF-8, or UTF-16 and UTF-32 with their mark.

    Raises EcoDiffError for a file that cannot be read, is in another encoding, or holds no prompt.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise EcoDiffError(f"{path}: prompts cannot be read ({error}): give a text file, one prompt a line.") from error
    encoding = next((name for mark, name in _MARKS if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
        if "\0" in text:
            raise ValueError("it holds zero bytes")
    except ValueError as error:  # UnicodeDecodeError is one
        raise EcoDiffError(f"{path}: this is no UTF-8 text ({error}): save the file as UTF-8.") from error
    lines = [line.strip() for line in re.split(r"\r\n|\r|\n", text)]
    if not any(lines):
        raise EcoDiffError(f"{path}: the file holds no prompt: write one a line.")
    return [line for line in lines if line]


# Longer marks first: that of UTF-16 begins that of UTF-32.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def collate(prompts: list) -> dict:
    """Arguments of one call for several prompts: strings make ``prompt``, mappings are joined key by key."""
    if isinstance(prompts[0], str):
        return {"prompt": prompts}
    columns = {key: [prompt[key] for prompt in prompts] for key in prompts[0]}
    return {key: torch.cat(values) if isinstance(values[0], Tensor) else values for key, values in columns.items()}


class NotJoined(EcoDiffError):
    """The encodings of these prompts cannot be joined as the pipeline itself would: run them one by one."""


def encoding_once(pipe):
    """The pipeline (a shallow copy) with an ``encode_prompt`` that encodes each prompt alone and only once.

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

    def encode_prompt(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        given = dict(bound.arguments)
        prompts = given.get("prompt")
        if not isinstance(prompts, list) or any(isinstance(value, Tensor) for value in given.values()):
            return original(*args, **kwargs)
        each = [_for_one(given, i, len(prompts)) for i in range(len(prompts))]

        def encode(number: int):
            name = _name(each[number])
            if name in memory:
                return memory[name]
            bound.arguments.update(each[number])
            with torch.no_grad():
                encoded = original(*bound.args, **bound.kwargs)
            if name is not None:
                memory[name] = encoded
            return encoded

        rows = [encode(i) for i in range(len(prompts))]
        if len(rows) == 1:
            return rows[0]
        # Two different ones, where there are; the rule of joining is found with these.
        second = next((i for i, prompt in enumerate(prompts) if prompt != prompts[0]), 1)
        shared = {name: value for name, value in given.items() if value is each[0][name]}
        rule_of = (_name(shared), prompts[second] == prompts[0])
        if rule_of not in rules:
            bound.arguments.update(_for_some(given, [0, second], len(prompts)))
            with torch.no_grad():
                own = original(*bound.args, **bound.kwargs)
            rules[rule_of] = joining_rule(rows[0], rows[second], own)
        return joined(rows, rules[rule_of])

    runner.encode_prompt = encode_prompt
    return runner


def _for_one(given: Mapping, number: int, count: int) -> dict:
    """The arguments for one prompt of ``count``: lists of that length have an entry a prompt."""
    return _for_some(given, [number], count)


def _for_some(given: Mapping, numbers: Sequence[int], count: int) -> dict:
    some = {}
    for name, value in given.items():
        if isinstance(value, list) and len(value) == count:
            value = [value[number] for number in numbers]
        elif name == "batch_size" and value == count:
            value = len(numbers)
        some[name] = value
    return some


def _name(arguments: Mapping) -> str | None:
    """A text that is one for equal arguments, None where they have none."""
    try:
        return canonical(describe(arguments))
    except Undescribed:
        return None


def joining_rule(a, b, own):
    """How two encodings make the pipeline's own one of both: the dimension in which tensors are put one after the
    other, "one" where they share a value, "list" where lists are; in the structure of ``own``. Raises `NotJoined`."""
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
        return type(first)(part for row in rows for part in row)
    if isinstance(rule, int):
        try:
            return torch.cat(list(rows), rule)
        except RuntimeError as error:
            raise NotJoined(f"these prompts are encoded to different lengths ({error}): run them one by one") from error
    if isinstance(rule, Mapping):
        return type(first)({name: joined([row[name] for row in rows], part) for name, part in rule.items()})
    return type(first)(joined(parts, part) for parts, part in zip(zip(*rows, strict=True), rule, strict=True))


def fits(a: Tensor, b: Tensor, own: Tensor, dimension: int) -> bool:
    shapes = [list(tensor.shape) for tensor in (a, b, own)]
    if not a.dim() == b.dim() == own.dim():
        return False
    sizes = [shape.pop(dimension) for shape in shapes]
    return sizes[0] + sizes[1] == sizes[2] and shapes[0] == shapes[1] == shapes[2]


def near(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal up to the rounding of another batch shape."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    rounding = 1e-3 if torch.finfo(a.dtype).eps < 1e-6 else 3e-2
    a, b = a.float(), b.float()
    return torch.linalg.vector_norm(a - b).item() <= rounding * torch.linalg.vector_norm(b).item() + 1e-12


def alike(a, b) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and near(a, b)
    return type(a) is type(b) and (a is b or _name({"": a}) == _name({"": b}) is not None)


def mix(*numbers: int) -> int:
    """One seed from several numbers, such as a run's seed and the number of a sample."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:7], "big")


def epoch_batch(samples: int, batch_size: int, seed: int, update: int) -> list[int]:
    """Sample indices of an update: each epoch visits every sample once, in an order of its own."""
    positions = range(update * batch_size, (update + 1) * batch_size)
    orders = {
        epoch: torch.randperm(samples, generator=torch.Generator().manual_seed(mix(seed, -1, epoch))).tolist()
        for epoch in {position // samples for position in positions}
    }
    return [orders[position // samples][position % samples] for position in positions]
