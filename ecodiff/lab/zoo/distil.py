"""Two distillations of FLUX-class pipelines: guidance into an embedded number, many steps into four."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import torch

from ecodiff.retraining.losses import noised

from .fit import fit, undrawn_scenes
from .stages import compiled, conditioning, encode


def _frozen(transformer):
    return deepcopy(transformer).requires_grad_(False).eval()


def train_guidance(pipe, recipe: dict, folder: Path, name: str) -> dict:
    """Teach the transformer what classifier-free guidance of itself would predict (Meng et al. 2023, stage one).

    With a frozen copy v of it (at guidance 1), a caption c and a scale w drawn uniformly from the recipe's range, the
    new prediction at guidance w goes to v(∅) + w (v(c) - v(∅)). Text encoders stay as they are. Afterwards one call a
    step generates what took two.
    """
    options, student = recipe[name]["train"], pipe.transformer
    teacher = _frozen(student)
    pipe.to(pipe.vae.device)
    student_of, teacher_of = compiled(student, options), compiled(teacher, options)
    low, high = options["scales"]

    def loss_of(scenes, generator):
        captions = [scene.caption for scene in scenes]
        keep = torch.ones(len(scenes), dtype=torch.bool)
        with torch.no_grad():
            noisy, _, sigma = noised(encode(pipe, scenes), generator, options.get("shift", 1.0))
            scale = (low + (high - low) * torch.rand(len(scenes), generator=generator)).to(noisy.device)
            with_caption = conditioning(pipe, captions, keep)
            without = conditioning(pipe, captions, ~keep)
            one = torch.ones_like(sigma)
            guided = teacher_of(noisy, timestep=sigma, guidance=one, **with_caption).sample.float()
            free = teacher_of(noisy, timestep=sigma, guidance=one, **without).sample.float()
            target = free + scale[:, None, None] * (guided - free)
        predicted = student_of(noisy, timestep=sigma, guidance=scale, **with_caption).sample
        return torch.nn.functional.mse_loss(predicted.float(), target)

    return fit(name, [student], loss_of, options, folder, recipe["seed"])


def train_distil(pipe, recipe: dict, folder: Path, name: str) -> dict:
    """Teach the transformer to cross in one step the stretch of the flow that takes its teacher several.

    From noise, the student walks its own few steps of the recipe's schedule. At each of them the teacher (the
    transformer as it was, guidance folded in) starts from the student's state x at σ and takes its own Euler steps down
    to the next σ′, reaching y; the student's velocity at x goes to (x - y) / (σ - σ′), the mean velocity of that
    stretch. States are the student's own, so it also learns to go on from its own errors.
    """
    options, student = recipe[name]["train"], pipe.transformer
    teacher = _frozen(student)
    for part in (pipe.vae, pipe.text_encoder, pipe.text_encoder_2):
        part.requires_grad_(False)
    student_of, teacher_of = compiled(student, options), compiled(teacher, options)
    steps, finer = options["student_steps"], options["teacher_steps"] // options["student_steps"]

    def loss_of(scenes, generator):
        n = len(scenes)
        tokens = (pipe.vae.config.sample_size // pipe.vae_scale_factor // 2) ** 2  # FLUX packs 2 x 2 latents into one
        with torch.no_grad():
            condition = conditioning(pipe, [scene.caption for scene in scenes], torch.ones(n, dtype=torch.bool))
        x = torch.randn(n, tokens, student.config.in_channels, generator=generator).to(student.device)
        loss = 0.0
        for k in range(steps):
            start, stretch = 1 - k / steps, 1 / steps
            with torch.no_grad():
                y = x
                for j in range(finer):
                    sigma = x.new_full((n,), start - stretch * j / finer)
                    y = y - stretch / finer * teacher_of(y, timestep=sigma, **condition).sample.float()
            velocity = student_of(x, timestep=x.new_full((n,), start), **condition).sample.float()
            loss = loss + torch.nn.functional.mse_loss(velocity, (x - y) / stretch) / steps
            x = (x - stretch * velocity).detach()
        return loss

    return fit(name, [student], loss_of, options, folder, recipe["seed"], draw=undrawn_scenes)
