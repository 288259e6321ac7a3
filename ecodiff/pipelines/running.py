"""What loops over a pipeline share: the device they run on, checks of its networks, a copy to run, words for a cost."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps

import torch
from torch import nn

from ecodiff import processes
from ecodiff.errors import EcoDiffError

from .parts import experts


@contextmanager
def on_device(pipe, caller: str, many: bool = False):
    """Inside, the pipeline is on accelerate's device, unless it was placed by its user; then it stays where it is.

    Placed are those with offloading or a device map, and those that are not on the CPU. An offloaded one has its
    components off the device again afterwards.

    Raises EcoDiffError in a run of several processes, unless ``many`` says that the caller shares its work among them;
    then for a pipeline that was placed on the device of another process.
    """
    if processes.count() > 1 and not many:
        raise EcoDiffError(f"{caller} runs in one process, not in {processes.count()}: start it without a launcher.")
    state = processes.state()
    home = pipe.device
    placed = getattr(pipe, "_all_hooks", None) or getattr(pipe, "hf_device_map", None) or home.type != "cpu"
    # Between calls the components of an offloaded pipeline are on the CPU; it knows itself where they compute.
    device = pipe._execution_device if placed else state.device
    if device.type == "cpu":
        device = torch.device("cpu")  # with several processes accelerate numbers it
    if processes.count() > 1 and placed:
        _refuse_shared(pipe, device, state.device, caller)
    moved = not placed and device != home
    if moved:
        pipe.to(device)
    try:
        yield device
    finally:
        if moved:
            pipe.to(home)
        elif getattr(pipe, "_all_hooks", None):
            pipe.maybe_free_model_hooks()


def _refuse_shared(pipe, device: torch.device, own: torch.device, caller: str) -> None:
    """EcoDiffError for a pipeline that its user placed where other processes have theirs."""
    if getattr(pipe, "hf_device_map", None) or any(
        len(set(getattr(part, "hf_device_map", None) or {}.values())) > 1 for part in pipe.components.values()
    ):
        raise EcoDiffError(
            f"{caller}: a device map spreads this {type(pipe).__name__} over the devices of all "
            f"{processes.count()} processes: start one process, without a launcher."
        )
    if device.type == own.type == "cuda" and (device.index or 0) != (own.index or 0):
        raise EcoDiffError(
            f"{caller}: process {processes.rank()} has {own}, and its pipeline was placed on {device}: leave it on "
            "the CPU, or offload it with gpu_id=accelerate.PartialState().local_process_index."
        )


def placed(function: Callable) -> Callable:
    """A decorator: the function, whose first argument is a pipeline, runs with it ``on_device``."""

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
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


@contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """Inside, no parameter of these modules requires gradients and all are in eval mode; afterwards as before."""
    together = nn.ModuleList(modules)
    learning = [parameter for parameter in together.parameters() if parameter.requires_grad]
    training = [module for module in together.modules() if module.training]
    for parameter in learning:
        parameter.requires_grad_(False)
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
        for module in training:
            module.training = True


def private_copy(pipe):
    """The pipeline with the same components but its own attributes and scheduler: its runs leave ``pipe`` as it is."""
    runner = object.__new__(type(pipe))
    if getattr(pipe, "scheduler", None) is None:
        raise EcoDiffError(
            f"{type(pipe).__name__} has no component called scheduler, so it is not known where its steps are: take a "
            "pipeline with one sampling loop, such as the prior or the decoder of a combined one."
        )
    scheduler = copy.copy(pipe.scheduler)  # not deep: a scheduler that has run may hold tensors of a graph
    for name, value in vars(scheduler).items():
        if isinstance(value, list):
            setattr(scheduler, name, list(value))
    # Into __dict__: the pipelines' own __setattr__ would register the components anew.
    bar = {**getattr(pipe, "_progress_bar_config", {}), "disable": True}
    runner.__dict__.update(vars(pipe), scheduler=scheduler, _progress_bar_config=bar)
    return runner
