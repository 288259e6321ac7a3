"""What a pipeline passes to its denoiser, seen by running its own loop with a denoiser that returns zeros.

This costs nothing but text encoding and the scheduler's arithmetic, so it works for any pipeline, whatever the class of
its denoiser: `cost` does so where it does not know a class's arguments.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ecodiff.errors import EcoDiffError
from ecodiff.pipelines.forward_hooks import replaced_forward
from ecodiff.pipelines.parts import denoiser as find_denoiser
from ecodiff.pipelines.parts import experts, sampling_loop
from ecodiff.pipelines.running import private_copy

from .trace import Given, outputs, without_weights


@dataclass(frozen=True)
class Loop:
    """How a sampling loop calls the denoiser."""

    inputs: Mapping  # arguments of a call, as `trace.trace` takes them
    latents: str  # the argument that holds the latents
    samples: int  # in a call
    calls: int  # in the whole loop
    size: tuple[int, int] | None = None  # height and width, where the loop itself showed them
    shares: tuple[int, ...] = ()  # calls of each denoiser, where the pipeline has several


def capture(pipe, *, batch: int = 1, **arguments) -> Loop:
    """How the loop of a pipeline calls its denoiser for ``batch`` images: the loop runs once to show it.

    The ``size`` is that of the final latents, None where they are packed.

    Args:
        pipe: a loaded diffusers pipeline; it is left as it was.
        batch: images generated together.
        arguments: of the pipeline's call, ``num_inference_steps`` and the like. Those it does not know are left out if
            they are None. Without ``prompt``, ``prompt_embeds`` or labels the prompt is "a".

    Raises EcoDiffError, in one sentence, where the call does not run so.
    """
    name, call = type(pipe).__name__, sampling_loop(pipe)
    given = _completed(name, call, batch, arguments)
    networks = experts(find_denoiser(pipe))
    zeros = _Zeros(networks)
    try:
        with torch.no_grad(), ExitStack() as stack:
            for number, network in enumerate(networks):
                wrapped = partial(zeros.instead_of, number=number)
                # That no denoiser ran is said below, in words that fit here.
                stack.enter_context(replaced_forward(network, wrapped, must_run=False))
            result = call(private_copy(pipe), **given)
    except EcoDiffError:
        raise
    except Exception as error:  # whatever a pipeline's own code may raise
        lines = str(error).strip().splitlines()
        reason = lines[0] if lines else repr(error)
        raise EcoDiffError(
            f"{name}: its own call does not run with {', '.join(sorted(given))} ({reason}): "
            "pass what it needs as call={...}."
        ) from error
    calls = sum(zeros.shares)
    if not calls:
        raise EcoDiffError(f"{name}: its own call never called the denoiser, so there is nothing to count.")
    return Loop(zeros.inputs, zeros.latents, zeros.samples, calls, _size(result), tuple(zeros.shares))


def _completed(name: str, call: Callable, batch: int, arguments: Mapping) -> dict:
    """What the call of the pipeline ``name`` gets; EcoDiffError for an argument that it does not know."""
    known = inspect.signature(call).parameters
    given = {key: value for key, value in arguments.items() if value is not None}
    unknown = sorted(given.keys() - known.keys())
    if unknown:
        raise EcoDiffError(f"{name}: its call has no argument {unknown[0]!r}, so the cost cannot be counted with it.")
    if "output_type" in known:
        given["output_type"] = "latent"  # the VAE is counted by itself, and would take most of the time here
    if "return_dict" in known:
        given["return_dict"] = False
    if "prompt" in known and not given.keys() & {"prompt", "prompt_embeds"}:
        given["prompt"] = "a"
    if isinstance(given.get("prompt"), str):
        given["prompt"] = [given["prompt"]] * batch
    return given


class _Zeros:
    """Stands in for the denoisers of a pipeline: keeps the arguments of the first call, and returns zeros in each.

    inputs: those arguments by name, as `trace` takes them; empty before the first call.  latents: the name of the first
    that is a tensor.  samples: its leading dimension.  shares: calls of each denoiser.
    """

    def __init__(self, networks: Sequence[nn.Module]):
        self._first = networks[0]
        self._signature = inspect.signature(self._first.forward)
        self._empty = without_weights(self._first, self._first.dtype, "meta")
        self.inputs: dict[str, Given] = {}
        self.shares = [0] * len(networks)

    def instead_of(self, forward: Callable, number: int) -> Callable:
        """What takes the place of the forward of denoiser ``number``."""

        @wraps(forward)  # pipelines read the signature of forward to see what their denoiser takes
        def zeros(*args, **kwargs):
            if not self.inputs:
                self._remember(args, kwargs)
            self.shares[number] += 1
            return tree_map(self._filled, self._result)

        return zeros

    def _remember(self, args, kwargs) -> None:
        bound = self._signature.bind(*args, **kwargs).arguments
        for key, parameter in self._signature.parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                bound |= bound.pop(key, {})
        self.latents = next(key for key, value in bound.items() if isinstance(value, Tensor))
        self.samples = len(bound[self.latents])
        self._device = bound[self.latents].device
        self.inputs = {key: Given(value) for key, value in bound.items()}
        # The zeros must have the shape of a real result, which no argument shows: learned variances, packed latents.
        self._result = outputs(self._empty, self.inputs, dtype=self._first.dtype)

    def _filled(self, part: Any) -> Any:
        """Zeros in the place of a meta tensor; anything else as it is."""
        if not isinstance(part, Tensor):
            return part
        return torch.zeros(part.shape, dtype=part.dtype, device=self._device)


def _size(result) -> tuple[int, int] | None:
    """Height and width of the latents that a loop returned; None where they are packed into rows of tokens."""
    if isinstance(result, (tuple, list)):
        final = result[0]
    else:
        final = next(iter(result.values()), None)
    if not isinstance(final, Tensor) or final.ndim not in (4, 5):  # 5: with frames
        return None
    height, width = final.shape[-2:]
    return height, width


def call_arguments(call: Mapping | None) -> dict:
    """The arguments given as ``call``, checked; raises EcoDiffError where they are no mapping of names."""
    if call is None:
        return {}
    if not isinstance(call, Mapping) or not all(isinstance(key, str) for key in call):
        raise EcoDiffError(f"cost: call is a mapping of arguments of the pipeline's call, not {call!r}.")
    return dict(call)
