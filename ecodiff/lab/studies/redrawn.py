"""What drawing gates anew in recomputation does to a gradient: its cosine with the exact one.

The published loop checkpoints every step and does not restore the random state when a step is computed again. Its
forward pass then belongs to one draw of the gates, its backward pass to another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from ecodiff.method.gates import Gates, fresh_gates
from ecodiff.method.hard_concrete import HardConcrete
from ecodiff.method.hooks import apply_gates
from ecodiff.method.sites import find_sites
from ecodiff.method.trajectory import final_latents
from ecodiff.pipelines.identity import Identity
from ecodiff.pipelines.parts import denoiser
from ecodiff.pipelines.prompts import collate
from ecodiff.storage import records
from ecodiff.storage.fingerprint import key

CAPTIONS = 2
"""Captions per seed; each seed has its own."""


def cosines(
    pipe,
    captions: Sequence[str],
    *,
    steps: int,
    log_alpha: float,
    delta: float,
    seeds: int = 5,
    guidance_scale: float | None = None,
    call: Mapping | None = None,
) -> list[float]:
    """Cosines between the exact gradient in λ and the one with gates drawn anew in recomputation, one per seed.

    Both gradients have the same forward pass: all λ at ``log_alpha``, gates of each sample drawn in every call of a
    module, the squared error of the final latents. All steps are recomputed (``keep_last=0``), as in the published
    loop; a step whose activations are kept would have the exact gradient. A cosine of 0 also stands where one of the
    two gradients is exactly zero. Results are recorded rows (``data/results/redrawn.jsonl``).

    Raises EcoDiffError through ``final_latents`` for a pipeline that cannot be differentiated.
    """
    captions = list(captions[: CAPTIONS * seeds])
    settings = {"num_inference_steps": steps, **(call or {})}
    if guidance_scale is not None:
        settings["guidance_scale"] = guidance_scale
    model = Identity.of(pipe, vae=False)
    config = {
        "what": "redrawn_gradient",
        "version": 1,
        "weights": model.denoiser,
        "conditions": key(model.conditions),
        "captions": key(captions),
        "log_alpha": log_alpha,
        "delta": delta,
        "seeds": seeds,
        "settings": settings,
    }

    def measured() -> dict:
        return {"cosines": [_cosine(pipe, captions, log_alpha, delta, seed, settings) for seed in range(seeds)]}

    return records.measure(config, measured, name="redrawn")["values"]["cosines"]


def _cosine(pipe, captions: Sequence[str], log_alpha: float, delta: float, seed: int, settings: Mapping) -> float:
    first = CAPTIONS * seed % max(1, len(captions))
    batch = list(captions[first : first + CAPTIONS])
    of = partial(gradient, pipe, batch, log_alpha=log_alpha, delta=delta, seed=seed, settings=settings)
    exact, redrawn = of(restore=True), of(restore=False)
    return torch.nn.functional.cosine_similarity(exact, redrawn, dim=0).item()


def gradient(
    pipe,
    captions: Sequence[str],
    *,
    log_alpha: float,
    delta: float,
    seed: int,
    restore: bool,
    settings: Mapping,
    keep_last: int = 0,
) -> Tensor:
    """The gradient in all λ, one vector, of the squared error of the final latents.

    ``restore``: recomputation draws the gates of the forward pass again, which makes the gradient exact; otherwise it
    draws others, as published. ``keep_last`` steps keep their activations and are not recomputed.
    """
    network = denoiser(pipe)
    gates = Gates.start(find_sites(network), log_alpha, HardConcrete(delta=delta))
    arguments = {**settings, **collate(list(captions))}

    def noise() -> list[torch.Generator]:  # fresh ones for teacher and student: a generator moves on when it draws
        return [torch.Generator().manual_seed(seed + k) for k in range(len(captions))]

    teacher = final_latents(pipe, gradients=False, generator=noise(), **arguments)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        with apply_gates(network, fresh_gates(gates, len(captions)), gates.sites, gates.log_alpha.values()):
            student = final_latents(
                pipe, preserve_rng_state=restore, keep_last=keep_last, generator=noise(), **arguments
            )
            # Nothing reads some sites, such as the last text stream of a joint transformer: their gradient is zero.
            parts = torch.autograd.grad(
                (student - teacher).square().mean(),
                list(gates.log_alpha.values()),
                allow_unused=True,
                materialize_grads=True,
            )
    return torch.cat(parts)
