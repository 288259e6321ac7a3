"""First-order Taylor scores of heads and neurons, and Diff-Pruning's criterion (Fang et al., 2023).

Diff-Pruning scores groups of channels, convolutions included, by a first-order Taylor expansion of the noise prediction
loss, summed over the time steps until the loss has become small. Here a group is a unit. ``scores`` expands in a gate m
that multiplies it, at m = 1, where ∂L/∂m = Σ w · ∂L/∂w over the weights that read the unit:

    score = | Σ_t ∂L_t / ∂m |,        L_t = ‖ε̂(z_t, t) - ε‖² / size,        z_t = a_t z_0 + s_t ε.

That is what the published script calls plain Taylor. What it calls Diff-Pruning takes each weight by itself,
Σ |w · Σ_t ∂L_t/∂w| over the weights that write or read the unit: ``diff_pruning``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ecodiff.errors import EcoDiffError
from ecodiff.method.hooks import apply_gates
from ecodiff.method.sites import Site
from ecodiff.pipelines.parts import denoiser
from ecodiff.pipelines.running import frozen, not_half, placed
from ecodiff.progress import progress_bar

from .calibration import KINDS, Call, Sampling, columns, draw, mix, sites_of


@placed
def scores(
    pipe,
    prompts: Sequence,
    *,
    kinds: tuple[str, ...] = KINDS,
    threshold: float = 0.05,
    elementwise: bool = False,
    **sampling,
) -> dict[str, Tensor]:
    """``|Σ_t ∂L_t/∂m|`` for the gate of each unit, {site name: fp32 [units]}.

    z_0 are final latents of the model itself and ε is fresh noise, so no images are needed. Steps are taken from the
    least noise on, gradients added with their sign over prompts and steps, until L_t < threshold · max L (0.05 as
    published for DDPM; 0 takes every step, and the losses of flow models rarely fall below it). ∂L/∂m is Σ w · ∂L/∂w
    over the weights that read the unit. With ``elementwise`` the score is ``Σ |w · Σ_t ∂L_t/∂w|`` over all weights that
    write or read it (biases left out), which needs a gradient as large as these layers.

    With guidance the loss is that of both predictions, conditional and not, as in training. ``sampling``: fields of
    ``Sampling``. Raises EcoDiffError for a threshold outside [0, 1), a denoiser in float16, one whose input has not the
    shape of the latents, and a scheduler whose prediction is of an unknown type.
    """
    if not 0 <= threshold < 1:
        raise EcoDiffError(f"taylor: threshold={threshold} is a share of the largest loss, in [0, 1).")
    model, settings = denoiser(pipe), Sampling(**sampling)
    sites = sites_of(pipe, kinds, exclude=settings.exclude)
    not_half(model, "taylor")
    loss = NoisePrediction.prepare(pipe, prompts, settings)
    device = next(model.parameters()).device
    gates = {name: torch.ones(site.units, device=device, requires_grad=True) for name, site in sites.items()}
    weights = _weights(model, sites)
    totals: dict[str, Tensor] = {}

    def add(part: Tensor) -> None:
        factors = weights if elementwise else gates
        gradients = torch.autograd.grad(part, factors.values(), allow_unused=True)
        for name, gradient in zip(factors, gradients, strict=True):
            if gradient is None:  # not every call reaches every site
                continue
            if name in totals:
                totals[name] = totals[name] + gradient.float()
            else:
                totals[name] = gradient.float()

    with torch.enable_grad(), frozen(model), apply_gates(model, gates, sites):
        for weight in weights.values():
            weight.requires_grad_(elementwise)
        try:
            largest = 0.0
            for step in progress_bar(loss.steps, desc="taylor: gradients", progress=settings.progress):
                value = loss(step, add)
                largest = max(largest, value)
                if value < threshold * largest:
                    break
        finally:
            for weight in weights.values():
                weight.requires_grad_(False)  # as inside frozen, which gives back what was there before
    if elementwise:
        return _sum_over_weights(model, sites, totals)
    return {name: totals.get(name, torch.zeros(site.units)).abs().cpu() for name, site in sites.items()}


def diff_pruning(pipe, prompts: Sequence, **options) -> dict[str, Tensor]:
    """``scores`` with ``elementwise``: Diff-Pruning's own sum over weights, {site name: fp32 [units]}."""
    return scores(pipe, prompts, elementwise=True, **options)


@dataclass(frozen=True)
class NoisePrediction:
    """The loss of one noise level over all prompts, for any pipeline.

    What the sampling loop tells the denoiser (text, time, sizes) is recorded once, then its latents are replaced by
    noised final latents. ``recorded``: for each batch its first number, final latents and calls. ``steps``: step
    numbers, least noise first.
    """

    scheduler: object
    recorded: list[tuple[int, Tensor, list[Call]]]
    seed: int

    @classmethod
    def prepare(cls, pipe, prompts, sampling: Sampling) -> NoisePrediction:
        """Run the prompts and record final latents and calls.

        The calls of all steps hold the same objects (text, sizes), so that this takes little memory.
        """
        recorded: list[tuple[int, Tensor, list[Call]]] = []
        calls: list[Call] = []
        last_scheduler: object = None

        def each_call(call: Call) -> None:
            calls.append(replace(call, output=None))

        def each_batch(latents: Tensor, scheduler) -> None:
            nonlocal last_scheduler
            last_scheduler = scheduler
            first = sum(len(z) for _, z, _ in recorded)
            recorded.append((first, latents.float(), list(calls)))
            calls.clear()

        draw(pipe, prompts, sampling, label="taylor: latents", each_call=each_call, each_batch=each_batch)
        return cls(last_scheduler, recorded, sampling.seed)

    @property
    def steps(self) -> list[int]:
        numbers: set[int] = set()
        for _, _, calls in self.recorded:
            numbers.update(call.step for call in calls)
        return sorted(numbers, reverse=True)

    def __call__(self, step: int, each_part: Callable[[Tensor], None] | None = None) -> float:
        """L_t of this step, averaged over prompts; ``each_part`` gets its differentiable summands, one a batch."""
        count, value = sum(len(z) for _, z, _ in self.recorded), 0.0
        for first, z_0, calls in self.recorded:
            calls_of_step = [call for call in calls if call.step == step]  # guidance may make two
            for call in calls_of_step:
                noise = self._noise(step, first, z_0)
                part = self._loss(call, z_0, noise) * len(z_0) / count / len(calls_of_step)
                if each_part:
                    each_part(part)
                value += part.item()
        return value

    def _noise(self, step: int, first: int, like: Tensor) -> Tensor:
        """Noise of a sample depends on its number and the step alone, not on the batch it is in."""
        generators = [torch.Generator().manual_seed(mix(self.seed, step, first + i)) for i in range(len(like))]
        return torch.stack([torch.randn(like.shape[1:], generator=g) for g in generators]).to(like.device)

    def _loss(self, call: Call, z_0: Tensor, noise: Tensor) -> Tensor:
        """The recorded call again, with noised final latents in the place of its own; a scalar."""
        args, kwargs = list(call.args), dict(call.kwargs)
        place = next((name for name in ("sample", "hidden_states") if name in kwargs), None)
        given = kwargs[place] if place else args[0]
        copies, rest = divmod(len(given), len(z_0))  # two copies where guidance puts both halves into one call
        if given.shape[1:] != z_0.shape[1:] or rest:
            raise EcoDiffError(
                f"taylor: {type(call.network).__name__} is given {list(given.shape)}, but final latents are "
                f"{list(z_0.shape)}; pipelines that add channels to their latents are not covered."
            )
        noised, target = noised_input(self.scheduler, call.step, z_0, noise)
        noised = noised.to(given.dtype).repeat(copies, *[1] * (z_0.ndim - 1))
        if place:
            kwargs[place] = noised
        else:
            args[0] = noised
        predicted = call.network(*args, **kwargs)[0]
        predicted = predicted[:, : z_0.shape[1]].float()  # some predict a variance, too: further channels
        return (predicted - target.repeat(copies, *[1] * (z_0.ndim - 1))).square().mean()


def noised_input(scheduler, step: int, z_0: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """The denoiser's input at a step for z_t = a z_0 + s ε, as the scheduler scales it, and what it should predict."""
    scheduler = copy.copy(scheduler)
    t = scheduler.timesteps[min(step, len(scheduler.timesteps) - 1)]

    def at(z: Tensor, eps: Tensor) -> Tensor:
        scheduler._step_index = scheduler._begin_index = None  # look the step up by its time
        times = t.reshape(1).to(z.device).expand(len(z))
        if hasattr(scheduler, "scale_noise"):
            return scheduler.scale_noise(z, times, eps)
        return scheduler.add_noise(z, eps, times)

    # Noising is linear in z_0 and ε for every scheduler, so two numbers, put through it, give a and s.
    one, zero = torch.ones(1, 1, device=z_0.device), torch.zeros(1, 1, device=z_0.device)
    a, s = at(one, zero).item(), at(zero, one).item()
    z_t = a * z_0 + s * noise
    if hasattr(scheduler, "scale_model_input"):
        scheduler._step_index = None
        z_t = scheduler.scale_model_input(z_t, t)
    if hasattr(scheduler, "scale_noise"):
        return z_t, noise - z_0  # flow matching
    kind = scheduler.config.get("prediction_type", "epsilon")
    if kind == "flow_prediction":
        return z_t, noise - z_0
    if kind == "epsilon":
        return z_t, noise
    if kind == "sample":
        return z_t, z_0
    if kind == "v_prediction":
        size = (a * a + s * s) ** 0.5  # 1 for schedulers that preserve the variance
        return z_t, (a * noise - s * z_0) / size
    raise EcoDiffError(f"taylor: {type(scheduler).__name__} predicts {kind!r}, which is not known here.")


def _weights(model: nn.Module, sites: dict[str, Site]) -> dict[str, Tensor]:
    """{layer name: weight} of the layers that write or read units."""
    weights = {}
    for site in sites.values():
        for span in site.writers + site.readers:
            weights[span.layer] = model.get_submodule(span.layer).weight
    return weights


@torch.no_grad()
def _sum_over_weights(model: nn.Module, sites: dict[str, Site], gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Σ |w · g| over the rows that write a unit and the columns that read it."""
    result = {}
    for name, site in sites.items():
        total = torch.zeros(site.units)
        for dimension, spans in enumerate((site.writers, site.readers)):
            for span in spans:
                if span.layer not in gradients:
                    continue
                products = (model.get_submodule(span.layer).weight.float() * gradients[span.layer]).abs()
                each = products.flatten(1).sum(1 - dimension)[columns(span, site.units)]
                total += each.view(site.units, span.size).sum(1).cpu()
        result[name] = total
    return result
