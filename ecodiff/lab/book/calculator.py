"""The calculator of the cost chapter: numbers counted by Python, moved by a script without dependencies, offline.

What Python writes is what a reader sees in print, without JavaScript, or before touching anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from ecodiff.cost import presets
from ecodiff.cost.units import CONTEXT, FRAGMENTS
from ecodiff.cost.counting import cost
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
.cost-calculator td, .cost-calculator th { padding: .25rem 0 .25rem .75rem; }
.cost-calculator th[scope=row], .cost-calculator thead th:first-child { padding-left: 0; }
.cost-calculator tr { border-bottom: 1px solid color-mix(in srgb, currentColor 20%, transparent); }
.cost-says { min-height: 3em; margin: .8rem 0; }
@media print { .cost-controls { display: none; } }
"""


def numbers(name: str) -> dict:
    """What the calculator needs of one preset: plain values at ratio 0 and `FAR`, for one sample at its own size."""
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
    """The calculator as an object that Jupyter, Colab and the book display; `rows` are from `numbers`."""
    chosen = next(row for row in rows if row["name"] == start)
    models = "".join(
        f'<option value="{escape(row["name"])}"{" selected" if row is chosen else ""}>{escape(row["title"])}</option>'
        for row in rows
    )
    controls = f'<label>Model <select name="model">{models}</select></label>' + "".join(
        f'<label>{escape(text)} <input type="number" name="{name}" min="{low}" max="{high}" step="{step}" '
        f'value="{value}"></label>'
        for name, text, low, high, step, value in (
            ("steps", "Denoising steps", 1, 100, 1, chosen["steps"]),
            ("batch", "Pictures at a time", 1, 64, 1, batch),
            ("ratio", "Units removed, %", 0, 100 * FAR, 1, round(100 * ratio)),
            ("gpu", "GPU memory, GB", 4, 200, 1, gpu),
        )
    )
    controls += '<label><input type="checkbox" name="guided" checked> with guidance</label>'
    lines = "".join(
        f'<tr><th scope="row">{escape(text)}</th><td>{before}</td><td>{after}</td></tr>'
        for text, before, after in table(chosen, chosen["steps"], batch, ratio, True)
    )
    constants = {"rows": list(rows), "far": FAR, "context": CONTEXT, "fragments": FRAGMENTS}
    body = f"""
<div class="cost-controls">{controls}</div>
<p class="cost-says" role="status" aria-live="polite"></p>
<table><thead><tr><th></th><th scope="col">original</th><th scope="col">pruned</th></tr></thead>
<tbody>{lines}</tbody></table>"""
    script = Path(__file__).with_suffix(".js")
    return interactive("cost-calculator", "Cost calculator", body, STYLE, script, constants)


def table(row: dict, steps: int, batch: int, ratio: float, guided: bool) -> list[tuple[str, str, str]]:
    """The calculator's table for one setting, as text: (what, original, pruned). The script computes the same."""
    doubled = guided and row["guided"] != "embedded"
    samples = batch * (2 if doubled and row["guided"] == "batch" else 1)
    calls = steps * (2 if doubled and row["guided"] == "calls" else 1)
    forwards = steps * (2 if doubled else 1)
    columns = []
    for share in (0.0, ratio):
        p = {
            key: a + (b - a) * share / FAR
            for (key, a), b in zip(row["points"][0].items(), row["points"][1].values(), strict=True)
        }
        base = p["weights"] + row["others"] + calls * row["inputs"] * samples
        drawing = max((row["inputs"] + p["forward"]) * samples, row["decode"] * batch)
        alone = max(
            row["encoder"], p["weights"] + (row["inputs"] + p["forward"]) * samples, row["vae"] + row["decode"] * batch
        )
        columns.append([
            f"{p['parameters'] / 1e6:,.0f} M", f"{p['paper'] * forwards / 1e9:,.0f}",
            f"{p['total'] * forwards / 1e9:,.0f}",
            *(f"{value / 1e9:,.1f} GB" for value in (
                base + ((calls - 1) * p["held"] + p["peak"]) * samples,
                base + p["peak"] * samples,
                base + p["inner_peak"] * samples,
                p["weights"] + row["others"] + drawing,
                alone,
            )),
        ])  # fmt: skip
    names = (
        "Parameters of the denoiser", "GFLOP a picture, linear and convolution", "GFLOP a picture, attention too",
        "Mask update, plain", "Mask update, time-step checkpointed", "… and checkpointed inside the denoiser",
        "Drawing, all on the device", "Drawing, with CPU offload",
    )  # fmt: skip
    return list(zip(names, *columns, strict=True))
