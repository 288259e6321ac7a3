"""Claims about size, operations, time and carbon (Fig. 1, Tables 1, 12). What follows from shapes is counted."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from ecodiff.cost.units import gb, usable
from ecodiff.lab.errata import arithmetic
from ecodiff.lab.paper import claim, row, setting, table

from . import on_embedded, on_full_size
from .on_embedded import SDXL
from .on_full_size import ONE, by_count, decided
from .rules import CHECKPOINT, MISSING, UNDECIDED, Claim, Decision, Question, contradicted, printed

FLUX = "flux-schnell"


def published_mask(percent: int) -> tuple[str, dict]:
    """Setting that counts SDXL under the authors' mask at 10 or 20 %."""
    mask = {module["site"]: module[f"kept_{percent}"] for module in table("sdxl_lambda")}
    return "sdxl", {"steps": 40, "guidance": 5.0, "mask": mask, "inner": False}


def parameters() -> Claim:
    return Claim(
        "Abstract, Table 1",
        "The ratio is a share of the parameters: at 20 % SDXL keeps 2.1 billion, at 15 % FLUX keeps 10.1 billion.",
        "Parameters counted, to the printed digit: SDXL under the authors' published λ, FLUX with every kind of unit "
        "at the ratio. Is what goes 20 % of the parameters?",
        ("13_what_it_costs",),
        (
            by_count("SDXL, counted", _sdxl_as_printed, published_mask(10), published_mask(20)),
            by_count("FLUX.1, counted", _flux_as_printed, (FLUX, ONE)),
            by_count("SDXL, counted: 20 % of the parameters", _a_fifth_goes, published_mask(20)),
        ),
    )


def _sdxl_as_printed(tenth: dict, fifth: dict) -> tuple[bool, str]:
    left = {0.1: tenth["pruned"]["parameters"]["total"], 0.2: fifth["pruned"]["parameters"]["total"]}
    return _as_printed("SDXL", left)


def _flux_as_printed(count: dict) -> tuple[bool, str]:
    # No mask of FLUX is published: here every kind of unit loses the same share of its parameters.
    kinds = count["parameters"]
    maskable = kinds["attention"] + kinds["feed_forward"] + kinds["modulation"]
    return _as_printed("FLUX", {ratio: kinds["total"] - ratio * maskable for ratio in (0.1, 0.15)})


def _as_printed(model: str, left: dict[float, float]) -> tuple[bool, str]:
    """Whether the parameters that are left, {ratio: number}, round to those of Table 1."""
    agrees, parts = True, []
    for ratio, number in left.items():
        given = row("table1", model=model, method="EcoDiff", ratio=ratio)["params_billion"]
        agrees = agrees and round(number / 1e9, 1) == given
        parts.append(f"{number / 1e9:.3f} B ({given} B printed)")
    return agrees, ", ".join(parts)


def _a_fifth_goes(count: dict) -> tuple[bool, str]:
    share = 1 - count["pruned"]["parameters"]["total"] / count["parameters"]["total"]
    evidence = f"the authors' mask at 20 % removes {share:.1%} of SDXL's U-Net"
    return share >= claim("ratio_without_retraining") / 100, evidence


def operations() -> Claim:
    steps = round(claim("table1_steps_flux"))
    flux, sdxl = partial(_gflop, model="FLUX", calls=(steps,)), partial(_gflop, model="SDXL", calls=(50, 100))
    pruned_flux = partial(_pruned_gflop, model="FLUX", ratio=0.15, calls=steps)
    pruned_sdxl = partial(_pruned_gflop, model="SDXL", ratio=0.2, calls=80)
    return Claim(
        "Table 1",
        "GFLOP per image, with 5 steps for FLUX and 50 for SDXL, and how they fall when units go.",
        "Linear layers and convolutions counted: originals to the printed thousand (SDXL with and without guidance), "
        "pruned ones within 1 % (SDXL for 80 calls, which is what the print for the original comes to).",
        ("13_what_it_costs",),
        (
            by_count("FLUX.1, counted", flux, (FLUX, ONE)),
            by_count("SDXL, counted", sdxl, ("sdxl", ONE)),
            by_count("FLUX.1 without 15 %", pruned_flux, drawing(FLUX, 0.15)),
            by_count("SDXL without 20 %", pruned_sdxl, published_mask(20)),
        ),
    )


def _gflop(one_call: dict, model: str, calls: Sequence[int]) -> tuple[bool, str]:
    """Whether so many calls of the denoiser, by one reading or another, come to the GFLOP of Table 1's original."""
    given = row("table1", model=model, method="Original")["gflop"]
    counted = [one_call["picture_gflop"]["paper"] * n for n in calls]
    agrees = any(abs(gflop - given) < 500 for gflop in counted)  # thousands are printed
    readings = " or ".join(f"{gflop:,.0f}" for gflop in counted)
    return agrees, f"{readings}; {given:,} printed"


def _pruned_gflop(count: dict, model: str, ratio: float, calls: int) -> tuple[bool, str]:
    """Whether so many calls of the pruned denoiser come to the GFLOP of Table 1's pruned model."""
    given = row("table1", model=model, method="EcoDiff", ratio=ratio)["gflop"]
    gflop = count["pruned"]["picture_gflop"]["paper"] / count["forwards"] * calls
    return abs(gflop - given) < 0.01 * given, f"{gflop:,.0f} at {ratio:.0%}; {given:,} printed"


def drawing(preset: str, ratio: float) -> tuple[str, dict]:
    """Setting that counts a preset with this share of the units gone."""
    return preset, {"ratio": ratio, "inner": False}


def faster() -> Claim:
    return Claim(
        "§1, §4",
        "Pruned models generate images faster.",
        "One denoiser call with random weights, 20 % of the units gone, over the original in the same turns: below 1 "
        "by the clock and, on a CPU, by processor time.",
        ("13_what_it_costs",),
        (
            _time("sd2", "Stable Diffusion 2, fp32"),
            _time("sdxl", "SDXL, bf16"),
            _time("sd2", "Stable Diffusion 2, bf16, on a GPU", on_gpu=True),
            _time("sdxl", "SDXL, bf16, on a GPU", on_gpu=True),
        ),
    )


def _time(preset: str, title: str, on_gpu: bool = False) -> Decision:
    """The decision on the time of a pruned denoiser over that of the original, by the last recorded row."""
    rows = on_full_size.measured("inference", model=preset, ratio=0.2, round_to=1, on_gpu=on_gpu)
    rows = [row for row in rows if "ratio" in row["values"]["variants"]["pruned"]]  # others measured memory alone
    if not rows:
        return Decision(title, MISSING, command=f"python -m ecodiff benchmark full-size {preset} --parts inference")
    values, config = rows[-1]["values"], rows[-1]["config"]
    pruned, flops = values["variants"]["pruned"], values["flops"]
    times = [pruned["ratio"]]
    if not on_gpu and "cpu_ratio" in pruned:  # waiting for a GPU counts as processor time
        times.append(pruned["cpu_ratio"])
    evidence = f"time {' and '.join(f'{time:.2f}' for time in times)} of the original"
    evidence += f" ({config['device']}, medians of {config['turns']} turns)"
    evidence += f", operations {flops['pruned']['total'] / flops['original']['total']:.2f}"
    if on_gpu:
        rate = flops["original"]["total"] / values["variants"]["original"]["seconds"] / 1e12
        evidence += f"; {config['samples']} samples per call, {rate:.0f} TFLOP/s"
    holds: bool | None = max(times) < 1
    if min(times) < 1 <= max(times):  # faster by one clock and slower by the other
        holds = None
    return decided(f"{title}, measured", holds, evidence)


def small_gpus() -> Claim:
    return Claim(
        "Fig. 1",
        "Pruning is what brings SDXL to a GPU of 8 GB and FLUX to one of 24 GB.",
        "Peak of generating one image in bf16, by the better of all on the GPU and one component at a time: does the "
        "pruned model fit, and does the unpruned one not, whichever way a GB is read?",
        ("13_what_it_costs",),
        (
            *_fits_when_pruned("SDXL", "sdxl", 0.2, claim("sdxl_inference_gpu")),
            *_fits_when_pruned("FLUX.1", FLUX, 0.15, claim("flux_inference_gpu")),
        ),
    )


def _fits_when_pruned(title: str, preset: str, ratio: float, size: float) -> tuple[Question, Question]:
    """Decisions on a GPU of ``size`` GB: the pruned model fits, and the unpruned one does not."""
    fits, too_large = partial(_fits, size=size), partial(_too_large, size=size)
    return (
        by_count(f"{title}: {ratio:.0%} less fits {size:g} GB", fits, drawing(preset, ratio)),
        by_count(f"{title}: pruning is needed for it", too_large, drawing(preset, ratio)),
    )


def _fits(count: dict, size: float) -> tuple[bool, str]:
    least, room = min(count["pruned"]["inference_peak"].values()), usable(f"{size:g}GB")
    return least <= room, f"{gb(least)} at the best placement, {gb(room)} usable"


def _too_large(count: dict, size: float) -> tuple[bool | None, str]:
    """Whether the unpruned model does not fit; None where that depends on how a GB is read."""
    least = min(count["inference_peak"].values())
    room = {unit: usable(f"{size:g}{unit}") for unit in ("GB", "GiB")}
    spaces = " or ".join(f"{gb(space)} (of {size:g} {unit})" for unit, space in room.items())
    evidence = f"unpruned {gb(least)}, usable {spaces}"
    if (least > room["GB"]) != (least > room["GiB"]):
        return None, evidence
    return least > room["GB"], evidence


UPDATE_OF = {"SD2": ("sd2", 1, 50), "SDXL": ("sdxl", 2, 50), "FLUX": (FLUX, 1, 5)}
"""Rows of the paper's Table 12 -> preset, samples in a call as measured, and steps T of its mask update."""
GUIDED = ("SD2", "SDXL")
"""Models whose guidance makes two samples of one in every call."""


def hours() -> Claim:
    return Claim(
        "§4, App. N, Table 12",
        "Learning a mask takes hours of one GPU: 0.16 for SD2, 1.24 for SDXL, 0.42 for FLUX.",
        "200 updates of four samples, from the time of one checkpointed update measured on a GPU at the paper's number "
        "of steps: within a factor of two of the printed hours; hours and GPU-hours of the one GPU agree.",
        ("13_what_it_costs",),
        (
            *(_hours_measured(model) for model in UPDATE_OF),
            contradicted(arithmetic.hours()),
            Decision("SDXL", CHECKPOINT, command=learn_sdxl(round(claim("carbon_training_steps")))),
        ),
    )


def update_on_gpu(model: str) -> tuple[float, str] | None:
    """Seconds of the last recorded checkpointed update of a model of ``UPDATE_OF`` on a GPU, and which GPU."""
    preset, samples, steps = UPDATE_OF[model]
    newest = None
    for record in on_full_size.measured("update", model=preset, samples=samples, T=steps, on_gpu=True):
        seconds = record["values"]["variants"].get("checkpointed", {}).get("seconds")
        if seconds is not None:
            newest = seconds, record["config"]["device"]
    return newest


def command_of_update(preset: str, samples: int) -> str:
    """The command that measures mask updates of a full-size model."""
    return f"python -m ecodiff benchmark full-size {preset} --samples {samples} --parts update"


def _hours_measured(model: str) -> Decision:
    """Hours of learning a mask on a GPU, from a measured update with random weights, against Table 12's GPU-hours.

    A guided sample that was measured as one sample in a call takes between once and twice that time.
    """
    preset, samples, steps = UPDATE_OF[model]
    title = f"{model}, random weights, measured on a GPU"
    measured = update_on_gpu(model)
    if measured is None:
        return Decision(title, MISSING, command=command_of_update(preset, samples))
    seconds, device = measured
    settings = "table2" if model == "FLUX" else "table3"
    trajectories = claim("carbon_training_steps") * setting(settings, "batch_size")
    least = trajectories * seconds / 3600
    most, evidence = least, f"{least:.2f} hours"
    if model in GUIDED and samples == 1:
        most = 2 * least
        evidence = f"{least:.2f} to {most:.2f} hours"
    table12 = row("table12", model=model)
    given = table12["gpu_hours"]
    evidence += f" ({device}, T = {steps}, random weights); printed: {given:g} GPU-hours, "
    evidence += f"{table12['training_hours']:g} training hours"
    return decided(title, least <= 2 * given and most >= given / 2, evidence)


def learn_sdxl(updates: int) -> str:
    """The command that learns a mask of the real SDXL as the paper does: 50 steps, guidance 5."""
    arguments = f"num_inference_steps 50 -p guidance_scale 5.0 -p mask_updates {updates} -p batch_size 4"
    return f"papermill notebooks/05_learning_a_mask.ipynb out.ipynb -p model {on_embedded.HUB[SDXL]} -p {arguments}"


def carbon() -> Claim:
    factors = [entry["carbon_g"] / entry["gpu_hours"] for entry in table("table12")]
    evidence = (
        f"in every row the grams are {min(factors):.1f} to {max(factors):.1f} times the GPU-hours, so they say nothing "
        "that the hours do not; the power of the GPUs and the origin of their electricity are not printed"
    )
    return Claim(
        "App. N, Table 12",
        "Learning a mask emits 12 g of CO2 for SD2, 93 g for SDXL and 31.5 g for FLUX.",
        "Nothing that is printed could contradict it: grams and GPU-hours are one column, times a constant. Whether "
        "the hours are right is the claim before.",
        ("13_what_it_costs",),
        (Decision("Table 12", UNDECIDED, evidence),),
    )


def retraining_is_dear() -> Claim:
    low = claim("retraining_low") / 100 * claim("sd2_training")
    high = claim("retraining_high") / 100 * claim("sd2_training")
    given = claim("sd2_retraining")
    return Claim(
        "§1",
        "Retraining a pruned SD2 may take 40,000 GPU-hours; learning a mask is thousands of times cheaper.",
        "A tenth to a fifth of 200,000 hours ends at 40,000; divided by Table 12's hours for SD2 it is above 1,000.",
        ("13_what_it_costs",),
        (
            printed("§1", high == given, f"{low:,.0f} to {high:,.0f} hours"),
            _times_cheaper(low),
        ),
    )


def _times_cheaper(least: float) -> Decision:
    entry = row("table12", model="SD2")
    ratio = least / max(entry["training_hours"], entry["gpu_hours"])
    return printed("§1 and Table 12", ratio > 1000, f"at least {ratio:,.0f} times by the larger of Table 12's hours")


COST = (
    parameters,
    operations,
    faster,
    small_gpus,
    hours,
    carbon,
    retraining_is_dear,
)
