"""Full-size denoisers with random weights: what a mask update and a drawing step really take, as recorded rows.

    python benchmarks/full_size.py sd2                    # everything that fits this machine
    python benchmarks/full_size.py sdxl flux-schnell --parts inference round --minutes 9
    python benchmarks/full_size.py tiny                   # shows in seconds that it runs; records nothing

Three parts, rows of ``data/results/full_size.jsonl`` (read with ``ecodiff.records.table("full_size")``):

    update      one mask update against T: plain where the prediction fits, checkpointed (``keep_last=1``), and with
                half of the steps kept, or as many as fit
    inference   one denoiser call of the original, masked and pruned network at 10-50 % of the units
    round       the same at 30 %, kept units rounded up to a multiple of 8, 16, 64

Each part measures bytes (``--measure peak``) and seconds (``--measure time``) in rows of their own, because bytes are
the same on a busy machine and seconds are not. On CUDA in bf16, peaks from its allocator; else in fp32 on the CPU,
where the allocator's own events are read. Rows of bytes also have what `ecodiff.trace` predicted. Variants take turns,
and ratios are medians over turns, so that a busy machine slows all alike. A part that has no time left (``--minutes``)
stops; the next run goes on from the recorded rows. A network that does not fit the machine's memory is skipped, and the
output says so.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import time

import torch
from mask_step import peak_bytes
from torch.utils.checkpoint import checkpoint as recompute_in_backward

from ecodiff import fullsize, records
from ecodiff.gates import apply_gates
from ecodiff.mask import make_mask
from ecodiff.sites import find_sites
from ecodiff.surgery import prune_denoiser
from ecodiff.trace import parameters, trace

STEPS = (1, 2, 5, 10, 20, 50)
RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5)
MULTIPLES = (1, 8, 16, 64)
VERSION = 1


class Bench:
    """One network with random weights on the device, its inputs, and a sampling loop reduced to denoiser calls."""

    def __init__(self, name: str, samples: int, device: torch.device, dtype: torch.dtype, size: int | None):
        self.name, self.samples, self.device, self.dtype = name, samples, device, dtype
        if name == "tiny":
            skeleton, self.size, text = _tiny(), (64, 64), 8
        else:
            preset = fullsize.preset(name)
            self.size, text = (size, size) if size else preset.size, preset.text_tokens
            skeleton = preset.build()
        frames = 1 if name == "tiny" or not preset.frames else (preset.frames - 1) // 4 + 1
        factor = 32 if name == "sana" else 8
        geometry = fullsize.Geometry(samples, self.size[0] // factor, self.size[1] // factor, frames, text)
        self.shapes, self.latents = fullsize.inputs(skeleton, geometry)
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
        torch.manual_seed(0)
        self.network = skeleton.to(dtype).to_empty(device=device).requires_grad_(False).eval()
        with torch.no_grad():
            for tensor in (*self.network.parameters(), *self.network.buffers()):
                if tensor.is_floating_point():
                    tensor.normal_(std=0.02)
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
            for step in range(steps):
                if step >= steps - keep_last:
                    output = self.call(self.network, latents)
                else:
                    output = recompute_in_backward(self.call, self.network, latents, use_reentrant=False)
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
        kept = {}

        def remember(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        latents = self.arguments[self.latents].clone().requires_grad_()
        with apply_gates(self.network, gates, self.sites):
            with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
                self.call(self.network, latents)
        return sum(kept.values())


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
            name: kept
            for name, kept in variants.items()
            if kept <= fitting and (name != "keep_last" or 1 < kept < count)
        }
        if count == 1:  # nothing is left to recompute
            variants = {"plain": 1}

        def peaks(count=count, variants=variants):
            found = {}
            for name, kept in variants.items():
                saving = max(c.update.held - c.first_held, 0) if kept == count else 0
                found[name] = {
                    "keep_last": kept,
                    "peak_bytes": peak_bytes(lambda kept=kept: bench.update(count, kept), bench.device),
                    "predicted_bytes": count * c.inputs + (kept - 1) * c.update.held + c.update.peak - saving,
                }
            saved = {"measured": bench.saved_bytes(), "predicted": c.update.saved}
            return {"variants": found, "saved_a_call": saved, "weight_bytes": bench.bytes}

        def times(count=count, variants=variants):
            runs = {name: lambda kept=kept: bench.update(count, kept) for name, kept in variants.items()}
            base = "plain" if "plain" in variants else "checkpointed"
            found = _in_turns(runs, base, turns, bench.device)
            return {"variants": {n: {"keep_last": variants[n], **v} for n, v in found.items()}, "relative_to": base}

        if "peak" in measure:
            record(bench.config("update_peak", T=count, variants=variants), peaks)
        if "time" in measure:
            record(bench.config("update_time", T=count, variants=variants, turns=turns), times)


def inference_rows(bench: Bench, ratios, multiples, turns: int, measure, record) -> None:
    scores = _scores(bench)
    for ratio in ratios:
        for multiple in multiples:
            settings = {"ratio": ratio, "round_to": multiple, "mask": "random scores, seed 0, scope kind"}
            mask = make_mask(scores, bench.sites, ratio, round_to=multiple)

            def runs(mask=mask):
                if bench.bytes > _memory(bench.device):
                    raise MemoryError(f"{bench.name}: the pruned copy does not fit beside the original")
                pruned = prune_denoiser(bench.network, mask)
                gates = {name: keep.to(bench.device, bench.dtype) for name, keep in mask.items()}

                def masked():
                    with apply_gates(bench.network, gates, bench.sites):
                        bench.call(bench.network)

                variants = {
                    "original": lambda: bench.call(bench.network),
                    "masked": masked,
                    "pruned": lambda: bench.call(pruned),
                }
                return variants, pruned

            @torch.no_grad()
            def peaks(runs=runs):
                variants, pruned = runs()
                found = {name: {"peak_bytes": peak_bytes(run, bench.device)} for name, run in variants.items()}
                counted = trace(pruned, bench.shapes, dtype=bench.dtype)
                found["original"]["predicted_bytes"] = bench.counted.forward_peak
                found["pruned"]["predicted_bytes"] = counted.forward_peak
                return {
                    "variants": found,
                    "parameters": {"original": parameters(bench.network), "pruned": parameters(pruned)},
                    "flops": {
                        name: {"paper": one.flops.paper, "total": one.flops.total}
                        for name, one in (("original", bench.counted), ("pruned", counted))
                    },
                }

            @torch.no_grad()
            def times(runs=runs):
                variants, _ = runs()
                return {"variants": _in_turns(variants, "original", turns, bench.device), "relative_to": "original"}

            if "peak" in measure:
                record(bench.config("inference_peak", **settings), peaks)
            if "time" in measure:
                record(bench.config("inference_time", **settings, turns=turns), times)


def _in_turns(runs: dict, base: str, turns: int, device: torch.device) -> dict:
    """Median seconds of each run, and median over turns of its ratio to the base's; on CUDA one more turn warms up."""
    seconds = {name: [] for name in runs}
    warming = int(device.type == "cuda")
    for turn in range(turns + warming):
        for name, run in runs.items():
            took = _seconds(run, device)
            if turn >= warming:
                seconds[name].append(took)
    return {
        name: {
            "seconds": statistics.median(times),
            "ratio": statistics.median(a / b for a, b in zip(times, seconds[base], strict=True)),
            "all_seconds": times,
        }
        for name, times in seconds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", help=f"tiny, or presets: {', '.join(fullsize.names())}")
    parser.add_argument(
        "--parts", nargs="+", default=["update", "inference", "round"], choices=["update", "inference", "round"]
    )
    parser.add_argument(
        "--samples", type=int, default=1, help="samples in a denoiser call (guidance makes 2 of a picture)"
    )
    parser.add_argument("--size", type=int, help="pixels a side (default: the model's own)")
    parser.add_argument("--steps", type=int, nargs="+", default=list(STEPS), help="values of T")
    parser.add_argument("--ratios", type=float, nargs="+", default=list(RATIOS), help="of --parts inference")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--measure", nargs="+", default=["peak", "time"], choices=["peak", "time"])
    parser.add_argument("--minutes", type=float, default=1e9, help="start no measurement after so long")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], help="default: bf16 on CUDA, fp32 elsewhere")
    parser.add_argument("--recompute", action="store_true", help="measure again what is recorded")
    options = parser.parse_args()
    device, end = torch.device(options.device), time.monotonic() + 60 * options.minutes
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
                predicted = f", predicted {v['predicted_bytes'] / 2**20:,.0f}" if "predicted_bytes" in v else ""
                found = (
                    f"{v['seconds']:9.4f} s  x{v['ratio']:.3f}"
                    if "seconds" in v
                    else f"{v['peak_bytes'] / 2**20:,.0f} MiB{predicted}"
                )
                print(f"{name} {told} {variant:13} {found}", flush=True)

        try:
            bench = Bench(name, options.samples, device, dtype, options.size)
        except MemoryError as error:
            print(f"skipped: {error}")
            continue
        if "update" in options.parts:
            update_rows(bench, tuple(options.steps), options.turns, options.measure, record)
        if "inference" in options.parts:
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


def _seconds(run, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _memory(device: torch.device) -> int:
    """Bytes free on the device, less a tenth."""
    if device.type == "cuda":
        return int(0.9 * torch.cuda.mem_get_info()[0])
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            return int(0.9 * 1024 * next(int(line.split()[1]) for line in file if line.startswith("MemAvailable")))
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


if __name__ == "__main__":
    main()
