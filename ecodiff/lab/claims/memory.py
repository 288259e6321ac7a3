"""Claims about what a mask update needs: memory and time with and without checkpointing (§1, §2.3, App. G.1)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from ecodiff.cost.units import gb, usable
from ecodiff.lab.errata import arithmetic
from ecodiff.lab.paper import claim, row

from . import on_embedded, on_full_size
from .cost import FLUX, command_of_update, drawing
from .on_embedded import SDXL
from .on_full_size import SD2_UPDATE, by_count, decided
from .rules import MISSING, NOT_REPRODUCED, REPRODUCED, Claim, Decision, contradicted

FULL = {
    "Stable Diffusion 2, random weights, measured": {"model": "sd2", "samples": 1, "on_gpu": False},
    "Stable Diffusion 2, random weights, measured on a GPU": {"model": "sd2", "samples": 1, "on_gpu": True},
    "SDXL, random weights, measured on a GPU": {"model": "sdxl", "samples": 2, "on_gpu": True},
}
"""Networks whose updates ``benchmark full-size`` measures, samples a call, and where."""
UPDATES = [
    ("sdxl", {"batch": 1, "steps": 50, "guidance": 1.0}),
    ("sdxl", {"batch": 1, "steps": 50, "guidance": 5.0}),
    ("sdxl", {"batch": 4, "steps": 50, "guidance": 1.0}),
    ("sdxl", {"batch": 4, "steps": 50, "guidance": 5.0}),
]
"""SDXL's mask update by four readings of what the paper does not say: samples at a time, guidance."""
ONE_GUIDED = UPDATES[1]


def memory_of_an_update() -> Claim:
    return Claim(
        "§1, §4",
        "An update of SDXL's mask needs 1400 GB, or 15 H100; with checkpointing less than 30 GB, up to 50 times less.",
        "Counted at 1024 x 1024, 50 steps, 1 and 4 samples, without and with guidance: any reading within a tenth of "
        "1400 GB, below 30 GB, as much as 50 times.",
        ("13_what_it_costs", "06_memory_and_time"),
        (
            by_count("SDXL, counted: 1400 GB", _plain_as_printed, *UPDATES),
            by_count("SDXL, counted: below 30 GB", _below_the_limit, ONE_GUIDED),
            by_count("SDXL, counted: 50 times", _times_less, *UPDATES),
            _below_the_limit_on_gpu(),
            contradicted(arithmetic.memory()),
        ),
    )


def _plain_as_printed(*counts: dict) -> tuple[bool, str]:
    printed = claim("sdxl_plain_memory")
    peaks = [count["update_peak"]["plain"] / 1e9 for count in counts]
    near = any(abs(peak - printed) < 0.1 * printed for peak in peaks)
    return near, ", ".join(f"{peak:,.0f} GB" for peak in peaks)


def _below_the_limit(count: dict) -> tuple[bool, str]:
    peak = count["update_peak"]["checkpointed"] / 1e9
    evidence = f"{peak:.1f} GB with one guided sample at a time, as the published code runs"
    return peak < claim("sdxl_checkpointed_memory"), evidence


def _times_less(*counts: dict) -> tuple[bool, str]:
    peaks = [count["update_peak"] for count in counts]
    factors = [(peak["plain"] / 1e9) / (peak["checkpointed"] / 1e9) for peak in peaks]
    evidence = f"{min(factors):.0f} to {max(factors):.0f} times less at 50 steps"
    return max(factors) >= claim("memory_factor"), evidence


def _below_the_limit_on_gpu() -> Decision:
    """SDXL's longest recorded checkpointed update on a GPU: its peak and the weights, against the printed limit."""
    title = "SDXL, random weights, measured: below 30 GB"
    last = None
    for record in on_full_size.measured("update", model="sdxl", samples=2, on_gpu=True):
        has_peak = "peak_bytes" in record["values"]["variants"].get("checkpointed", {})
        if has_peak and (last is None or record["config"]["T"] > last["config"]["T"]):
            last = record
    if last is None:
        return Decision(title, MISSING, command=command_of_update("sdxl", 2))
    config, values = last["config"], last["values"]
    peak = (values["variants"]["checkpointed"]["peak_bytes"] + values["weight_bytes"]) / 1e9
    evidence = f"{peak:.1f} GB with the denoiser's weights, T = {config['T']}, {config['samples']} samples per call"
    evidence += f" ({config['device']}); text encoders and VAE not counted"
    return decided(title, peak < claim("sdxl_checkpointed_memory"), evidence)


def constant_memory() -> Claim:
    return Claim(
        "§2.3, App. G.1, Fig. 8a",
        "With checkpointing the memory of an update does not grow with the number of steps.",
        "From T = 2 to the largest recorded T: checkpointed peak grows by less than 5 %, the plain one with T.",
        ("06_memory_and_time",),
        on_updates(_flat),
    )


Test = Callable[[dict[int, dict[str, dict]]], tuple[bool, str] | None]
"""What decides on recorded mask updates, {T: {variant: values}}: whether the claim holds, and by which numbers; None
where too little is recorded."""


def on_updates(test: Test) -> tuple[Decision, ...]:
    """Decisions on recorded mask updates: of the small model, and of those of ``FULL``."""
    return (_on_small(test), *(_on_full(test, title, config) for title, config in FULL.items()))


def _on_small(test: Test) -> Decision:
    result = test(on_embedded.updates())
    if result is None:
        return Decision(on_embedded.on(SDXL), MISSING, command=on_embedded.command_of_updates())
    holds, evidence = result
    return Decision(on_embedded.on(SDXL), REPRODUCED if holds else NOT_REPRODUCED, evidence)


def _on_full(test: Test, title: str, config: dict) -> Decision:
    rows = on_full_size.measured("update", **config)
    result = test({row["config"]["T"]: row["values"]["variants"] for row in rows})
    if result is None:
        return Decision(title, MISSING, command=command_of_update(config["model"], config["samples"]))
    holds, evidence = result
    return decided(title, holds, f"{evidence} ({rows[0]['config']['device']})")


def _flat(updates: dict) -> tuple[bool, str] | None:
    plain, checkpointed = {}, {}
    for steps, variants in updates.items():
        if steps == 1:  # then nothing is recomputed
            continue
        peaks = [variants.get(name, {}).get("peak_bytes") for name in ("plain", "checkpointed")]
        if None not in peaks:
            plain[steps], checkpointed[steps] = peaks
    if len(plain) < 2:
        return None
    first, last = min(plain), max(plain)
    growth, checkpointed_growth = plain[last] / plain[first], checkpointed[last] / checkpointed[first]
    evidence = f"T = {first} to {last}: checkpointed {checkpointed_growth:.3f} times, plain {growth:.1f} times"
    return checkpointed_growth < 1.05 and growth > 0.9 * last / first, evidence


def twice_the_time() -> Claim:
    return Claim(
        "§1, §2.3, App. G.1, Fig. 8b",
        "Checkpointing costs one more forward pass and at most doubles the time of an update.",
        "Time of the checkpointed update over the plain one, medians of turns, at every recorded T: at most 2.",
        ("06_memory_and_time",),
        on_updates(_slower),
    )


def _slower(updates: dict) -> tuple[bool, str] | None:
    compared = {steps: variants for steps, variants in updates.items() if "plain" in variants}
    ours = _times_plain(compared, "checkpointed")
    if not ours:
        return None
    evidence = f"{min(ours):.2f} to {max(ours):.2f} times plain at {len(ours)} values of T up to {max(compared)}"
    theirs = _times_plain(compared, "published")
    if theirs:
        evidence += f"; the published loop {min(theirs):.2f} to {max(theirs):.2f}"
    return max(ours) <= claim("runtime_factor"), evidence


def _times_plain(updates: dict, variant: str) -> list[float]:
    """The times of a variant over that of the plain update, where they are recorded."""
    times = []
    for variants in updates.values():
        values = variants.get(variant, {})
        if "times_plain" in values:  # rows of the small model
            times.append(values["times_plain"])
        elif "ratio" in values:  # rows at full size
            times.append(values["ratio"])
    return times


def memory_of_table_12() -> Claim:
    flux = drawing(FLUX, 0.15)
    return Claim(
        "App. G.1, Table 12",
        "A mask of FLUX is learned on one GPU of 80 GB; memory is 4.6 GB for SD2, 22.9 for SDXL, 64.2 for FLUX.",
        "Checkpointed update counted in bf16, all components on the GPU: within a fifth of what is printed; FLUX's "
        "within what an 80 GB GPU can hand out.",
        ("13_what_it_costs",),
        (
            by_count("SD2, counted", partial(_as_in_table_12, model="SD2"), SD2_UPDATE),
            by_count("SDXL, counted", partial(_as_in_table_12, model="SDXL"), ONE_GUIDED),
            by_count("FLUX, counted", partial(_as_in_table_12, model="FLUX"), flux),
            by_count("FLUX.1 on 80 GB, counted", _on_one_gpu, flux),
        ),
    )


def _as_in_table_12(count: dict, model: str) -> tuple[bool, str]:
    peak, given = count["update_peak"]["checkpointed"] / 1e9, row("table12", model=model)["vram_gb"]
    return abs(peak - given) < 0.2 * given, f"{peak:.1f} GB with one sample at a time; {given:g} GB printed"


def _on_one_gpu(count: dict) -> tuple[bool, str]:
    peak, room = count["update_peak"]["checkpointed"], usable(f"{claim('gpu_memory'):g}GB")
    return peak <= room, f"{gb(peak)}, {gb(room)} usable of {claim('gpu_memory'):g} GB"


MEMORY = (memory_of_an_update, constant_memory, twice_the_time, memory_of_table_12)
