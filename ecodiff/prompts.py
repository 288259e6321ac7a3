"""Prompts on their way into a pipeline's call: checked, encoded once each, and joined into batches."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .errors import EcoDiffError


def checked_prompts(prompts, caller: str) -> list:
    """The prompts as a list; raises EcoDiffError where there is none, one is empty, or their forms differ."""
    if isinstance(prompts, (str, Mapping)) or not isinstance(prompts, Sequence):
        raise EcoDiffError(f"{caller} needs a list of prompts; put a single one in brackets.")
    if not prompts or any(not prompt or (isinstance(prompt, str) and not prompt.strip()) for prompt in prompts):
        raise EcoDiffError(f"{caller} needs at least one prompt, and none may be empty.")
    if any(isinstance(prompt, str) != isinstance(prompts[0], str) for prompt in prompts):
        raise EcoDiffError(f"{caller} needs prompts of one form: all strings, or all mappings of call arguments.")
    return list(prompts)


def collate(prompts: list) -> dict:
    """Arguments of one call for several prompts: strings make ``prompt``, mappings are joined key by key."""
    if isinstance(prompts[0], str):
        return {"prompt": prompts}
    columns = {key: [prompt[key] for prompt in prompts] for key in prompts[0]}
    return {key: torch.cat(values) if isinstance(values[0], Tensor) else values for key, values in columns.items()}


def encoding_once(pipe):
    """The pipeline (a shallow copy) with an ``encode_prompt`` that encodes each prompt alone and only once."""
    runner = object.__new__(type(pipe))
    runner.__dict__.update(vars(pipe))
    original = getattr(pipe, "encode_prompt", None)
    if original is None:
        return runner
    signature, memory = inspect.signature(original), {}

    def encode_prompt(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        given = dict(bound.arguments)
        prompts = given.get("prompt")
        if not isinstance(prompts, list) or any(isinstance(value, Tensor) for value in given.values()):
            return original(*args, **kwargs)
        rows = []
        for i in range(len(prompts)):
            single = {k: [v[i]] if isinstance(v, list) and len(v) == len(prompts) else v for k, v in given.items()}
            if (key := repr(single)) not in memory:
                bound.arguments.update(single)
                with torch.no_grad():
                    memory[key] = original(*bound.args, **bound.kwargs)
            rows.append(memory[key])
        try:
            return _join(rows)
        except RuntimeError:  # prompts padded to different lengths: let the pipeline pad them together
            with torch.no_grad():
                return original(*args, **kwargs)

    runner.encode_prompt = encode_prompt
    return runner


def _join(rows: Sequence):
    """Encodings of single prompts as one batch; parts without a batch dimension (FLUX's text ids) stay as they are."""
    if isinstance(rows[0], (tuple, list)):
        return type(rows[0])(_join(parts) for parts in zip(*rows, strict=True))
    if isinstance(rows[0], Tensor) and rows[0].shape[:1] == (1,):
        return torch.cat(list(rows))
    return rows[0]


def mix(*numbers: int) -> int:
    """One seed from several numbers, such as a run's seed and the number of a sample."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:7], "big")
