"""Whether gradients through a sampling loop are exact: tried on one sample and two steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ecodiff.errors import EcoDiffError

from .hooks import apply_gates
from .sites import Site

NEAR_SLOPE = 0.1
"""How far a finite difference in fp32 may be from the gradient."""


def limits(task: Any) -> dict[str, float]:
    """The most that each number of `measure` may be for learning to be exact: what rounding makes of 0.

    Half precision rounds more, and a finite difference in it is mostly rounding.
    """
    half = task.config.mixed_precision != "no" or task.denoiser.dtype in (torch.bfloat16, torch.float16)
    return {"open_loss": 0.1, "gradient": 0.2 if half else 1e-3, "slope": math.inf if half else NEAR_SLOPE}


def measure(task: Any, sites: Mapping[str, Site]) -> dict[str, float]:
    """Three numbers, all 0 where learning is exact, measured on the first sample of a `learn.Task` with two steps.

    open_loss: the loss with every gate open, over the variance of the latents. gradient: relative difference between
    the gradient with time-step checkpointing and without. slope: relative difference between the gradient and a finite
    difference along it. A loop that makes no step of two, such as image-to-image of low strength, takes its own number.
    Memory is that of all calls of these steps; torch's random state is left as it was.
    """
    config = task.config
    quick = replace(config, num_inference_steps=min(2, config.num_inference_steps), keep_last=0)
    cuda = [task.device] if task.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(cuda):
            try:
                task.config = quick
                return _measured(task, sites)
            except EcoDiffError:
                if quick.num_inference_steps == config.num_inference_steps:
                    raise
                task.config = replace(config, keep_last=0)
                return _measured(task, sites)
    finally:
        task.config = config


def _measured(task: Any, sites: Mapping[str, Site]) -> dict[str, float]:
    whole = task.latents([0], gradients=False)
    ones = {name: torch.ones(site.units, device=task.device) for name, site in sites.items()}
    with apply_gates(task.denoiser, ones, sites, must_run=False):
        opened = task.latents([0], gradients=False)
    variance = whole.var().item()
    open_loss = ((opened - whole).square().mean() / variance).item() if variance > 0 else 0.0

    generator = torch.Generator().manual_seed(0)
    point = {}
    for name, site in sites.items():
        point[name] = (0.5 + 0.5 * torch.rand(site.units, generator=generator)).to(task.device)
    checkpointed = _gradient(task, sites, point, whole)
    config = task.config
    task.config = replace(config, checkpoint=False)
    plain = _gradient(task, sites, point, whole)
    task.config = config
    size = _norm(plain)
    difference = _norm({name: plain[name] - checkpointed[name] for name in plain}) / max(size, 1e-30)
    return {"open_loss": open_loss, "gradient": difference, "slope": _slope(task, sites, point, whole, plain)}


def _slope(task: Any, sites: Mapping[str, Site], point: dict, whole: Tensor, gradient: dict[str, Tensor]) -> float:
    """Relative difference between the length of the gradient and a finite difference along it, the least of three."""
    length = _norm(gradient)
    largest = max(value.abs().max().item() for value in gradient.values())
    if not largest > 0:
        with apply_gates(task.denoiser, point, sites, must_run=False):
            moved_away = (task.latents([0], gradients=False) - whole).square().max().item()
        if moved_away > 0:
            return 1.0
        raise EcoDiffError(
            f"No gate changes the final latents of {type(task.pipe).__name__} with these arguments, so there is "
            "nothing to learn from: take more steps, a higher strength, or a mask that leaves something to draw."
        )
    differences = []
    for step in (1e-2, 1e-3, 1e-1):  # of the gate that moves most; where rounding or curvature is large, another does
        losses = []
        for sign in (1, -1):
            moved = {name: point[name] + sign * step / largest * gradient[name] for name in sites}
            with apply_gates(task.denoiser, moved, sites, must_run=False):
                losses.append((task.latents([0], gradients=False) - whole).square().mean().item())
        finite = (losses[0] - losses[1]) / (2 * step / largest * length)
        differences.append(abs(finite - length) / max(length, abs(finite)))
        if differences[-1] <= NEAR_SLOPE / 2:
            break
    return min(differences)


def _gradient(task: Any, sites: Mapping[str, Site], point: dict[str, Tensor], whole: Tensor) -> dict[str, Tensor]:
    """The gradient, in these gates, of the squared distance from the latents of the whole model."""
    gates = {name: value.clone().requires_grad_() for name, value in point.items()}
    with apply_gates(task.denoiser, gates, sites, must_run=False):
        (task.latents([0], gradients=True) - whole).square().mean().backward()
    return {name: value.grad if value.grad is not None else torch.zeros_like(value) for name, value in gates.items()}


def _norm(tensors: dict[str, Tensor]) -> float:
    return sum(value.square().sum().item() for value in tensors.values()) ** 0.5
