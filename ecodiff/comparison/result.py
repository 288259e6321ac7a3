"""What a comparison found, and the page that shows it: one HTML file with everything in it."""

from __future__ import annotations

import base64
import html
import os
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from string import Template

from torch import Tensor

from ecodiff import metrics
from ecodiff.errors import EcoDiffError
from ecodiff.metrics import Interval
from ecodiff.storage.files import write_whole
from ecodiff.storage.images import encoded

PSNR_OF_EQUALS = 100.0  # dB, in the place of infinity
FRAME = 125
"""Milliseconds that a page shows each frame of a clip."""
SHOWN_HEIGHT = "46rem"
"""Height of the page in a notebook."""


@dataclass(frozen=True, repr=False)
class Comparison:
    """Images of a first and a second model, pair by pair of the same prompt and seed. A notebook shows its page."""

    names: tuple[str, str]
    prompts: list[str]
    seeds: list[int]
    images: tuple[Tensor, Tensor]
    """uint8 [N, 3, height, width] of the first and of the second."""
    ssim: list[float]
    """Structural similarity of each pair, 1 for equal images."""
    psnr: list[float]
    """Peak signal-to-noise ratio of each pair in dB; ``PSNR_OF_EQUALS`` for equal images."""
    clip: tuple[list[float], list[float]] | None = None
    """CLIP score of each image of the first and of the second with its prompt, where a judge was given."""
    costs: tuple[dict, dict] = field(default_factory=lambda: ({}, {}))
    """Numbers of the first and of the second, {what: value}."""

    def intervals(self) -> dict[str, Interval]:
        """The means over pairs with their 95 % intervals; that of the CLIP score is first minus second."""
        found = {"SSIM": metrics.mean_interval(self.ssim), "PSNR in dB": metrics.mean_interval(self.psnr)}
        if self.clip:
            differences = [a - b for a, b in zip(*self.clip, strict=True)]
            found["CLIP score, first minus second"] = metrics.mean_interval(differences)
        return found

    def __repr__(self) -> str:
        measured = (f"{name} {found.mean:.3f}" for name, found in self.intervals().items())
        return f"Comparison of {len(self.prompts)} pairs, {' and '.join(self.names)}: {', '.join(measured)}"

    def _repr_html_(self) -> str:
        """The page in a frame, for a notebook."""
        title = html.escape(f"Images of {' and '.join(self.names)}, pair by pair", quote=True)
        inside = html.escape(page(self), quote=True)
        return (
            f'<iframe title="{title}" srcdoc="{inside}" loading="lazy" '
            f'style="width: 100%; height: {SHOWN_HEIGHT}; border: 1px solid #8886"></iframe>'
        )

    def write(self, path: str | os.PathLike) -> None:
        """Write one HTML page that needs no other file: images with a slider, measures and costs.

        Raises EcoDiffError where the page cannot be written; nothing is left of it then.
        """
        try:
            write_whole(Path(path), page(self).encode())
        except OSError as error:
            raise EcoDiffError(f"{path}: the page cannot be written ({error}).") from error


def page(comparison: Comparison) -> str:
    """The HTML text; names and prompts are escaped, so that none can be markup."""
    first, second = (html.escape(name) for name in comparison.names)
    template = Template(files(__package__).joinpath("page.html").read_text(encoding="utf-8"))
    return template.substitute(
        first=first,
        second=second,
        number=len(comparison.prompts),
        measures="\n".join(_measures(comparison)),
        costs=_costs(comparison),
        pairs="\n".join(_pair(comparison, number) for number in range(len(comparison.prompts))),
    )


def _measures(comparison: Comparison) -> list[str]:
    rows = []
    for name, interval in comparison.intervals().items():
        rows.append(
            f"<tr><th scope=row>{html.escape(name)}</th><td>{interval.mean:.3f}</td>"
            f"<td>{interval.low:.3f} to {interval.high:.3f}</td></tr>"
        )
    return rows


def _costs(comparison: Comparison) -> str:
    """A table of the costs; nothing where they are not known, as of folders of images."""
    first, second = comparison.costs
    if not first:
        return ""
    heads = "".join(f"<th>{html.escape(name)}</th>" for name in comparison.names)
    rows = []
    for name in first:
        change = first[name] / second[name] - 1
        rows.append(
            f"<tr><th scope=row>{html.escape(name)}</th><td>{first[name]:,}</td><td>{second[name]:,}</td>"
            f"<td>{change:+.1%}</td></tr>"
        )
    return (
        f'<div class="scroll"><table>\n<thead><tr><th></th>{heads}<th>change</th></tr></thead>\n<tbody>\n'
        + "\n".join(rows)
        + "\n</tbody></table></div>"
    )


def _pair(comparison: Comparison, number: int) -> str:
    prompt = html.escape(comparison.prompts[number], quote=True)
    sources = [_as_url(images[number]) for images in comparison.images]
    names = [html.escape(name, quote=True) for name in comparison.names]
    height, width = comparison.images[0].shape[-2:]
    facts = f"SSIM {comparison.ssim[number]:.3f}, PSNR {comparison.psnr[number]:.1f} dB"
    if comparison.clip:
        facts += f", CLIP score {comparison.clip[0][number]:.1f} and {comparison.clip[1][number]:.1f}"
    return f"""<figure data-ssim="{comparison.ssim[number]:.6f}" data-number="{number}">
<div class=pair style="aspect-ratio: {width} / {height}">
<img src="{sources[1]}" width={width} height={height} alt="{prompt}: {names[1]}">
<img src="{sources[0]}" width={width} height={height} alt="{prompt}: {names[0]}" class=over>
</div>
<input type=range min=0 max=100 value=50 aria-label="How much of the image of {names[0]} shows: {prompt}">
<figcaption><q>{prompt}</q>, seed {comparison.seeds[number]}<br>{facts}</figcaption>
</figure>"""


def _as_url(image: Tensor) -> str:
    """An image, uint8 [3, height, width], or a clip [frames, 3, height, width], as a data URL without loss."""
    options = {} if image.ndim == 3 else {"duration": FRAME, "loop": 0}
    content = encoded(image, "WEBP", lossless=True, **options)
    return "data:image/webp;base64," + base64.b64encode(content).decode()
