"""SparseDM's 2:4 masks (Wang et al., 2024): of every four weights in a row, the two largest stay.

It is not unit pruning. The shapes stay, so no parameter is saved in a dense checkpoint; half of the multiplications of
these layers can be skipped by hardware that knows the pattern. The published method then trains on with a
straight-through estimator (`ecodiff.retrain` with method "2:4"); `trainable` is that layer, with SR-STE's pull (Zhou et
al., 2021) on the weights masked out:

    forward  y = (m ∘ W) x,        gradient of W  =  ∂L/∂(m ∘ W)  +  pull · (1 - m) ∘ W.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ecodiff.errors import EcoDiffError
from ecodiff.method.carried import refuse_elsewhere
from ecodiff.pipelines.parts import denoiser, with_denoiser

KEPT, GROUP = 2, 4


def mask_2_4(weight: Tensor) -> Tensor:
    """Bool [out, in, ...]: of every four neighbours along ``in`` the two largest in absolute value.

    Among equals the first stay. A convolution's groups run over input channels at one place of the kernel. Raises
    EcoDiffError where ``in`` is no multiple of four.
    """
    if weight.ndim < 2 or weight.shape[1] % GROUP:
        raise EcoDiffError(f"mask_2_4: a weight of shape {list(weight.shape)} has no groups of four input channels.")
    last = weight.detach().abs().movedim(1, -1)  # input channels last, so that four in a row lie side by side
    groups = last.reshape(-1, GROUP)
    # Not topk, which among equals may take any.
    best = groups.sort(descending=True, stable=True).indices[:, :KEPT]
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, best, True)
    return mask.reshape(last.shape).movedim(-1, 1)


def layers_2_4(model: nn.Module) -> dict[str, nn.Module]:
    """Linear and convolution layers that have groups of four inputs, {name: module}; narrower ones stay dense."""
    layers = {}
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Linear, nn.Conv2d)) or not module.weight.numel():
            continue
        if module.weight.shape[1] % GROUP == 0:
            layers[name] = module
    return layers


def sparsify(pipe, prompts=()):
    """A pipeline whose denoiser is a copy with 2:4 zeros in all of `layers_2_4`; other components are shared.

    ``prompts`` are not used (the choice is by magnitude). The original is not changed.
    """
    refuse_elsewhere(denoiser(pipe), "sparsify")
    sparse = copy.deepcopy(denoiser(pipe))
    with torch.no_grad():
        for layer in layers_2_4(sparse).values():
            layer.weight.mul_(mask_2_4(layer.weight))
    return with_denoiser(pipe, sparse)


@contextmanager
def trainable(model: nn.Module, pull: float = 2e-4) -> Iterator[None]:
    """Inside, the model runs with 2:4 weights, masks chosen anew from the dense ones at every forward, and an
    optimiser over ``model.parameters()`` trains the dense ones by the estimator above. On leaving, the weights are 2:4.

    Raises EcoDiffError for a negative pull.
    """
    if not pull >= 0:
        raise EcoDiffError(f"trainable: pull={pull} must be at least 0.")
    layers = layers_2_4(model)
    for layer in layers.values():
        parametrize.register_parametrization(layer, "weight", _StraightThrough(pull))
    try:
        yield
    finally:
        for layer in layers.values():
            # The masked weight becomes the layer's own; the dense one goes.
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)


class _StraightThrough(nn.Module):
    """The parametrisation by which a layer that reads ``weight`` gets the masked one."""

    def __init__(self, pull: float):
        super().__init__()
        self.pull = pull

    def forward(self, weight: Tensor) -> Tensor:
        return _Masked.apply(weight, mask_2_4(weight), self.pull)


class _Masked(torch.autograd.Function):
    """m ∘ W, with the gradient that the module's docstring gives."""

    @staticmethod
    def forward(ctx, weight: Tensor, mask: Tensor, pull: float) -> Tensor:
        ctx.save_for_backward(weight, mask)
        ctx.pull = pull
        return weight * mask

    @staticmethod
    def backward(ctx, gradient: Tensor):
        weight, mask = ctx.saved_tensors
        # None for the mask and the pull, which have no gradient.
        return gradient + ctx.pull * weight * ~mask, None, None
