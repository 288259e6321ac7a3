"""Full-size denoisers with random weights: what a mask update and a denoising step really take, as recorded rows.

    python -m ecodiff benchmark full-size sd2                    # everything that fits this machine
    python -m ecodiff benchmark full-size sdxl flux-schnell --parts inference round --minutes 9
    python -m ecodiff benchmark full-size tiny                   # shows in seconds that it runs; records nothing

Three parts, rows of ``data/results/full_size.jsonl`` (read with ``ecodiff.storage.records.table("full_size")``):

    update      one mask update against T: plain where the prediction fits, checkpointed (``keep_last=1``), and with
                half of the steps kept, or half of as many as fit
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
from collections.abc import Callable, Sequence
from functools import partial

import torch

from ecodiff.cost import presets
from ecodiff.cost.trace import parameters, trace
from ecodiff.method.checkpointing import kept, recomputed
from ecodiff.method.hooks import OpenGates, apply_gates
from ecodiff.method.mask import make_mask
from ecodiff.method.sites import find_sites
from ecodiff.method.surgery import prune_denoiser
from ecodiff.storage import records

from .mask_update import peak_bytes, torch_device

MULTIPLES = (1, 8, 16, 64)
VERSION = 1


class Bench:
    """One network with random weights on the device, its inputs, and a sampling loop reduced to denoiser calls.

    Raises MemoryError where the network, or one call of it, does not fit.
    """

    def __init__(self, name: str, samples: int, device: torch.device, dtype: torch.dtype, size: int | None):
        self.name, self.samples, self.device, self.dtype = name, samples, device, dtype
        skeleton, geometry, self.size = _skeleton(name, samples, size)
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
        self._fill()
        self.arguments = _made(self.shapes, device, dtype)

    @torch.no_grad()
    def _fill(self) -> None:
        """Give the network random weights: one block of numbers, repeated, because billions take long to draw."""
        block = 0.02 * torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
        block = block.to(self.device, self.dtype)
        for tensor in (*self.network.parameters(), *self.network.buffers()):
            if tensor.is_floating_point():
                for part in tensor.view(-1).split(len(block)):
                    part.copy_(block[: len(part)])

    def config(self, part: str, **more) -> dict:
        """What a row of this part is recorded under."""
        return {
            "what": f"full_size_{part}", "version": VERSION, "model": self.name, "weights": "random", "seed": 0,
            "size": list(self.size), "samples": self.samples, "dtype": str(self.dtype), "device": _device(self.device),
            "threads": torch.get_num_threads(), **more,
        }  # fmt: skip

    def call(self, network, latents=None):
        """The output of one denoiser call, for these latents or for those of ``arguments``."""
        arguments = dict(self.arguments)
        if latents is not None:
            arguments[self.latents] = latents
        return network(**arguments, return_dict=False)[0]

    def masked_call(self, gates: dict):
        """The output of one call of the whole network under these gates."""
        with apply_gates(self.network, gates, self.sites):
            return self.call(self.network)

    def open_gates(self) -> dict:
        """Gates of 1 that take gradients, one for each unit of each site."""
        gates = {}
        for name, site in self.sites.items():
            gates[name] = torch.ones(site.units, device=self.device, requires_grad=True)
        return gates

    def update(self, steps: int, keep_last: int) -> None:
        """One mask update: T calls in a row, each output the next input; a scheduler costs nothing beside them."""
        latents = self.arguments[self.latents]
        with apply_gates(self.network, self.open_gates(), self.sites):
            opened = OpenGates(self.network)
            for step in range(steps):
                call = kept if step >= steps - keep_last else recomputed
                output = call(self.call, opened, self.network, latents)
                if output.shape != latents.shape:
                    output = output[:, : latents.shape[1]]  # the other channels are a predicted variance
                latents = 0.9 * latents + 0.1 * output
            latents.float().square().mean().backward()

    def saved_bytes(self) -> int:
        """Bytes that autograd saves in one call whose input needs a gradient: each storage once, weights left out."""
        weights = {t.untyped_storage().data_ptr() for t in (*self.network.parameters(), *self.network.buffers())}
        saved = {}

        def remember(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        def as_it_is(tensor):
            return tensor

        latents = self.arguments[self.latents].clone().requires_grad_()
        with apply_gates(self.network, self.open_gates(), self.sites):
            with torch.autograd.graph.saved_tensors_hooks(remember, as_it_is):
                self.call(self.network, latents)
        return sum(saved.values())


def _skeleton(name: str, samples: int, size: int | None) -> tuple:
    """A network without weights, the geometry of its latents, and height and width of an image."""
    if name == "tiny":
        return _tiny(), presets.Geometry(samples, 8, 8, 1, 8), (64, 64)
    preset = presets.preset(name)
    height, width = preset.size
    if size:
        height = width = size
    factor = 32 if name == "sana" else 8  # pixels a side of a latent
    frames = 1
    if preset.frames:
        frames = (preset.frames - 1) // 4 + 1  # video autoencoders keep the first frame and join four of the others
    geometry = presets.Geometry(samples, height // factor, width // factor, frames, preset.text_tokens)
    return preset.build(), geometry, (height, width)


def update_rows(bench: Bench, steps: Sequence[int], turns: int, measure: str, record: Callable) -> None:
    """Record a mask update at each number of steps, in the variants that fit the memory."""
    call = bench.counted.update
    fitting = max(0, int((bench.room - call.peak) // max(call.held, 1)) + 1)  # steps whose activations can be kept
    if fitting < 1:
        print(f"{bench.name}: one call's activations ({call.peak / 1e9:.1f} GB) do not fit; no update is measured")
        return
    for count in steps:
        variants = _variants(count, fitting)
        config = bench.config("update", T=count, variants=variants, turns=turns, measured=measure)
        record(config, partial(_measured_update, bench, count, variants, turns, measure))


def _variants(count: int, fitting: int) -> dict[str, int]:
    """{variant of an update of ``count`` steps: how many of the last steps keep their activations}."""
    if count == 1:  # nothing is left to recompute
        return {"plain": 1}
    variants = {"checkpointed": 1}
    half = min(count, fitting) // 2
    if half > 1:
        variants["keep_last"] = half
    if count <= fitting:
        variants["plain"] = count
    return variants


def _measured_update(bench: Bench, count: int, variants: dict[str, int], turns: int, measure: str) -> dict:
    counted = bench.counted
    base = "plain" if "plain" in variants else "checkpointed"
    runs = {name: partial(bench.update, count, keep) for name, keep in variants.items()}
    rows = _in_turns(runs, base, turns, bench.device, measure)
    for name, keep in variants.items():
        predicted = count * counted.inputs + (keep - 1) * counted.update.held + counted.update.peak
        if keep == count:  # then the first call is among those kept, and it holds less: its input needs no gradient
            predicted -= max(counted.update.held - counted.first_held, 0)
        rows[name] |= {"keep_last": keep, "predicted_bytes": predicted}
    return {"variants": rows, "relative_to": base, "weight_bytes": bench.bytes}


def saved_row(bench: Bench, record: Callable) -> None:
    """Record the bytes that autograd saves in one call, as measured and as predicted."""

    def measured() -> dict:
        predicted = bench.counted.update.saved
        return {"variants": {"a call": {"saved_bytes": bench.saved_bytes(), "predicted_bytes": predicted}}}

    record(bench.config("saved"), measured)


def workspace_row(bench: Bench, record: Callable) -> None:
    """Record what a kernel uses inside: bytes of the convolution with the most weights, called alone.

    What is predicted is its output: counting does not see inside a kernel.
    """
    layers = [module for module in bench.network.modules() if isinstance(module, torch.nn.Conv2d)]

    @torch.no_grad()
    def measured() -> dict:
        layer = max(layers, key=_weights)
        inputs = []

        def remember(module, args):
            inputs.append(torch.ones_like(args[0]))

        handle = layer.register_forward_pre_hook(remember)
        bench.call(bench.network)
        handle.remove()
        row = {"peak_bytes": peak_bytes(partial(layer, inputs[0]), bench.device)}
        row["predicted_bytes"] = layer(inputs[0]).nbytes
        return {"variants": {"its output": row}, "weight_bytes": layer.weight.nbytes}

    if layers:
        record(bench.config("workspace"), measured)


def _weights(layer: torch.nn.Conv2d) -> int:
    return layer.weight.numel()


def inference_rows(bench: Bench, ratios, multiples, turns: int, measure: str, record: Callable) -> None:
    """Record one call of the original, masked and pruned network at each ratio and rounding."""
    generator = torch.Generator().manual_seed(0)
    scores = {name: torch.rand(site.units, generator=generator) for name, site in bench.sites.items()}
    for ratio in ratios:
        for multiple in multiples:
            mask = make_mask(scores, bench.sites, ratio, round_to=multiple)
            settings = {"ratio": ratio, "round_to": multiple, "mask": "random scores, seed 0, scope kind"}
            config = bench.config("inference", **settings, turns=turns, measured=measure)
            record(config, partial(_measured_inference, bench, mask, turns, measure))


@torch.no_grad()
def _measured_inference(bench: Bench, mask: dict, turns: int, measure: str) -> dict:
    if bench.bytes > _memory(bench.device):
        raise MemoryError(f"{bench.name}: the pruned copy does not fit beside the original")
    pruned = prune_denoiser(bench.network, mask)
    gates = {name: keep.to(bench.device, bench.dtype) for name, keep in mask.items()}
    runs = {
        "original": partial(bench.call, bench.network),
        "masked": partial(bench.masked_call, gates),
        "pruned": partial(bench.call, pruned),
    }
    rows = _in_turns(runs, "original", turns, bench.device, measure)
    counted = {"original": bench.counted, "pruned": trace(pruned, bench.shapes, dtype=bench.dtype)}
    flops = {}
    for name, call in counted.items():
        rows[name]["predicted_bytes"] = call.forward_peak
        flops[name] = {"paper": call.flops.paper, "total": call.flops.total}
    return {
        "variants": rows,
        "parameters": {"original": parameters(bench.network), "pruned": parameters(pruned)},
        "flops": flops,
    }


def _in_turns(runs: dict[str, Callable], base: str, turns: int, device: torch.device, measure: str) -> dict:
    """Seconds and peak of each run, as far as they are measured.

    Seconds, of the clock and of the processor (all threads), are medians, and ratios to the run ``base`` are medians
    over turns; on CUDA one more turn warms up. Peaks are those of the last turn: they are the same in each.
    """
    times: dict[str, list] = {name: [] for name in runs}
    peaks = {}
    warming = 0
    if measure == "peak":
        turns = 1
    elif device.type == "cuda":
        warming = 1
    for turn in range(turns + warming):
        for name, run in runs.items():
            seconds, peak = _measured(run, device, measure)
            if peak is not None:
                peaks[name] = peak
            if turn >= warming and measure != "peak":
                times[name].append(seconds)
    rows: dict[str, dict] = {}
    for name in runs:
        rows[name] = {}
        if times[name]:
            for i, key in enumerate(("", "cpu_")):
                own, others = [t[i] for t in times[name]], [t[i] for t in times[base]]
                rows[name][f"{key}seconds"] = statistics.median(own)
                rows[name][f"{key}ratio"] = statistics.median(a / b for a, b in zip(own, others, strict=True))
        if name in peaks:
            rows[name]["peak_bytes"] = peaks[name]
    return rows


def _measured(run: Callable, device: torch.device, measure: str) -> tuple[tuple[float, float], int | None]:
    """Seconds as `_seconds` gives them, and the peak in bytes, None where time alone is measured."""
    if measure == "time":
        return _seconds(run, device), None
    seconds = []

    def timed():
        seconds.append(_seconds(run, device))

    peak = peak_bytes(timed, device)
    return seconds[0], peak


def run(options: argparse.Namespace) -> int:
    """The command ``benchmark full-size``."""
    device = torch_device(options.device)
    dtype = torch.float32
    if options.dtype == "bf16" or (options.dtype is None and device.type == "cuda"):
        dtype = torch.bfloat16
    end = time.monotonic() + 60 * options.minutes

    def record(config: dict, measured: Callable) -> None:
        name = config["model"]
        if time.monotonic() > end:
            print(f"{name}: no time left for {config['what']}; run again to go on")
            return
        if name == "tiny":
            os.environ["ECODIFF_RECORDS"] = "off"
        row = records.measure(config, measured, name="full_size", recompute=options.recompute)
        setting = {key: config[key] for key in ("T", "ratio", "round_to") if key in config}
        for variant, values in row["values"]["variants"].items():
            print(f"{name} {setting} {variant:13} {_line(values)}", flush=True)

    for name in options.models:
        try:
            bench = Bench(name, options.samples, device, dtype, options.size)
        except MemoryError as error:
            print(f"skipped: {error}")
            continue
        if "update" in options.parts:
            saved_row(bench, record)
            update_rows(bench, options.steps, options.turns, options.measure, record)
        if "inference" in options.parts:
            workspace_row(bench, record)
            inference_rows(bench, options.ratios, (1,), options.turns, options.measure, record)
        if "round" in options.parts:
            inference_rows(bench, (0.3,), MULTIPLES[1:], options.turns, options.measure, record)
        del bench  # before the next network is made, which needs the room
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return 0


def _line(values: dict) -> str:
    """What was measured of one variant, for the terminal."""
    parts = []
    if "seconds" in values:
        parts.append(f"{values['seconds']:9.4f} s  x{values['ratio']:.3f}  (processor: x{values['cpu_ratio']:.3f})")
    for key, word in (("peak_bytes", "peak"), ("saved_bytes", "saved"), ("predicted_bytes", "predicted")):
        if key in values:
            parts.append(f"{word} {values[key] / 2**20:,.0f} MiB")
    return "  ".join(parts)


def _seconds(run, device: torch.device) -> tuple[float, float]:
    """Seconds of the clock, and of the processor, which other processes on the machine lengthen little."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started, worked = time.perf_counter(), time.process_time()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started, time.process_time() - worked


def _memory(device: torch.device) -> int:
    """Bytes free on the device, less a tenth; on the CPU less a fifth, because other programs take some meanwhile."""
    if device.type == "cuda":
        return int(0.9 * torch.cuda.mem_get_info()[0])
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable"):
                    return int(0.8 * 1024 * int(line.split()[1]))  # the file counts in KiB
    except OSError:  # no Linux
        pass
    return int(0.5 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _device(device: torch.device) -> str:
    """The name of the device in recorded rows."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    return "cpu"


def _made(shapes, device, dtype):
    """Tensors in the place of shapes; see `ecodiff.cost.trace.trace` for what may stand there."""
    if isinstance(shapes, dict):
        return {name: _made(value, device, dtype) for name, value in shapes.items()}
    if not isinstance(shapes, tuple):
        return shapes
    if shapes and isinstance(shapes[-1], torch.dtype):
        shapes, dtype = shapes
    if len(shapes) < 2:  # a time step, or the guidance that FLUX-dev takes
        return torch.full(shapes, 500, device=device, dtype=dtype)
    return torch.ones(shapes, device=device, dtype=dtype)


def _tiny():
    """A U-Net without weights that is small enough to try the benchmark with."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(
            sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32,
            attention_head_dim=(2, 4), norm_num_groups=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        )  # fmt: skip
