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

from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import get_device_states, set_device_states

from ecodiff.errors import EcoDiffError
from ecodiff.pipelines.endings import Watch, count_steps, last_latents
from ecodiff.pipelines.forward_hooks import eagerly, replaced_forward
from ecodiff.pipelines.parts import denoiser as find_denoiser
from ecodiff.pipelines.parts import sampling_loop
from ecodiff.pipelines.running import frozen, private_copy

from .carried import refuse_streamed
from .checkpointing import Settings, frozen_inside, kept, recomputed
from .hooks import OpenGates


def prediction(output) -> Tensor:
    """The tensor that a denoiser's call predicts: what it returned, or the first part of it.

    Some denoisers return a list of tensors, one a sample; these become one vector.
    """
    first = output if isinstance(output, Tensor) else output[0]
    if isinstance(first, Tensor):
        return first
    return torch.cat([leaf.flatten() for leaf in tree_leaves(first) if isinstance(leaf, Tensor)])


def final_latents(
    pipe,
    prompt: str | list[str] | None = None,
    *,
    checkpoint: bool = True,
    keep_last: int = 1,
    gradients: bool = True,
    preserve_rng_state: bool = True,
    noise_seed: int | None = None,
    **call_kwargs,
) -> Tensor:
    """Final latents ``z_0`` of the pipeline's own sampling loop (Eq. 1), with gradients.

    Gradients flow to the gates set with ``apply_gates`` and to tensors among the arguments (``latents``,
    ``prompt_embeds``); the weights are frozen. ``pipe`` is left as it was, also after an exception: scheduler, progress
    bar, train/eval modes, ``requires_grad`` and the denoiser's ``forward``.

    Call ``backward`` while the gates are still applied: a checkpointed call runs again then.

    Args:
        pipe: a diffusers pipeline. Where its call cannot return latents (``output_type="latent"``), the sample that
            its scheduler made last is taken (`ecodiff.pipelines.endings`).
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
        noise_seed: what the loop draws from torch's own random state, because it passes no generator on, is drawn from
            this seed; what is drawn inside the denoiser is not affected. None leaves torch's random state alone.
        **call_kwargs: further arguments of the pipeline's call: ``num_inference_steps``, ``generator``, ...

    Returns:
        Latents as the pipeline lays them out, [N, C, H, W] for U-Nets, packed [N, tokens, channels] for FLUX; where it
        makes video and sound, each sample's numbers of both as one vector.

    Raises:
        EcoDiffError: the pipeline's call fails or makes no latents, ``keep_last`` is negative, nothing in the denoiser
            requires gradients, or the loop of this pipeline and scheduler does not pass gradients on. In backward: a
            tensor inside the denoiser requires gradients and is none of the gates.
    """
    if keep_last < 0:
        raise EcoDiffError(
            f"keep_last={keep_last} is negative: give the number of last steps that keep their activations."
        )
    if gradients:
        refuse_streamed(find_denoiser(pipe), "final_latents")
    call = sampling_loop(pipe)
    doubled = sorted({"output_type", "return_dict"} & call_kwargs.keys())
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
    settings = Settings(denoiser) if gradients and checkpoint else None
    seen = {"gradients": False, "without_grad": False}
    own_noise = _OwnNoise(noise_seed, denoiser)

    def wrap(forward):
        def frozen_forward(*args, **kwargs):  # here too, because recomputation happens after final_latents returned
            with frozen(denoiser), eagerly():
                return forward(*args, **kwargs)

        @wraps(forward)
        def step(*args, **kwargs):
            # A loop that switches gradients off by itself gives latents without a graph: told apart from "no gates".
            seen["without_grad"] |= gradients and not torch.is_grad_enabled()
            with own_noise.aside():
                if not gradients:
                    result = frozen_forward(*args, **kwargs)
                elif checkpoint and watch.steps < len(scheduler.timesteps) - keep_last:
                    kwargs |= {"settings": settings, "preserve_rng_state": preserve_rng_state}
                    result = recomputed(frozen_forward, gates, *args, **kwargs)
                else:
                    result = kept(frozen_forward, gates, *args, **kwargs)
            seen["gradients"] |= prediction(result).requires_grad
            return result

        return step

    where = f"{type(pipe).__name__} with {type(scheduler).__name__}"
    with (
        torch.set_grad_enabled(gradients),
        frozen(*modules),
        frozen_inside(denoiser),
        replaced_forward(denoiser, wrap),
        own_noise,
    ):
        try:
            latents = last_latents(runner, watch, call, call_kwargs)
        except EcoDiffError as error:
            if gradients and "requires grad" in str(error.__cause__):  # .numpy() or an in-place write on its tensors
                raise EcoDiffError(f"The sampling loop of {where} is not differentiable: {error.__cause__}") from error
            raise
    if gradients and not latents.requires_grad:
        # Predictions had gradients and the latents have none: the loop cut them off. Else no gate made a prediction.
        if seen["gradients"] or seen["without_grad"]:
            raise EcoDiffError(f"The sampling loop of {where} is not differentiable: {_advice(watch, seen)}.")
        raise EcoDiffError(
            "Nothing in the denoiser requires gradients: apply gates made from λ first, or set gradients=False."
        )
    return latents


def _advice(watch: Watch, seen: dict) -> str:
    """Who cuts gradients off, and what can be done then."""
    if watch.cut and not seen["without_grad"]:
        return "its scheduler cuts gradients off, so take another scheduler, or gradients=False"
    return (
        'the loop itself cuts gradients off, with any scheduler, so take objective="step", whose gradient passes '
        "through single calls, or a score that needs no gradient (wanda, obs, occlusion)"
    )


class _OwnNoise:
    """Torch's own random state for a sampling loop: one that begins with a seed, beside that of its denoiser's calls.

    A loop that passes no generator on draws from torch's own state. With a seed it draws the same noise each time,
    however much is drawn inside the denoiser in between, such as gates.
    """

    def __init__(self, seed: int | None, denoiser: nn.Module):
        self.seed = seed
        self.tensors = [next(denoiser.parameters())]
        self.inside: tuple | None = None

    def _state(self) -> tuple:
        return torch.get_rng_state(), *get_device_states(*self.tensors)

    def _set(self, state: tuple) -> None:
        torch.set_rng_state(state[0])
        set_device_states(*state[1:])

    def __enter__(self) -> None:
        if self.seed is not None:
            self.inside = self._state()
            torch.manual_seed(self.seed)

    def __exit__(self, *error) -> None:
        if self.inside is not None:
            self._set(self.inside)
            self.inside = None

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Inside, the random state is that of the denoiser's calls."""
        if self.inside is None:
            yield
            return
        outside = self._state()
        self._set(self.inside)
        try:
            yield
        finally:
            self.inside = self._state()
            self._set(outside)


def _stay() -> None:
    """In the place of a pipeline's ``maybe_free_model_hooks``: the weights stay where they are."""
