"""The whole denoising trajectory as one differentiable function (Eq. 1), with time-step checkpointing (§2.3, Alg. 2).

Eq. 1 composes ``T`` denoising steps into ``z_0 = F(z_T, y)``. A diffusers pipeline already contains that composition:
its ``__call__`` under ``torch.no_grad``. Here the undecorated loop runs, so no pipeline or scheduler needs code of
its own.

Backpropagation through it would keep the activations of all ``T`` denoiser calls. Alg. 2 keeps the latents between
the steps and recomputes one step at a time on the way back (`recomputed`, around the denoiser's ``forward``): three
units of work (forward, recomputation, backward with frozen weights) in place of two, and the memory of one call in
place of ``T``. Only the denoiser is recomputed, so multi-step and stochastic schedulers need no replay.
"""

from __future__ import annotations

import inspect
from functools import wraps

import torch
from torch import Tensor, nn

from ecodiff.errors import EcoDiffError
from ecodiff.pipelines.forward_hooks import eagerly, replaced_forward
from ecodiff.pipelines.parts import denoiser as find_denoiser
from ecodiff.pipelines.parts import sampling_loop
from ecodiff.pipelines.running import count_steps, frozen, private_copy

from .checkpointing import frozen_inside, kept, recomputed
from .hooks import OpenGates


def prediction(output) -> Tensor:
    """The tensor that a denoiser's call predicts: what it returned, or the first part of it."""
    return output if isinstance(output, Tensor) else output[0]


def final_latents(
    pipe,
    prompt: str | list[str] | None = None,
    *,
    checkpoint: bool = True,
    keep_last: int = 1,
    gradients: bool = True,
    preserve_rng_state: bool = True,
    **call_kwargs,
) -> Tensor:
    """Final latents ``z_0`` of the pipeline's own sampling loop (Eq. 1), with gradients.

    Gradients flow to the gates set with ``apply_gates`` and to tensors among the arguments (``latents``,
    ``prompt_embeds``); the weights are frozen. ``pipe`` is left as it was, also after an exception: scheduler, progress
    bar, train/eval modes, ``requires_grad`` and the denoiser's ``forward``.

    Call ``backward`` while the gates are still applied: a checkpointed call runs again then.

    Args:
        pipe: a diffusers pipeline whose call can return latents (``output_type="latent"``).
        prompt: prompt(s); leave out when the call takes something else (``prompt_embeds=...``, ``class_labels=...``).
        checkpoint: recompute each denoiser call during backward (§2.3). Gradients stay the same bit for bit.
        keep_last: steps at the end of the loop whose calls keep their activations: each saves one recomputation. The
            first is free, since backward starts with it: the peak is one call's activations anyway. Each further one
            adds a call's. Counted in scheduler steps (Heun makes ``2T - 1``, PNDM ``T + 1``); a pipeline that calls
            the denoiser several times a step keeps all calls of these steps (0 there has the lowest peak).
        gradients: False runs without gradients (the teacher's ``z_0`` of Alg. 1, line 3).
        preserve_rng_state: recompute with torch's random state of the first pass. False lets noise drawn inside the
            denoiser be drawn anew, as the authors' code does: the gradient then belongs to another trajectory (for
            study only).
        **call_kwargs: further arguments of the pipeline's call: ``num_inference_steps``, ``generator``, ...

    Returns:
        Latents as the pipeline lays them out, [N, C, H, W] for U-Nets, packed [N, tokens, channels] for FLUX.

    Raises:
        EcoDiffError: the pipeline cannot return latents, ``keep_last`` is negative, nothing in the denoiser requires
            gradients, or the loop of this pipeline and scheduler does not pass gradients on. In backward: a tensor
            inside the denoiser requires gradients and is none of the gates.
    """
    if keep_last < 0:
        raise EcoDiffError(
            f"keep_last={keep_last} is negative: give the number of last steps that keep their activations."
        )
    call = sampling_loop(pipe)
    ours = {"output_type": "latent", "return_dict": False}
    lacking = sorted(ours.keys() - inspect.signature(call).parameters.keys())
    if lacking:
        raise EcoDiffError(
            f"{type(pipe).__name__} has no argument {lacking[0]!r}: its sampling loop cannot return final latents."
        )
    doubled = sorted(ours.keys() & call_kwargs.keys())
    if doubled:
        raise EcoDiffError(f"final_latents sets {doubled[0]!r} itself: leave it out of the arguments.")
    if prompt is not None:
        call_kwargs["prompt"] = prompt
    for name in ("guidance_scale", "num_inference_steps"):  # None is the pipeline's own default, as everywhere here
        if call_kwargs.get(name, 0) is None:
            del call_kwargs[name]

    runner = private_copy(pipe)
    if gradients:  # an offloaded pipeline sends its weights away as its call ends, but backward needs them
        runner.__dict__["maybe_free_model_hooks"] = _stay
    denoiser, scheduler = find_denoiser(pipe), runner.scheduler
    modules = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    watch, gates = count_steps(scheduler), OpenGates(denoiser)

    def wrap(forward):
        def frozen_forward(*args, **kwargs):  # here too, because recomputation happens after final_latents returned
            with frozen(denoiser), eagerly():
                return forward(*args, **kwargs)

        @wraps(forward)
        def step(*args, **kwargs):
            # A loop that switches gradients off by itself gives latents without a graph: told apart from "no gates".
            watch["without_grad"] |= gradients and not torch.is_grad_enabled()
            if not gradients:
                result = frozen_forward(*args, **kwargs)
            elif checkpoint and watch["steps"] < len(scheduler.timesteps) - keep_last:
                result = recomputed(frozen_forward, gates, *args, preserve_rng_state=preserve_rng_state, **kwargs)
            else:
                result = kept(frozen_forward, gates, *args, **kwargs)
            watch["gradients"] |= prediction(result).requires_grad
            return result

        return step

    where = f"{type(pipe).__name__} with {type(scheduler).__name__}"
    with (
        torch.set_grad_enabled(gradients),
        frozen(*modules),
        frozen_inside(denoiser),
        replaced_forward(denoiser, wrap),
    ):
        try:
            latents = call(runner, **ours, **call_kwargs)[0]
        except RuntimeError as error:
            if gradients and "requires grad" in str(error):  # .numpy() or an in-place write on a tensor of the graph
                raise EcoDiffError(f"The sampling loop of {where} is not differentiable: {error}") from error
            raise
    if not isinstance(latents, Tensor):
        raise EcoDiffError(f"{where} returned {type(latents).__name__}, not a tensor of latents.")
    if gradients and not latents.requires_grad:
        # Predictions had gradients and the latents have none: the loop cut them off. Else no gate made a prediction.
        if watch["gradients"] or watch["without_grad"]:
            raise EcoDiffError(
                f"The sampling loop of {where} is not differentiable: take another scheduler, or gradients=False."
            )
        raise EcoDiffError(
            "Nothing in the denoiser requires gradients: apply gates made from λ first, or set gradients=False."
        )
    return latents


def _stay() -> None:
    """In the place of a pipeline's ``maybe_free_model_hooks``: the weights stay where they are."""
