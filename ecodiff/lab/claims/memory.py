"""Claims about what a mask update needs: memory and time with and without checkpointing (§1, §2.3, App. G.1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ecodiff.cost.units import gb, usable
from ecodiff.lab.errata import arithmetic
from ecodiff.lab.paper import claim, row

from . import on_embedded, on_full_size
from .cost import FLUX, drawing
from .on_embedded import SDXL
from .on_full_size import SD2_UPDATE, by_count, decided
from .rules import MISSING, NOT_REPRODUCED, REPRODUCED, Claim, Decision, contradicted

FULL = {
    "Stable Diffusion 2, random weights, measured": {"model": "sd2", "samples": 1, "on_gpu": False},
    "Stable Diffusion 2, random weights, measured on a GPU": {"model": "sd2", "samples": 1, "on_gpu": True},
    "SDXL, random weights, measured on a GPU": {"model": "sdxl", "samples": 2, "on_gpu": True},
}
"""Networks whose updates ``benchmark full-size`` measures, samples a call, and where."""
UPDATES = [("sdxl", {"batch": n, "steps": 50, "guidance": g}) for n in (1, 4) for g in (1.0, 5.0)]
"""SDXL's mask update by four readings of what the paper does not say: samples at a time, guidance."""
ONE_GUIDED = UPDATES[1]


def memory_of_an_update() -> Claim:
    plain, limit, factor = (claim(name) for name in ("sdxl_plain_memory", "sdxl_checkpointed_memory", "memory_factor"))

    def peaks(found: Sequence[dict], kind: str) -> list[float]:
        return [c["update_peak"][kind] / 1e9 for c in found]

    def near(*found: dict) -> tuple[bool, str]:
        values = peaks(found, "plain")
        return any(abs(v - plain) < 0.1 * plain for v in values), ", ".join(f"{v:,.0f} GB" for v in values)

    def under(one: dict) -> tuple[bool, str]:
        (value,) = peaks([one], "checkpointed")
        return value < limit, f"{value:.1f} GB with one guided sample at a time, as the published code runs"

    def times(*found: dict) -> tuple[bool, str]:
        values = [a / b for a, b in zip(peaks(found, "plain"), peaks(found, "checkpointed"), strict=True)]
        return max(values) >= factor, f"{min(values):.0f} to {max(values):.0f} times less at 50 steps"

    return Claim(
        "§1, §4",
        "An update of SDXL's mask needs 1400 GB, or 15 H100; with checkpointing less than 30 GB, up to 50 times less.",
        "Counted at 1024 x 1024, 50 steps, 1 and 4 samples, without and with guidance: any reading within a tenth of "
        "1400 GB, below 30 GB, as much as 50 times.",
        ("07_what_it_costs", "06_memory_and_time"),
        (
            by_count("SDXL, counted: 1400 GB", near, *UPDATES),
            by_count("SDXL, counted: below 30 GB", under, ONE_GUIDED),
            by_count("SDXL, counted: 50 times", times, *UPDATES),
            _under_on_gpu(limit),
            contradicted(arithmetic.memory()),
        ),
    )


def _under_on_gpu(limit: float) -> Decision:
    """SDXL's longest recorded checkpointed update on a GPU: its peak and the weights, against the printed limit."""
    title = "SDXL, random weights, measured: below 30 GB"
    found = on_full_size.measured("update", model="sdxl", samples=2, on_gpu=True)
    found = [r for r in found if "peak_bytes" in r["values"]["variants"].get("checkpointed", {})]
    if not found:
        return Decision(title, MISSING, command=_command("sdxl", 2))
    last = max(found, key=lambda r: r["config"]["T"])
    config, values = last["config"], last["values"]
    peak = (values["variants"]["checkpointed"]["peak_bytes"] + values["weight_bytes"]) / 1e9
    shown = f"{peak:.1f} GB with the denoiser's weights, T = {config['T']}, {config['samples']} samples a call"
    return decided(title, peak < limit, f"{shown} ({config['device']}); text encoders and VAE not counted")


def constant_memory() -> Claim:
    return Claim(
        "§2.3, App. G.1, Fig. 8a",
        "With checkpointing the memory of an update does not grow with the number of steps.",
        "From T = 2 to the largest recorded T: checkpointed peak grows by less than 5 %, the plain one with T.",
        ("06_memory_and_time",),
        on_updates(_flat),
    )


def on_updates(test: Callable[[dict], tuple[bool, str] | None]) -> tuple[Decision, ...]:
    """Decisions on recorded mask updates, {T: {variant: values}}: of the small model, and of those of ``FULL``.

    ``test`` returns None where too little is recorded.
    """
    small = test(on_embedded.updates())
    missing = Decision(on_embedded.on(SDXL), MISSING, command=on_embedded.command_of_updates())
    return (
        Decision(on_embedded.on(SDXL), REPRODUCED if small[0] else NOT_REPRODUCED, small[1]) if small else missing,
        *(_on_full(test, title, config) for title, config in FULL.items()),
    )


def _on_full(test, title: str, config: dict) -> Decision:
    found = on_full_size.measured("update", **config)
    result = test({r["config"]["T"]: r["values"]["variants"] for r in found})
    if result is None:
        return Decision(title, MISSING, command=_command(config["model"], config["samples"]))
    return decided(title, result[0], f"{result[1]} ({found[0]['config']['device']})")


def _command(model: str, samples: int) -> str:
    return f"python -m ecodiff benchmark full-size {model} --samples {samples} --parts update"


def _flat(found: dict) -> tuple[bool, str] | None:
    peaks = {
        steps: [variants[name]["peak_bytes"] for name in ("plain", "checkpointed")]
        for steps, variants in sorted(found.items())
        if steps > 1 and all("peak_bytes" in variants.get(name, {}) for name in ("plain", "checkpointed"))
    }
    if len(peaks) < 2:
        return None
    first, last = min(peaks), max(peaks)
    plain, checkpointed = (b / a for a, b in zip(peaks[first], peaks[last], strict=True))
    shown = f"T = {first} to {last}: checkpointed {checkpointed:.3f} times, plain {plain:.1f} times"
    return checkpointed < 1.05 and plain > 0.9 * last / first, shown


def twice_the_time() -> Claim:
    return Claim(
        "§1, §2.3, App. G.1, Fig. 8b",
        "Checkpointing costs one more forward pass and at most doubles the time of an update.",
        "Time of the checkpointed update over the plain one, medians of turns, at every recorded T: at most 2.",
        ("06_memory_and_time",),
        on_updates(_slower),
    )


def _slower(found: dict) -> tuple[bool, str] | None:
    compared = {steps: variants for steps, variants in sorted(found.items()) if "plain" in variants}

    def times(variant: str) -> list[float]:
        values = [variants.get(variant, {}) for variants in compared.values()]
        return [
            value.get("times_plain", value.get("ratio")) for value in values if value.keys() & {"times_plain", "ratio"}
        ]

    if not (ours := times("checkpointed")):
        return None
    shown = f"{min(ours):.2f} to {max(ours):.2f} times plain at {len(ours)} values of T up to {max(compared)}"
    if theirs := times("published"):
        shown += f"; the published loop {min(theirs):.2f} to {max(theirs):.2f}"
    return max(ours) <= claim("runtime_factor"), shown


def memory_of_table_12() -> Claim:
    def near(c: dict, model: str) -> tuple[bool, str]:
        found, given = c["update_peak"]["checkpointed"] / 1e9, row("table12", model=model)["vram_gb"]
        return abs(found - given) < 0.2 * given, f"{found:.1f} GB with one sample at a time; {given:g} GB printed"

    def one_gpu(c: dict) -> tuple[bool, str]:
        peak, room = c["update_peak"]["checkpointed"], usable(f"{claim('gpu_memory'):g}GB")
        return peak <= room, f"{gb(peak)}, {gb(room)} usable of {claim('gpu_memory'):g} GB"

    settings = {"SD2": SD2_UPDATE, "SDXL": ONE_GUIDED, "FLUX": drawing(FLUX, 0.15)}
    return Claim(
        "App. G.1, Table 12",
        "A mask of FLUX is learned on one GPU of 80 GB; memory is 4.6 GB for SD2, 22.9 for SDXL, 64.2 for FLUX.",
        "Checkpointed update counted in bf16, all components on the GPU: within a fifth of what is printed; FLUX's "
        "within what an 80 GB GPU can hand out.",
        ("07_what_it_costs",),
        (
            *(by_count(f"{m}, counted", lambda c, m=m: near(c, m), s) for m, s in settings.items()),
            by_count("FLUX.1 on 80 GB, counted", one_gpu, settings["FLUX"]),
        ),
    )


MEMORY = (memory_of_an_update, constant_memory, twice_the_time, memory_of_table_12)
