"""The interactive figure of the hard concrete chapter: drawn by Python, moved by a script without dependencies.

What Python draws is what a reader sees in print, without JavaScript, or before touching a slider.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

import torch

from ecodiff.method.hard_concrete import HardConcrete

from .interactive import interactive

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 640, 320, 76, 58, 14
RANGE = 8.0  # λ runs over [-RANGE, RANGE]
LEVELS = [round(0.01 + 0.98 * i / 96, 4) for i in range(97)]  # u for the band: 1 % to 99 % of the draws

STYLE = """
.hc-explorer svg { display: block; width: 100%; height: auto; overflow: visible; }
.hc-explorer text { font-size: 15px; }
.hc-explorer .hc-grid { stroke: currentColor; stroke-opacity: .18; }
.hc-explorer .hc-median, .hc-explorer .hc-open { fill: none; stroke-width: 2.5; }
.hc-explorer .hc-median { stroke: #1f8fd0; }
.hc-explorer .hc-open { stroke: #e69f00; stroke-dasharray: 8 5; }
.hc-explorer .hc-band { fill: #1f8fd0; fill-opacity: .22; }
.hc-explorer .hc-here { stroke: currentColor; stroke-width: 1.5; }
.hc-explorer .hc-draws circle { fill: currentColor; fill-opacity: .45; }
.hc-controls { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .4rem 1.2rem; }
.hc-controls label { display: flex; flex-wrap: wrap; justify-content: space-between; font-size: .9em; }
.hc-controls input { width: 100%; min-height: 1.6rem; accent-color: #1f8fd0; }
.hc-explorer button { margin-top: .5rem; padding: .15rem .9rem; min-height: 1.7rem; font: inherit; font-size: .9em;
  cursor: pointer; color: inherit; background: none; border: 1px solid currentColor; border-radius: 4px; }
.hc-explorer button:focus-visible { outline: 2px solid #1f8fd0; outline-offset: 2px; }
.hc-key { font-size: .9em; margin: .3rem 0; }
.hc-key b { font-weight: 600; }
.hc-says { font-size: .9em; min-height: 4.5em; margin: .3rem 0 0; }
@media (max-width: 600px) { .hc-explorer text { font-size: 22px; } }
@media print { .hc-controls, .hc-explorer button { display: none; } .hc-explorer { break-inside: avoid; } }
"""


def curves(distribution: HardConcrete, points: int = 121) -> dict[str, list[tuple[float, float]]]:
    """Median gate, its 1 % and 99 % quantiles, and P(open), each as (λ, value) pairs."""
    grid = torch.linspace(-RANGE, RANGE, points)
    lines = {
        "median": distribution.deterministic(grid),
        "low": distribution.sample(grid, torch.full_like(grid, LEVELS[0])),
        "high": distribution.sample(grid, torch.full_like(grid, LEVELS[-1])),
        "open": distribution.prob_open(grid),
    }
    return {name: list(zip(grid.tolist(), values.tolist(), strict=True)) for name, values in lines.items()}


def _x(log_alpha: float) -> str:
    """Where a λ lies in the drawing, in its own units from the left."""
    return f"{LEFT + (log_alpha + RANGE) / (2 * RANGE) * (WIDTH - LEFT - 10):.1f}"


def _y(value: float) -> str:
    """Where a value between 0 and 1 lies, from the top."""
    return f"{HEIGHT - BOTTOM - value * (HEIGHT - BOTTOM - TOP):.1f}"


def _path(pairs) -> str:
    return "M" + "L".join(f"{_x(log_alpha)},{_y(value)}" for log_alpha, value in pairs)


def _axes() -> str:
    """Grid lines with their numbers, and the names of both axes."""
    parts = []
    for log_alpha in range(-8, 9, 2):
        x = _x(log_alpha)
        number = str(log_alpha).replace("-", "−")
        parts.append(f'<line class="hc-grid" x1="{x}" x2="{x}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text x="{x}" y="{HEIGHT - BOTTOM + 24}" text-anchor="middle">{number}</text>')
    for value in (0, 0.5, 1):
        y = _y(value)
        parts.append(f'<line class="hc-grid" x1="{LEFT}" x2="{WIDTH - 10}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{float(y) + 5:.1f}" text-anchor="end">{value:g}</text>')
    middle = (HEIGHT - BOTTOM + TOP) / 2
    parts.append(f'<text x="{(WIDTH + LEFT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">λ (no unit)</text>')
    upright = f'x="22" y="{middle}" text-anchor="middle" transform="rotate(-90 22 {middle})"'
    parts.append(f"<text {upright}>gate z, or P(z &gt; 0)</text>")
    return "".join(parts)


def hard_concrete_explorer(log_alpha: float = 1.0, distribution: HardConcrete | None = None):
    """The figure as an object that Jupyter, Colab and the book display; it starts at `log_alpha` and `distribution`."""
    start = distribution or HardConcrete()
    lines = curves(start)
    band = _path(lines["low"] + lines["high"][::-1]) + "Z"  # there along its lower edge, and back along the upper one
    controls = [
        _slider("lambda", "λ, what is learned", -RANGE, RANGE, 0.1, log_alpha),
        _slider("delta", "δ, limits the noise", 0, 2, 0.01, start.delta),
        _slider("alpha", "α, temperature", 0.1, 2, 0.01, start.temperature),
    ]
    description = (
        "Gate value against lambda. A curve rises from 0 to 1 through a half at lambda 0 and is clipped at both ends; "
        "a band around it holds 98 percent of the random draws; a dashed curve is the probability that the gate is "
        "open. Sliders change lambda, delta and the temperature alpha; a button sets them back."
    )
    here = _x(log_alpha)
    body = f"""
<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{description}">
{_axes()}
<path class="hc-band" d="{band}"/>
<path class="hc-open" d="{_path(lines["open"])}"/>
<path class="hc-median" d="{_path(lines["median"])}"/>
<line class="hc-here" x1="{here}" x2="{here}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>
<g class="hc-draws"></g>
</svg>
<p class="hc-key"><b>Solid:</b> gate without noise. <b>Band:</b> 98 % of the draws.
<b>Dashed:</b> P(z &gt; 0), the probability that the gate is open. <b>Dots:</b> draws at the chosen λ.
λ, δ, α and z have no unit.</p>
<div class="hc-controls">{"".join(controls)}</div>
<button type="button">Reset the sliders</button>
<p class="hc-says" role="status" aria-live="polite">{escape(says(start, log_alpha))}</p>"""
    constants = {
        "gamma": start.gamma, "zeta": start.zeta, "range": RANGE, "width": WIDTH, "height": HEIGHT,
        "left": LEFT, "bottom": BOTTOM, "top": TOP, "levels": LEVELS,
    }  # fmt: skip
    script = Path(__file__).with_suffix(".js")
    return interactive("hc-explorer", "Interactive hard concrete gate", body, STYLE, script, constants)


def _slider(name: str, text: str, low: float, high: float, step: float, value: float) -> str:
    return (
        f"<label><span>{escape(text)}</span> <output>{value:g}</output> "
        f'<input type="range" name="{name}" min="{low}" max="{high}" step="{step}" value="{value}"></label>'
    )


def says(distribution: HardConcrete, log_alpha: float) -> str:
    """The sentence under the figure, which the script keeps up to date."""
    at = torch.tensor([float(log_alpha)])
    low = 1 - distribution.prob_open(at).item()
    # The gate of λ is 1 as often as that of -λ is 0: noise and clipping are symmetric.
    high = 1 - distribution.prob_open(-at).item()
    if distribution.delta:
        stuck = f"From λ = {distribution.saturation:.2f} on it is zero in every draw."
    else:
        stuck = "Without a limit on the noise, no λ makes it zero in every draw."
    return (
        f"The gate is exactly 0 in {100 * low:.1f}\u00a0% of the draws and exactly 1 in {100 * high:.1f}\u00a0%. "
        f"The gradient is zero in these {100 * (low + high):.1f}\u00a0%. {stuck}"
    )
