"""The calculator of the cost chapter: numbers counted by Python, moved by a script without dependencies, offline.

What Python writes is what a reader sees in print, without JavaScript, or before touching anything.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from ecodiff.cost import presets
from ecodiff.cost.counting import cost
from ecodiff.cost.units import CONTEXT, FRAGMENTS

from .interactive import interactive

FAR = 0.5  # the second ratio that is counted; between 0 and this the page interpolates
STYLE = """
.cost-controls { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .4rem 1.2rem; }
.cost-controls label { display: block; font-size: .9em; }
.cost-controls select, .cost-controls input[type=number] { width: 100%; min-height: 1.8rem; }
.cost-calculator table { width: 100%; border-collapse: collapse; margin: .8rem 0; }
.cost-calculator td { font-variant-numeric: tabular-nums; }
.cost-calculator th { text-align: left; font-weight: normal; }
.cost-calculator thead th { font-weight: 600; }
.cost-calculator td, .cost-calculator thead th + th { text-align: right; }
.cost-calculator td, .cost-calculator th { padding: .25rem 0 .25rem clamp(.75rem, 3vw, 1.5rem); vertical-align: top; }
.cost-calculator th[scope=row], .cost-calculator thead th:first-child { padding-left: 0; }
.cost-calculator tr { border-bottom: 1px solid color-mix(in srgb, currentColor 20%, transparent); }
.cost-says { min-height: 4.5em; margin: 0 0 .8rem; font-weight: 600; }
@media print { .cost-controls { display: none; } }
"""


def numbers(name: str) -> dict:
    """What the calculator needs of one preset: plain values at ratio 0 and `FAR`, for one sample at its own size.

    Bytes and operations of a call grow with the number of samples and calls, so that the page can count any other.
    """
    preset = presets.preset(name)
    counted = cost(name, batch=1, steps=1, guidance=0.0, ratio=FAR)
    points = []
    for one in (counted, counted.pruned):
        points.append({
            "parameters": one.parameters["total"], "paper": one.flops.paper, "total": one.flops.total,
            "weights": one.weights,
            "held": one.call.update.held, "peak": one.call.update.peak, "forward": one.call.forward_peak,
            "inner_held": one.call.inner.held, "inner_peak": one.call.inner.peak,
        })  # fmt: skip
    return {
        "name": name, "title": preset.title, "size": list(preset.size), "frames": preset.frames, "steps": preset.steps,
        "guidance": preset.guidance, "guided": preset.guided, "inputs": counted.call.inputs,
        "others": counted.text_encoders + counted.vae,
        "encoder": counted.largest_encoder, "vae": counted.vae, "decode": counted.decode, "points": points,
    }  # fmt: skip


def calculator(rows: Sequence[dict], start: str = "sdxl", batch: int = 1, ratio: float = 0.2, gpu: int = 24):
    """The calculator as an object that Jupyter, Colab and the book display; `rows` are from `numbers`.

    It says its verdict first, then what may be changed, then the numbers behind the verdict.
    """
    chosen = next(row for row in rows if row["name"] == start)
    models = ""
    for row in rows:
        selected = " selected" if row is chosen else ""
        models += f'<option value="{escape(row["name"])}"{selected}>{escape(row["title"])}</option>'
    controls = [
        f'<label>Model <select name="model">{models}</select></label>',
        _number("steps", "Denoising steps", 1, 100, chosen["steps"]),
        _number("batch", "Images at a time", 1, 64, batch),
        _number("ratio", "Units removed, %", 0, 100 * FAR, round(100 * ratio)),
        _number("gpu", "GPU memory, GB", 4, 200, gpu),
        '<label><input type="checkbox" name="guided" checked> with guidance</label>',
    ]
    lines = ""
    for text, before, after in table(chosen, chosen["steps"], batch, ratio, True):
        lines += f'<tr><th scope="row">{escape(text)}</th><td>{before}</td><td>{after}</td></tr>'
    says = verdict(chosen, chosen["steps"], batch, ratio, gpu)
    constants = {"rows": list(rows), "far": FAR, "context": CONTEXT, "fragments": FRAGMENTS}
    body = f"""
<p class="cost-says" role="status" aria-live="polite">{escape(says)}</p>
<div class="cost-controls">{"".join(controls)}</div>
<table><thead><tr><th></th><th scope="col">original</th><th scope="col">pruned</th></tr></thead>
<tbody>{lines}</tbody></table>"""
    script = Path(__file__).with_suffix(".js")
    return interactive("cost-calculator", "Cost calculator", body, STYLE, script, constants)


def _number(name: str, text: str, low: float, high: float, value: float) -> str:
    return (
        f'<label>{escape(text)} <input type="number" name="{name}" min="{low}" max="{high}" step="1" '
        f'value="{value}"></label>'
    )


@dataclass(frozen=True)
class Amounts:
    """What one model needs for one setting: operations of an image, and bytes of updating its mask and of generating.

    An update holds ``base`` in any case, ``held`` for each call whose tensors wait for the backward pass, and ``peak``
    for the call that is being differentiated, ``inner`` where that call is checkpointed inside, too.
    """

    parameters: float
    paper: float
    total: float
    base: float
    held: float
    peak: float
    inner: float
    calls: int
    generating: float
    offloaded: float

    @property
    def plain(self) -> float:
        return self.base + (self.calls - 1) * self.held + self.peak

    @property
    def checkpointed(self) -> float:
        return self.base + self.peak

    @property
    def checkpointed_inner(self) -> float:
        return self.base + self.inner


def amounts(row: dict, steps: int, batch: int, ratio: float, guided: bool = True) -> Amounts:
    """What a model (from `numbers`) needs, interpolated between the two ratios that were counted."""
    samples, calls, forwards = batch, steps, steps
    if guided and row["guided"] != "embedded":  # an embedded guidance is an input of the denoiser, and costs nothing
        forwards *= 2
        if row["guided"] == "batch":
            samples *= 2
        if row["guided"] == "calls":
            calls *= 2
    p = {}
    for key, at_zero in row["points"][0].items():
        p[key] = at_zero + (row["points"][1][key] - at_zero) * ratio / FAR
    denoising = (row["inputs"] + p["forward"]) * samples
    decoding = row["decode"] * batch
    return Amounts(
        parameters=p["parameters"],
        paper=p["paper"] * forwards,
        total=p["total"] * forwards,
        base=p["weights"] + row["others"] + calls * row["inputs"] * samples,
        held=p["held"] * samples,
        peak=p["peak"] * samples,
        inner=p["inner_peak"] * samples,
        calls=calls,
        generating=p["weights"] + row["others"] + max(denoising, decoding),
        # With offload one component at a time is on the device: text encoder, denoiser, VAE.
        offloaded=max(row["encoder"], p["weights"] + denoising, row["vae"] + decoding),
    )


def table(row: dict, steps: int, batch: int, ratio: float, guided: bool) -> list[tuple[str, str, str]]:
    """The calculator's table for one setting, as text: (what, original, pruned). The script computes the same."""
    columns = []
    for share in (0.0, ratio):
        one = amounts(row, steps, batch, share, guided)
        columns.append(
            [
                f"{one.parameters / 1e6:,.0f} M",
                f"{one.paper / 1e9:,.0f} GFLOP",
                f"{one.total / 1e9:,.0f} GFLOP",
                _gb(one.plain),
                _gb(one.checkpointed),
                _gb(one.checkpointed_inner),
                _gb(one.generating),
                _gb(one.offloaded),
            ]
        )
    names = (
        "Parameters of the denoiser", "Operations per image, linear and convolution",
        "Operations per image, attention too", "Mask update, plain", "Mask update, time-step checkpointed",
        "… and checkpointed inside the denoiser", "Generating, all on the device", "Generating, with CPU offload",
    )  # fmt: skip
    return list(zip(names, *columns, strict=True))


def verdict(row: dict, steps: int, batch: int, ratio: float, gpu: int, guided: bool = True) -> str:
    """Whether a GPU of so many GB is large enough, in sentences. The script says the same."""
    room = gpu * 1e9 * (1 - FRAGMENTS) - CONTEXT
    before, after = (amounts(row, steps, batch, share, guided) for share in (0.0, ratio))
    # Steps whose tensors are kept, from the last one on. A step with guidance may be two calls.
    held = before.held * before.calls / steps
    one_step = before.base + before.peak + (before.calls / steps - 1) * before.held
    kept = min(steps, math.floor((room - one_step) / held) + 1)
    if kept >= steps:
        learning = "fits without checkpointing"
    elif kept >= 1:
        learning = f"fits with time-step checkpointing (keep_last={kept})"
    elif before.checkpointed_inner <= room:
        learning = "fits only with checkpointing inside the denoiser, too"
    else:
        learning = "does not fit"
    generating = []
    for one in (before, after):
        if one.generating <= room:
            generating.append("fits")
        elif one.offloaded <= room:
            generating.append("fits with CPU offload")
        else:
            generating.append("does not fit")
    return (
        f"Generating {generating[0]} before pruning and {generating[1]} after it. "
        f"Learning a mask {learning}. Of {gpu} GB, {_gb(room)} count as usable."
    )


def _gb(value: float) -> str:
    return f"{value / 1e9:,.1f} GB"
