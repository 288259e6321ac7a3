"""Seconds and peak memory of one mask update against the number of denoising steps T (§2.3, Fig. 8), from one run.

    python -m ecodiff benchmark mask-update                       # table; about ten minutes on two cores
    python -m ecodiff benchmark mask-update --steps 1 2 5 --json rows.jsonl

Variants:

    plain         the whole graph is kept: 2 units of work a step (forward, backward), memory grows with T
    checkpointed  Alg. 2 as this package does it: 3 units a step, the memory of one step. ``keep_last=1``: the last
                  step's activations are used first, so keeping them costs nothing and saves one recomputation
    every step    the same with ``keep_last=0``
    half kept     ``keep_last=T/2``: memory traded for time
    published     what the authors' code does: a pass without gradients that stores the latents, then for each step
                  from the last to the first one recomputation and two ``autograd.grad`` calls on a retained graph

The variants take turns, so that a busy machine slows all of them, and ratios are medians over turns. Memory is what
torch allocates above the weights and inputs: the allocator's own events on a CPU (exact, the same in each run), its
peak counter on CUDA.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from functools import partial
from operator import itemgetter

import torch
from torch import Tensor

import ecodiff
from ecodiff.method.gates import Gates
from ecodiff.method.hooks import apply_gates
from ecodiff.method.sites import find_sites
from ecodiff.method.trajectory import final_latents
from ecodiff.pipelines.running import frozen

VARIANTS = ("plain", "checkpointed", "every step", "half kept", "published")
GUIDANCE = 5.0


def inputs(pipe, batch: int) -> dict:
    """The call's arguments for random text of 24 tokens (its content does not change the cost) and a fixed z_T."""
    config, generator = pipe.unet.config, torch.Generator().manual_seed(0)

    def noise(*shape):
        return torch.randn(batch, *shape, generator=generator).to(pipe.device)

    text = (24, config.cross_attention_dim)
    # SDXL joins the pooled text with embeddings of six numbers: sizes and crop.
    pooled = (config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim,)
    side = config.sample_size * pipe.vae_scale_factor
    return {
        "prompt_embeds": noise(*text),
        "negative_prompt_embeds": noise(*text),
        "pooled_prompt_embeds": noise(*pooled),
        "negative_pooled_prompt_embeds": noise(*pooled),
        "latents": noise(config.in_channels, config.sample_size, config.sample_size),
        "height": side,
        "width": side,
        "guidance_scale": GUIDANCE,
    }


def ours(pipe, arguments: dict, gates: Gates, teacher: Tensor, steps: int, *, checkpoint: bool, keep_last: int = 0):
    """One mask update by this package: it adds gradients to those of ``gates.log_alpha``."""
    values = gates.sample(torch.Generator().manual_seed(0))
    with apply_gates(pipe.unet, values, gates.sites):
        options = {"checkpoint": checkpoint, "keep_last": keep_last, "num_inference_steps": steps}
        latents = final_latents(pipe, **options, **arguments)
        (latents - teacher).square().mean().backward()


def published(pipe, arguments: dict, gates: Gates, teacher: Tensor, steps: int, *, conditions: dict):
    """One mask update by the published loop, for a first-order scheduler.

    Here all its steps have the same gate sample, so that it is exact. ``conditions`` is what the pipeline passes to
    the denoiser beside latents and time step.
    """
    unet, scheduler = pipe.unet, type(pipe.scheduler).from_config(pipe.scheduler.config)
    scheduler.set_timesteps(steps)
    values = gates.sample(torch.Generator().manual_seed(0))
    leaves = {name: value.detach().requires_grad_() for name, value in values.items()}

    def step(latents, i):
        t = scheduler.timesteps[i]
        scheduler._step_index = i
        model_input = scheduler.scale_model_input(torch.cat([latents] * 2), t)
        uncond, text = unet(model_input, t, **conditions)[0].chunk(2)
        return scheduler.step(uncond + GUIDANCE * (text - uncond), t, latents)[0]

    with frozen(unet), apply_gates(unet, leaves, gates.sites):
        stored = [arguments["latents"] * scheduler.init_noise_sigma]
        with torch.no_grad():
            for i in range(steps):
                stored.append(step(stored[-1], i))
        final = stored[-1].requires_grad_()
        (upstream,) = torch.autograd.grad((final - teacher).square().mean(), final)
        total = [torch.zeros_like(leaf) for leaf in leaves.values()]
        for i in reversed(range(steps)):
            before = stored[i].detach().requires_grad_()
            after = step(before, i)
            parts = torch.autograd.grad(after, list(leaves.values()), upstream, retain_graph=True)
            (upstream,) = torch.autograd.grad(after, before, upstream, retain_graph=True)
            total = [a + b for a, b in zip(total, parts, strict=True)]
            del after  # and with it the retained graph, before the next step makes its own
    torch.autograd.backward(list(values.values()), total)


def peak_bytes(update, device) -> int:
    """The most bytes alive at once during ``update()``, above what was alive before."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        update()
        return torch.cuda.max_memory_allocated() - before
    gc.collect()  # memory from before, given back while the profiler watches, would be counted
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=False) as profile:
        update()
    changes = []
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            changes.append((event.start_ns(), event.nbytes()))  # negative where memory is given back
    alive = peak = 0
    for _, change in sorted(changes, key=itemgetter(0)):
        alive += change
        peak = max(peak, alive)
    return peak


def seconds(update, device) -> float:
    """Seconds of the clock that ``update()`` takes."""
    started = time.perf_counter()
    update()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def measure(pipe, steps: int, batch: int, turns: int) -> list[dict]:
    """One row a variant at this T; raises AssertionError where a variant's gradient is not the plain one."""
    arguments, device = inputs(pipe, batch), pipe.device
    gates = Gates.start(find_sites(pipe.unet), 1.0, device=device)
    conditions: list[dict] = []

    def remember(module, args, kwargs):
        conditions.append(kwargs)

    handle = pipe.unet.register_forward_pre_hook(remember, with_kwargs=True)
    teacher = final_latents(pipe, gradients=False, num_inference_steps=steps, **arguments)
    handle.remove()

    half = -(-steps // 2)  # rounded up
    common = (pipe, arguments, gates, teacher, steps)
    updates = {
        "plain": partial(ours, *common, checkpoint=False),
        "checkpointed": partial(ours, *common, checkpoint=True, keep_last=1),
        "every step": partial(ours, *common, checkpoint=True, keep_last=0),
        "half kept": partial(ours, *common, checkpoint=True, keep_last=half),
        "published": partial(published, *common, conditions=conditions[0]),
    }

    def clean(variant):
        """The update of a variant; the gradients of the one before are gone, as are their bytes."""
        for value in gates.log_alpha.values():
            value.grad = None
        return updates[variant]

    peaks, gradients = {}, {}
    for variant in VARIANTS:  # also warms up
        peaks[variant] = peak_bytes(clean(variant), device)
        gradients[variant] = torch.cat([value.grad for value in gates.log_alpha.values()])
        error = (gradients[variant] - gradients["plain"]).norm() / gradients["plain"].norm()
        assert error < 1e-3, f"{variant}: its gradient is off by {error:.1e}"
    times = {variant: [] for variant in VARIANTS}
    for _ in range(turns):
        for variant in VARIANTS:
            times[variant].append(seconds(clean(variant), device))

    def ratio(variant, other):
        return statistics.median(a / b for a, b in zip(times[variant], times[other], strict=True))

    rows = []
    for variant in VARIANTS:
        rows.append(
            {
                "variant": variant,
                "T": steps,
                "seconds": statistics.median(times[variant]),
                "times_plain": ratio(variant, "plain"),
                "times_published": ratio(variant, "published"),
                "peak_bytes": peaks[variant],
                "bit_equal": torch.equal(gradients[variant], gradients["plain"]),
                "turns": turns,
                "batch": batch,
                "threads": torch.get_num_threads(),
                "device": str(device),
                "torch": torch.__version__,
                "denoiser_parameters": sum(p.numel() for p in pipe.unet.parameters()),
            }
        )
    return rows


def verdicts(rows: list[dict]) -> list[dict[str, str]]:
    """What counting lets one expect of the checkpointed update, and the worst that was measured: rows of a table."""
    ours = {row["T"]: row for row in rows if row["variant"] == "checkpointed"}
    theirs = {row["T"]: row for row in rows if row["variant"] == "published"}
    lines = []

    def line(what: str, expected: str, measured: str, holds: bool) -> None:
        lines.append(
            {
                "of the checkpointed update": what,
                "expected": expected,
                "worst measured": measured,
                "as expected": "yes" if holds else "no",
            }
        )

    slowest = max(row["times_plain"] for row in ours.values())
    line("time, relative to plain", "at most 1.6", f"{slowest:.2f}", slowest <= 1.6)
    against = max(row["times_published"] for row in ours.values())
    line("time, relative to the published loop", "at most 0.75", f"{against:.2f}", against <= 0.75)
    memory = max(ours[steps]["peak_bytes"] / theirs[steps]["peak_bytes"] for steps in ours)
    line("peak memory, relative to the published loop", "at most 1.02", f"{memory:.2f}", memory <= 1.02)
    if {5, 20} <= ours.keys():
        growth = ours[20]["peak_bytes"] / ours[5]["peak_bytes"] - 1
        line("growth of peak memory from T = 5 to T = 20", "under 5 %", f"{100 * growth:.1f} %", growth < 0.05)
    return lines


def torch_device(name: str | None) -> torch.device:
    """The device of this name; without a name CUDA where there is one, else the CPU."""
    if name:
        return torch.device(name)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def run(options: argparse.Namespace) -> int:
    """The command ``python -m ecodiff benchmark mask-update``."""
    from diffusers import EulerDiscreteScheduler

    pipe = ecodiff.load(options.model)
    pipe.to(torch_device(options.device))
    # Of first order, as the published loop needs: it calls the scheduler twice for the same step.
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    count = sum(p.numel() for p in pipe.unet.parameters())
    print(f"{options.model}, {count / 1e6:.1f} M parameters, batch {options.batch}, {torch.get_num_threads()} threads")
    print(f"{'T':>3}  {'variant':13} {'seconds':>8} {'x plain':>8} {'x publ.':>8} {'peak MiB':>9}  gradient")
    rows = []
    for steps in options.steps:
        for row in measure(pipe, steps, options.batch, options.turns):
            rows.append(row | {"model": options.model})
            same = "= plain, bit for bit" if row["bit_equal"] else "= plain, to rounding"
            print(
                f"{steps:3d}  {row['variant']:13} {row['seconds']:8.3f} {row['times_plain']:8.2f} "
                f"{row['times_published']:8.2f} {row['peak_bytes'] / 2**20:9.1f}  {same}",
                flush=True,
            )
    for line in verdicts(rows):
        print(*line.values(), sep="; ")
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return 0
