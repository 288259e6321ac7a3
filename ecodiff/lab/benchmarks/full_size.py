"""Full-size denoisers with random weights: what a mask update and a drawing step really take, as recorded rows.

    python -m ecodiff benchmark full-size sd2                    # everything that fits this machine
    python -m ecodiff benchmark full-size sdxl flux-schnell --parts inference round --minutes 9
    python -m ecodiff benchmark full-size tiny                   # shows in seconds that it runs; records nothing

Three parts, rows of ``data/results/full_size.jsonl`` (read with ``ecodiff.storage.records.table("full_size")``):

    update      one mask update against T: plain where the prediction fits, checkpointed (``keep_last=1``), and with
                half of the steps kept, or as many as fit
    inference   one denoiser call of the original, masked and pruned network at 10-50 % of the units; and the bytes that
                its largest convolution uses inside
    round       the same at 30 %, kept units rounded up to a multiple of 8, 16, 64

``--measure both`` (the default) reads seconds and bytes from the same runs; ``time`` leaves the bytes out; ``peak``
runs all once and leaves the seconds out, which a busy machine would spoil. On CUDA in bf16, peaks from its allocator;
else in fp32 on the CPU, where the allocator's own events are read. Each row also has what `ecodiff.cost.trace` says.
Variants take turns, and ratios are medians over turns, so that a busy machine slows all alike. A part that has no time
left (``--minutes``) stops; the next run goes on from the recorded rows. A network that does not fit the machine's
memory is skipped, and the output says so.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import time

import torch

from ecodiff.cost import presets
from ecodiff.cost.trace import parameters, trace
from ecodiff.method.checkpointing import kept, recomputed
from ecodiff.method.hooks import OpenGates, apply_gates
from ecodiff.method.mask import make_mask
from ecodiff.method.sites import find_sites
from ecodiff.method.surgery import prune_denoiser
from ecodiff.storage import records

from .mask_update import peak_bytes

MULTIPLES = (1, 8, 16, 64)
VERSION = 1


class Bench:
    """One network with random weights on the device, its inputs, and a sampling loop reduced to denoiser calls."""

    def __init__(self, name: str, samples: int, device: torch.device, dtype: torch.dtype, size: int | None):
        self.name, self.samples, self.device, self.dtype = name, samples, device, dtype
        if name == "tiny":
            skeleton, self.size, text = _tiny(), (64, 64), 8
        else:
            preset = presets.preset(name)
            self.size, text = (size, size) if size else preset.size, preset.text_tokens
            skeleton = preset.build()
        frames = 1 if name == "tiny" or not preset.frames else (preset.frames - 1) // 4 + 1
        factor = 32 if name == "sana" else 8
        geometry = presets.Geometry(samples, self.size[0] // factor, self.size[1] // factor, frames, text)
        self.shapes, self.latents = presets.inputs(skeleton, geometry)
        self.sites = find_sites(skeleton)
        self.counted = trace(
            skeleton, self.shapes, dtype=dtype, sites=self.sites, gradient_input=self.latents, inner=False
        )
        self.bytes = parameters(skeleton) * dtype.itemsize
        self.room = _memory(device) - self.bytes
        if self.room < self.counted.inputs + self.counted.forward_peak:
            raise MemoryError(
                f"{name} needs {(self.bytes + self.counted.forward_peak) / 1e9:.1f} GB, more than this machine has free"
            )
        self.network = skeleton.to(dtype).to_empty(device=device).requires_grad_(False).eval()
        block = 0.02 * torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))  # repeated: billions take long
        block = block.to(device, dtype)
        with torch.no_grad():
            for tensor in (*self.network.parameters(), *self.network.buffers()):
                if tensor.is_floating_point():
                    for part in tensor.view(-1).split(len(block)):
                        part.copy_(block[: len(part)])
        self.arguments = _made(self.shapes, device, dtype)

    def config(self, part: str, **more) -> dict:
        return {
            "what": f"full_size_{part}", "version": VERSION, "model": self.name, "weights": "random", "seed": 0,
            "size": list(self.size), "samples": self.samples, "dtype": str(self.dtype), "device": _device(self.device),
            "threads": torch.get_num_threads(), **more,
        }  # fmt: skip

    def call(self, network, latents=None):
        arguments = self.arguments if latents is None else self.arguments | {self.latents: latents}
        return network(**arguments, return_dict=False)[0]

    def update(self, steps: int, keep_last: int) -> None:
        """One mask update: T calls in a row, each output the next input; a scheduler costs nothing beside them."""
        gates = {
            name: torch.ones(site.units, device=self.device, requires_grad=True) for name, site in self.sites.items()
        }
        latents = self.arguments[self.latents]
        with apply_gates(self.network, gates, self.sites):
            opened = OpenGates(self.network)
            for step in range(steps):
                run = kept if step >= steps - keep_last else recomputed
                output = run(self.call, opened, self.network, latents)
                latents = 0.9 * latents + 0.1 * (
                    output if output.shape == latents.shape else output[:, : latents.shape[1]]
                )
            latents.float().square().mean().backward()

    def saved_bytes(self) -> int:
        """Bytes that autograd saves in one call whose input needs a gradient: each storage once, weights left out."""
        weights = {t.untyped_storage().data_ptr() for t in (*self.network.parameters(), *self.network.buffers())}
        gates = {
            name: torch.ones(site.units, device=self.device, requires_grad=True) for name, site in self.sites.items()
        }
        saved = {}

        def remember(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        latents = self.arguments[self.latents].clone().requires_grad_()
        with apply_gates(self.network, gates, self.sites):
            with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
                self.call(self.network, latents)
        return sum(saved.values())


def update_rows(bench: Bench, steps: tuple[int, ...], turns: int, measure, record) -> None:
    c = bench.counted
    for count in steps:
        fitting = max(0, int((bench.room - c.update.peak) // max(c.update.held, 1)) + 1)
        if fitting < 1:
            print(
                f"{bench.name}: one call's activations ({c.update.peak / 1e9:.1f} GB) do not fit; no update is measured"
            )
            return
        half = max(1, min(count, fitting) // 2)
        variants = {"checkpointed": 1, "keep_last": half, "plain": count}
        variants = {
            name: steps_kept
            for name, steps_kept in variants.items()
            if steps_kept <= fitting and (name != "keep_last" or 1 < steps_kept < count)
        }
        if count == 1:  # nothing is left to recompute
            variants = {"plain": 1}

        def measured(count=count, variants=variants):
            runs = {name: lambda keep=keep: bench.update(count, keep) for name, keep in variants.items()}
            base = "plain" if "plain" in variants else "checkpointed"
            found = _in_turns(runs, base, turns, bench.device, measure)
            for name, keep in variants.items():
                saving = max(c.update.held - c.first_held, 0) if keep == count else 0
                predicted = count * c.inputs + (keep - 1) * c.update.held + c.update.peak - saving
                found[name] |= {"keep_last": keep, "predicted_bytes": predicted}
            return {"variants": found, "relative_to": base, "weight_bytes": bench.bytes}

        record(bench.config("update", T=count, variants=variants, turns=turns, measured=measure), measured)


def saved_row(bench: Bench, record) -> None:
    """Bytes that autograd saves in one call, as measured and as predicted."""

    def measured():
        predicted = bench.counted.update.saved
        return {"variants": {"a call": {"saved_bytes": bench.saved_bytes(), "predicted_bytes": predicted}}}

    record(bench.config("saved"), measured)


def workspace_row(bench: Bench, record) -> None:
    """What a kernel uses inside: bytes of the convolution with the most weights, called alone, beside its output."""

    @torch.no_grad()
    def measured():
        layers = [m for m in bench.network.modules() if isinstance(m, torch.nn.Conv2d)]
        layer = max(layers, key=lambda m: m.weight.numel())
        seen = []
        handle = layer.register_forward_pre_hook(lambda module, args: seen.append(torch.ones_like(args[0])))
        bench.call(bench.network)
        handle.remove()
        found = {"peak_bytes": peak_bytes(lambda: layer(seen[0]), bench.device)}
        found["predicted_bytes"] = layer(seen[0]).nbytes
        return {"variants": {"its output": found}, "weight_bytes": layer.weight.nbytes}

    if any(isinstance(m, torch.nn.Conv2d) for m in bench.network.modules()):
        record(bench.config("workspace"), measured)


def inference_rows(bench: Bench, ratios, multiples, turns: int, measure, record) -> None:
    scores = _scores(bench)
    for ratio in ratios:
        for multiple in multiples:
            settings = {"ratio": ratio, "round_to": multiple, "mask": "random scores, seed 0, scope kind"}
            mask = make_mask(scores, bench.sites, ratio, round_to=multiple)

            @torch.no_grad()
            def measured(mask=mask):
                if bench.bytes > _memory(bench.device):
                    raise MemoryError(f"{bench.name}: the pruned copy does not fit beside the original")
                pruned = prune_denoiser(bench.network, mask)
                gates = {name: keep.to(bench.device, bench.dtype) for name, keep in mask.items()}

                def masked():
                    with apply_gates(bench.network, gates, bench.sites):
                        bench.call(bench.network)

                runs = {
                    "original": lambda: bench.call(bench.network),
                    "masked": masked,
                    "pruned": lambda: bench.call(pruned),
                }
                found = _in_turns(runs, "original", turns, bench.device, measure)
                counted = {"original": bench.counted, "pruned": trace(pruned, bench.shapes, dtype=bench.dtype)}
                for name, one in counted.items():
                    found[name]["predicted_bytes"] = one.forward_peak
                return {
                    "variants": found,
                    "parameters": {"original": parameters(bench.network), "pruned": parameters(pruned)},
                    "flops": {n: {"paper": o.flops.paper, "total": o.flops.total} for n, o in counted.items()},
                }

            record(bench.config("inference", **settings, turns=turns, measured=measure), measured)


def _in_turns(runs: dict, base: str, turns: int, device: torch.device, measure: str) -> dict:
    """Median seconds of each run, of the clock and of the processor (all threads), and the median over turns of their
    ratios to the base's; on CUDA one more turn warms up. Peaks too, those of the last turn (the same in each)."""
    times, peaks = {name: [] for name in runs}, {}
    warming = int(device.type == "cuda" and measure != "peak")
    for turn in range(1 if measure == "peak" else turns + warming):
        for name, run in runs.items():
            took = []

            def timed(run=run, took=took):
                took.append(_seconds(run, device))

            if measure == "time":
                timed()
            else:
                peaks[name] = peak_bytes(timed, device)
            if turn >= warming and measure != "peak":
                times[name] += took
    found = {name: {} for name in runs}
    for name in runs:
        for i, key in enumerate(("", "cpu_") if times[name] else ()):
            mine, other = ([t[i] for t in times[one]] for one in (name, base))
            found[name][f"{key}seconds"] = statistics.median(mine)
            found[name][f"{key}ratio"] = statistics.median(a / b for a, b in zip(mine, other, strict=True))
        if name in peaks:
            found[name]["peak_bytes"] = peaks[name]
    return found


def run(options: argparse.Namespace) -> int:
    """The command ``benchmark full-size``."""
    device, end = (
        torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu")),
        time.monotonic() + 60 * options.minutes,
    )
    dtype = (
        torch.bfloat16 if (options.dtype or ("bf16" if device.type == "cuda" else "fp32")) == "bf16" else torch.float32
    )

    for name in options.models:

        def record(config, measured, name=name):
            if time.monotonic() > end:
                print(f"{name}: no time left for {config['what']}; run again to go on")
                return
            if name == "tiny":
                os.environ["ECODIFF_RECORDS"] = "off"
            row = records.measure(config, measured, name="full_size", recompute=options.recompute)
            told = {k: config[k] for k in ("T", "ratio", "round_to") if k in config}
            for variant, v in row["values"]["variants"].items():
                parts = (
                    [f"{v['seconds']:9.4f} s  x{v['ratio']:.3f}  (processor: x{v['cpu_ratio']:.3f})"]
                    if "seconds" in v
                    else []
                )
                for key, word in (("peak_bytes", "peak"), ("saved_bytes", "saved"), ("predicted_bytes", "predicted")):
                    parts += [f"{word} {v[key] / 2**20:,.0f} MiB"] if key in v else []
                print(f"{name} {told} {variant:13} {'  '.join(parts)}", flush=True)

        try:
            bench = Bench(name, options.samples, device, dtype, options.size)
        except MemoryError as error:
            print(f"skipped: {error}")
            continue
        if "update" in options.parts:
            saved_row(bench, record)
            update_rows(bench, tuple(options.steps), options.turns, options.measure, record)
        if "inference" in options.parts:
            workspace_row(bench, record)
            inference_rows(bench, options.ratios, (1,), options.turns, options.measure, record)
        if "round" in options.parts:
            inference_rows(bench, (0.3,), MULTIPLES[1:], options.turns, options.measure, record)
        del bench
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _scores(bench: Bench) -> dict:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.rand(site.units, generator=generator) for name, site in bench.sites.items()}


def _seconds(run, device: torch.device) -> tuple[float, float]:
    """Seconds of the clock, and of the processor, which other processes on the machine lengthen little."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter(), time.process_time()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started[0], time.process_time() - started[1]


def _memory(device: torch.device) -> int:
    """Bytes free on the device, less a tenth; on the CPU less a fifth, because other programs take some meanwhile."""
    if device.type == "cuda":
        return int(0.9 * torch.cuda.mem_get_info()[0])
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            return int(0.8 * 1024 * next(int(line.split()[1]) for line in file if line.startswith("MemAvailable")))
    except (OSError, StopIteration):
        return int(0.5 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _device(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else "cpu"


def _made(shapes, device, dtype):
    if isinstance(shapes, dict):
        return {name: _made(value, device, dtype) for name, value in shapes.items()}
    if not isinstance(shapes, tuple):
        return shapes
    if shapes and isinstance(shapes[-1], torch.dtype):
        shapes, dtype = shapes
    return (
        torch.full(shapes, 500, device=device, dtype=dtype)
        if len(shapes) < 2
        else torch.ones(shapes, device=device, dtype=dtype)
    )


def _tiny():
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(
            sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32,
            attention_head_dim=(2, 4), norm_num_groups=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        )  # fmt: skip
    return 0
