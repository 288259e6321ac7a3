"""What a denoiser is trained on: the loss of a pipeline's scheduler.

The embedded models are trained with these losses (``lab/zoo``), and pruned ones retrained (``ecodiff.retrain``).
Every draw comes from the generator that is passed in.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import diffusers
import torch
from torch import Tensor

from ecodiff.errors import EcoDiffError
from ecodiff.pipelines.conditioning import without_variance

_TARGETS = ("epsilon", "v_prediction", "sample")  # a scheduler's prediction_type


def training_loss(
    scheduler, time: float = 1.0, shift: float = 1.0, time_dtype: torch.dtype = torch.int64
) -> Callable[..., Tensor]:
    """The loss ``(forward, latents, condition, generator) -> scalar`` that a diffusers scheduler's models learn by.

    ``flow_loss`` for flow matching (``time`` and ``shift`` go there), else ``denoising_loss`` with the scheduler's
    betas (``time_dtype`` goes there). Raises EcoDiffError for a scheduler that says neither.
    """
    of_flow = scheduler.config.get("use_flow_sigmas") or scheduler.config.get("prediction_type") == "flow_prediction"
    if of_flow or "FlowMatch" in type(scheduler).__name__:
        return partial(flow_loss, time=time, shift=shift)
    if scheduler.config.get("prediction_type") not in _TARGETS or "beta_schedule" not in scheduler.config:
        raise EcoDiffError(
            f"{type(scheduler).__name__}: its config does not say what the denoiser was trained to predict; take a "
            f"scheduler of flow matching, or one with a beta schedule and prediction_type {', '.join(_TARGETS)}."
        )
    noising = diffusers.DDPMScheduler.from_config(scheduler.config, clip_sample=False)
    return partial(denoising_loss, noising, time_dtype=time_dtype)


def denoising_loss(
    noising,
    forward,
    latents: Tensor,
    condition: dict,
    generator: torch.Generator,
    time_dtype: torch.dtype = torch.int64,
) -> Tensor:
    """Squared error of what the ``noising`` scheduler's config says is predicted, at a uniform time step.

    epsilon: the noise ε (Eq. 5); v_prediction: the velocity √ᾱ ε - √(1-ᾱ) x (Salimans & Ho 2022); sample: the latents
    x [N, C, H, W] themselves. A variance that is predicted as well is not trained.
    """
    # Drawn on the CPU, where the generator is, so that every device gets the same noise.
    noise = torch.randn(latents.shape, generator=generator).to(latents.device)
    t = torch.randint(noising.config.num_train_timesteps, (len(latents),), generator=generator).to(latents.device)
    predicted = forward(noising.add_noise(latents, noise, t), timestep=t.to(time_dtype), **condition).sample
    predicted = without_variance(predicted, latents)
    target = _target(noising, latents, noise, t)
    return torch.nn.functional.mse_loss(predicted.float(), target)


def _target(noising, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """What the denoiser is to predict: one of `_TARGETS`, KeyError for anything else."""
    prediction = noising.config.prediction_type
    if prediction == "epsilon":
        return noise
    if prediction == "v_prediction":
        return noising.get_velocity(latents, noise, t)
    if prediction == "sample":
        return latents
    raise KeyError(prediction)


def flow_loss(
    forward, latents: Tensor, condition: dict, generator: torch.Generator, time: float = 1.0, shift: float = 1.0
) -> Tensor:
    """Squared error of the velocity ε - x on the straight path from x to ε (rectified flow).

    The share σ of noise is logit-normal, ``shift``ed, as in Stable Diffusion 3 (Esser et al. 2024). ``time`` is what
    the denoiser is told where all is noise: 1 for FLUX, 1000 for SD3. A denoiser with an embedded guidance is told 1,
    unless ``condition`` says otherwise.
    """
    noisy, noise, sigma = noised(latents, generator, shift)
    if forward.config.get("guidance_embeds"):
        condition = {"guidance": torch.ones_like(sigma), **condition}
    predicted = forward(noisy, timestep=sigma * time, **condition).sample
    return torch.nn.functional.mse_loss(predicted.float(), noise - latents)


def noised(latents: Tensor, generator: torch.Generator, shift: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """(1 - σ) x + σ ε, ε, and σ [N] for latents x [N, ...], packed or not.

    σ is logit-normal, then shifted to s σ / (1 + (s - 1) σ): the larger s, the more noise.
    """
    noise = torch.randn(latents.shape, generator=generator).to(latents.device)
    sigma = torch.randn(len(latents), generator=generator).sigmoid().to(latents.device)
    # With a shift of 1 only 1.4 % of the draws have σ > 0.9, with 3 it is 13.6 %.
    sigma = shift * sigma / (1 + (shift - 1) * sigma)
    share = sigma.view(-1, *[1] * (latents.ndim - 1))  # one σ for all of a sample
    return (1 - share) * latents + share * noise, noise, sigma
