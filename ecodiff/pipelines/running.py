"""What training loops share: the device they run on, the order of their samples, words for their cost."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from functools import wraps

import torch
from accelerate import PartialState

from ecodiff.errors import EcoDiffError

from .loading import experts
from .prompts import mix


def epoch_batch(samples: int, batch_size: int, seed: int, update: int) -> list[int]:
    """Sample indices of an update: each epoch visits every sample once, in an order of its own."""
    positions = range(update * batch_size, (update + 1) * batch_size)
    orders = {
        epoch: torch.randperm(samples, generator=torch.Generator().manual_seed(mix(seed, -1, epoch))).tolist()
        for epoch in {position // samples for position in positions}
    }
    return [orders[position // samples][position % samples] for position in positions]


@contextmanager
def on_device(pipe, caller: str):
    """Inside, the pipeline is on accelerate's device, unless it was placed by offloading or a device map; then it
    stays. An offloaded one has its components off the device again afterwards."""
    state = PartialState()
    if state.num_processes > 1:
        raise EcoDiffError(f"{caller} runs in one process, not in {state.num_processes}: start it without a launcher.")
    home = pipe.device
    placed = getattr(pipe, "_all_hooks", None) or getattr(pipe, "hf_device_map", None) or home.type != "cpu"
    device = pipe._execution_device if placed else state.device
    if device != home and not placed:
        pipe.to(device)
    try:
        yield device
    finally:
        if device != home and not placed:
            pipe.to(home)
        elif getattr(pipe, "_all_hooks", None):
            pipe.maybe_free_model_hooks()


def placed(function: Callable) -> Callable:
    """A function of a pipeline (its first argument) that runs ``on_device``."""

    @wraps(function)
    def run(pipe, *args, **kwargs):
        with on_device(pipe, f"{function.__module__.rpartition('.')[2]}.{function.__name__}"):
            return function(pipe, *args, **kwargs)

    return run


def not_half(network: torch.nn.Module, caller: str) -> None:
    """EcoDiffError for a denoiser in float16: the gradient of a mean over latents is too small for its range."""
    for part in experts(network):
        if next(part.parameters()).dtype == torch.float16:
            raise EcoDiffError(
                f"{caller}: {type(part).__name__} is in float16, where gradients of this loss underflow to zero: load "
                "the pipeline with dtype=torch.bfloat16 or torch.float32."
            )


def without_adapters(network: torch.nn.Module, caller: str) -> None:
    """EcoDiffError for a denoiser with adapters, whose layers are not those of its class."""
    for part in experts(network):
        if getattr(part, "peft_config", None):
            raise EcoDiffError(
                f"{caller}: {type(part).__name__} has adapters ({', '.join(part.peft_config)}): fuse and unload them "
                "first."
            )


def in_words(seconds: float) -> str:
    """A duration as a person says it: "90 s", "12 min", "3.5 h"."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
