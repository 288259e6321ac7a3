"""What a pipeline passes to its denoiser, seen by running its own loop with a denoiser that returns zeros.

This costs nothing but text encoding and the scheduler's arithmetic, so any pipeline can be asked, whatever the class
of its denoiser: `cost` does so where it does not know a class's arguments.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ecodiff.errors import EcoDiffError
from ecodiff.pipelines.forward_hooks import replaced_forward
from ecodiff.pipelines.parts import denoiser as find_denoiser
from ecodiff.pipelines.parts import experts, sampling_loop
from ecodiff.pipelines.running import private_copy

from .trace import Given, outputs, without_weights


@dataclass(frozen=True)
class Captured:
    """One denoiser call and how often it is made.

    inputs: {argument of the denoiser: what was given}, as `trace.trace` takes it.  latents: the argument that holds
    the latents: the first of the denoiser's.  samples: its leading dimension.  calls: denoiser calls of the whole
    loop.  size: height and width of the final latents, None where they are packed.  shares: calls of each denoiser,
    where the pipeline has several.
    """

    inputs: dict[str, Given]
    latents: str
    samples: int
    calls: int
    size: tuple[int, int] | None
    shares: tuple[int, ...]


def capture(pipe, *, batch: int = 1, **arguments) -> Captured:
    """Run the loop of a pipeline for ``batch`` pictures and note what its denoiser is given.

    Args:
        pipe: a loaded diffusers pipeline; it is left as it was.
        batch: pictures drawn together.
        arguments: of the pipeline's call, ``num_inference_steps`` and the like. Those it does not know are left out if
            they are None. Without ``prompt``, ``prompt_embeds`` or labels the prompt is "a".

    Raises EcoDiffError, in one sentence, where the call does not run so.
    """
    name, call = type(pipe).__name__, sampling_loop(pipe)
    known = inspect.signature(call).parameters
    given = {key: value for key, value in arguments.items() if value is not None}
    if unknown := sorted(given.keys() - known.keys()):
        raise EcoDiffError(f"{name}: its call has no argument {unknown[0]!r}, so the cost cannot be counted with it.")
    given |= {key: value for key, value in (("output_type", "latent"), ("return_dict", False)) if key in known}
    if "prompt" in known and not given.keys() & {"prompt", "prompt_embeds"}:
        given["prompt"] = "a"
    if isinstance(given.get("prompt"), str):
        given["prompt"] = [given["prompt"]] * batch
    denoiser = find_denoiser(pipe)
    noted: dict[str, Any] = {"calls": 0}
    networks = experts(denoiser)
    first = networks[0]
    signature, empty = inspect.signature(first.forward), without_weights(first, first.dtype, "meta")
    shares = [0] * len(networks)

    def wrap(forward, number):
        @wraps(forward)
        def zeros(*args, **kwargs):
            if not noted["calls"]:
                bound = signature.bind(*args, **kwargs).arguments
                for key, parameter in signature.parameters.items():
                    if parameter.kind is parameter.VAR_KEYWORD:
                        bound |= bound.pop(key, {})
                noted["inputs"] = {key: Given(value) for key, value in bound.items()}
                noted["result"] = outputs(empty, noted["inputs"], dtype=first.dtype)
                noted["device"] = next(value.device for value in bound.values() if isinstance(value, Tensor))
            noted["calls"] += 1
            shares[number] += 1
            return tree_map(
                lambda part: (
                    torch.zeros(part.shape, dtype=part.dtype, device=noted["device"])
                    if isinstance(part, Tensor)
                    else part
                ),
                noted["result"],
            )

        return zeros

    try:
        with torch.no_grad(), ExitStack() as stack:
            for number, network in enumerate(networks):
                wrapped = partial(wrap, number=number)
                stack.enter_context(replaced_forward(network, wrapped, must_run=False))  # said below, in other words
            result = call(private_copy(pipe), **given)
    except EcoDiffError:
        raise
    except Exception as error:  # whatever a pipeline's own code may raise
        said = str(error).strip().splitlines()
        raise EcoDiffError(
            f"{name}: its own call does not run with {', '.join(sorted(given))} ({said[0] if said else error!r}): "
            "pass what it needs as call={...}."
        ) from error
    if not noted["calls"]:
        raise EcoDiffError(f"{name}: its own call never called the denoiser, so there is nothing to count.")
    latents = next(key for key in signature.parameters if isinstance(noted["inputs"].get(key, _NOTHING).value, Tensor))
    final = result[0] if isinstance(result, (tuple, list)) else next(iter(result.values()), None)
    sides = tuple(final.shape[-2:]) if isinstance(final, Tensor) and final.ndim in (4, 5) else None
    return Captured(noted["inputs"], latents, len(noted["inputs"][latents].value), noted["calls"], sides, tuple(shares))


_NOTHING = Given(None)


def call_arguments(call: Mapping | None) -> dict:
    """The arguments given as ``call``, checked; raises EcoDiffError where they are no mapping of names."""
    if call is None:
        return {}
    if not isinstance(call, Mapping) or not all(isinstance(key, str) for key in call):
        raise EcoDiffError(f"cost: call is a mapping of arguments of the pipeline's call, not {call!r}.")
    return dict(call)
