"""The interactive figure of the chapter on methods: recorded images of several methods, by the share of units removed.

``python -m ecodiff book ratio-slider`` writes data/results/ratio_slider.png: for each prompt (a row of the sprite) the
original's image, then one image for each method and ratio. SSIM and facts are read from the recorded rows, which were
measured on these images. What Python writes is what a reader sees in print, without JavaScript, or before touching
anything.
"""

from __future__ import annotations

import base64
import io
from html import escape
from pathlib import Path
from statistics import fmean

import numpy as np
from IPython.display import HTML
from PIL import Image, PngImagePlugin

from ecodiff import metrics
from ecodiff.errors import EcoDiffError
from ecodiff.lab import studies
from ecodiff.lab.identities import identity
from ecodiff.lab.studies.cell import Cell, describe_cell
from ecodiff.lab.studies.results import interval_text
from ecodiff.storage import records
from ecodiff.storage.files import write_whole
from ecodiff.storage.fingerprint import key
from ecodiff.storage.paths import data_dir

from .interactive import interactive

MODEL = studies.DEV
METHODS = ("learned+compensation", "gauss-newton+compensation", "learned", "gauss-newton", "magnitude", "random")
RATIOS = (0.1, 0.2, 0.3, 0.5)
PROMPTS = 6  # the first of the protocol: none is chosen
IMAGES = 64  # of which all rows have SSIM and facts: some rows have no more
SIZE = 64  # pixels of an image
STUDIES = ("main", "best", "ratios")  # where a row is looked for, in this order
NAMES = {"learned+compensation": "learned, adapted", "gauss-newton+compensation": "Gauss-Newton, adapted"}
NAMES |= {"gauss-newton": "Gauss-Newton"}

STYLE = """
.ratio-slider label { display: block; font-weight: 600; }
.ratio-slider input { width: 100%; min-height: 1.8rem; accent-color: #1f8fd0; }
.ratio-slider table { display: table; width: 100%; margin: .4rem 0; border-collapse: collapse; table-layout: fixed; }
.ratio-slider th, .ratio-slider td { border: 0; padding: .15rem; text-align: center; font-weight: normal; }
.ratio-slider th[scope=row], .ratio-slider thead th:first-child { width: 30%; text-align: left; line-height: 1.3; }
.ratio-slider th b { display: block; font-weight: 600; }
.ratio-slider th[scope=row] span { display: block; font-size: .8em; font-variant-numeric: tabular-nums; }
.ratio-tile { aspect-ratio: 1; background-repeat: no-repeat; image-rendering: pixelated;
  -webkit-print-color-adjust: exact; print-color-adjust: exact; }
.ratio-slider td span { font-size: .75em; white-space: nowrap; }
.ratio-slider p { margin: .3rem 0; font-size: .9em; }
@media (max-width: 600px) {
  .ratio-slider tr { display: grid; grid-template-columns: repeat(VAR_PROMPTS, minmax(0, 1fr)); }
  .ratio-slider th[scope=row] { grid-column: 1 / -1; width: auto; }
  .ratio-slider thead th:first-child { display: none; }
  .ratio-slider td span { font-size: .7em; }
}
@media print { .ratio-slider input { display: none; } .ratio-slider { break-inside: avoid; } }
""".replace("VAR_PROMPTS", str(PROMPTS))


def sprite_file() -> Path:
    """Where the images are kept."""
    return data_dir() / "results" / "ratio_slider.png"


def cell_of(row: str) -> Cell:
    """The cell of a row such as "learned, 20%", from the first of ``STUDIES`` that has the row."""
    for study in STUDIES:
        cells = studies.cells(study, MODEL)
        if row in cells:
            return cells[row]
    raise EcoDiffError(f"No study of {MODEL} has a row {row!r}: the slider's studies are {', '.join(STUDIES)}.")


def rows() -> list[str]:
    """The rows whose images the sprite has, in the order of its columns."""
    return ["original", *(f"{method}, {ratio:.0%}" for method in METHODS for ratio in RATIOS)]


def made_from() -> str:
    """The hash of all that the images depend on: weights, masks, prompts and noise of every row. Loads no model."""
    described = {}
    for row in rows():
        described[row] = describe_cell(identity(MODEL), cell_of(row))
    return key({"rows": described, "prompts": PROMPTS})


def draw_sprite() -> Path:
    """Generate all images again, with the recorded masks, and write the sprite."""
    import torch

    import ecodiff
    from ecodiff.lab.studies.images import draw
    from ecodiff.lab.studies.measure import smaller_model

    pipe, columns = ecodiff.load(MODEL), []
    for row in rows():
        cell = cell_of(row)
        smaller = smaller_model(pipe, cell)
        columns.append(draw(smaller, cell.protocol.scenes()[:PROMPTS], cell.seed, cell.protocol))
        print(f"generated {row}", flush=True)
    images = torch.stack(columns, dim=1)  # prompts, rows of the studies, 3, height, width
    prompts, number, channels, height, width = images.shape
    whole = images.permute(0, 3, 1, 4, 2).reshape(prompts * height, number * width, channels)
    facts, file = PngImagePlugin.PngInfo(), io.BytesIO()
    facts.add_text("made from", made_from())
    facts.add_text("Copyright", "Art derives from OpenMoji (https://openmoji.org), CC BY-SA 4.0")
    Image.fromarray(whole.numpy()).save(file, format="PNG", optimize=True, pnginfo=facts)
    write_whole(sprite_file(), file.getvalue())
    return sprite_file()


def images() -> dict[str, np.ndarray]:
    """{row: images uint8 [PROMPTS, SIZE, SIZE, 3]} of the sprite.

    Raises EcoDiffError where there is none, or where it was made with other weights, masks or prompts than the rows.
    """
    again = "run python -m ecodiff book ratio-slider"
    if not sprite_file().exists():
        raise EcoDiffError(f"{sprite_file().name} is not in data/results: get it with git, or {again}.")
    with Image.open(sprite_file()) as sprite:
        made, pixels = sprite.info.get("made from"), np.asarray(sprite.convert("RGB"))
    if made != made_from():
        raise EcoDiffError(f"{sprite_file().name} was made from other weights, masks or prompts: {again}.")
    cut = pixels.reshape(PROMPTS, SIZE, len(rows()), SIZE, 3)
    return {row: cut[:, :, i] for i, row in enumerate(rows())}


def measured() -> dict[str, dict[str, list[float]]]:
    """For each row, ``ssim`` and ``facts`` of its first `IMAGES` images with seed 0, as they are recorded."""
    found: dict[str, list[dict]] = {}
    for study in reversed(STUDIES):  # so that the first of them has the last word, as in `cell_of`
        found |= studies.recorded(study, MODEL, seeds=1, only=rows())
    values = {}
    for row in rows():
        if row not in found:
            command = f"python -m ecodiff study {' '.join(STUDIES)} --model {MODEL}"
            raise EcoDiffError(f"The slider needs the row {row!r} of {MODEL}: run {command}.")
        values[row] = {name: list(found[row][0][name][:IMAGES]) for name in ("ssim", "facts")}
    return values


def positions() -> list[dict]:
    """What the figure shows at each stop of the slider: nothing removed, then each ratio.

    A stop has ``share`` (text), ``says`` (a sentence) and ``rows``: for each method ``ssim`` and ``right`` (texts), and
    for each prompt the column of its image in the sprite and what stands below the image and for it.
    """
    prompts = [scene.caption for scene in cell_of("original").protocol.scenes()[:PROMPTS]]
    stops, recorded = [], measured()
    for ratio in (0.0, *RATIOS):
        share, lines, right = f"{ratio:.0%}".replace("%", "\u00a0%"), [], {}
        for method in METHODS:
            row = f"{method}, {ratio:.0%}" if ratio else "original"
            values, name = recorded[row], NAMES.get(method, method)
            right[name] = fmean(values["facts"])
            tiles = []
            for i, prompt in enumerate(prompts):
                hit = "right" if values["facts"][i] else "wrong"
                below = f"{values['ssim'][i]:.2f} {'✓' if values['facts'][i] else '✗'}"
                text = f"{name}, {share} removed, prompt: {prompt}. SSIM {values['ssim'][i]:.2f}, {hit}."
                tiles.append({"below": below, "text": text})
            ssim = interval_text([values["ssim"]], digits=2) if ratio else "1"
            share_right = metrics.share_interval(values["facts"])
            ends = f"({100 * share_right.low:.0f} to {100 * share_right.high:.0f})"
            lines.append({
                "name": name, "column": rows().index(row), "tiles": tiles,
                "ssim": f"SSIM {ssim}", "right": f"right {100 * right[name]:.0f}\u00a0% {ends}",
            })  # fmt: skip
        most, least = (_names_with(right, extreme(right.values())) for extreme in (max, min))
        says = f"Nothing is removed: all rows show the original, which is right in {100 * max(right.values()):.0f} %."
        if ratio:
            says = (
                f"Without {share} of the units, most images are right with {most} ({100 * max(right.values()):.0f} %) "
                f"and fewest with {least} ({100 * min(right.values()):.0f} %)."
            )
        stops.append({"share": share, "says": says.replace(" %", "\u00a0%"), "rows": lines})
    return stops


def _names_with(shares: dict[str, float], value: float) -> str:
    return " and ".join(name for name, share in shares.items() if share == value)


def ratio_slider(start: float = 0.2):
    """The figure as an object that Jupyter, Colab and the book display; it stands at ratio ``start`` first."""
    if not records.enabled():
        return HTML("<p>Recorded rows are switched off (ECODIFF_RECORDS), so there is nothing to slide over.</p>")
    images()  # raises where they do not belong to the rows
    stops, first = positions(), (0.0, *RATIOS).index(start)
    sprite = base64.b64encode(_small(sprite_file())).decode()
    size = f"background-size: {100 * len(rows())}% {100 * PROMPTS}%"
    style = f"{STYLE}.ratio-tile {{ background-image: url(data:image/webp;base64,{sprite}); {size}; }}"
    heads = "".join(f'<th scope="col">{i + 1}</th>' for i in range(PROMPTS))
    lines = ""
    for line in stops[first]["rows"]:
        cells = ""
        for i, tile in enumerate(line["tiles"]):
            place = f"background-position: {_percent(line['column'], len(rows()))} {_percent(i, PROMPTS)}"
            cells += (
                f'<td><div class="ratio-tile" role="img" aria-label="{escape(tile["text"])}" style="{place}"></div>'
                f'<span aria-hidden="true">{tile["below"]}</span></td>'
            )
        lines += (
            f'<tr><th scope="row"><b>{escape(line["name"])}</b><span>{line["ssim"]}</span>'
            f"<span>{line['right']}</span></th>{cells}</tr>"
        )
    prompts = "; ".join(
        f"({i}) {escape(scene.caption)}" for i, scene in enumerate(cell_of("original").protocol.scenes()[:PROMPTS], 1)
    )
    body = f"""
<label>Share of the units removed: <output>{stops[first]["share"]}</output>
<input type="range" name="ratio" min="0" max="{len(stops) - 1}" step="1" value="{first}"
  aria-valuetext="{stops[first]["share"]}"></label>
<p class="ratio-says" role="status" aria-live="polite">{stops[first]["says"]}</p>
<table><thead><tr><th scope="col">Mean of {IMAGES} images</th>{heads}</tr></thead><tbody>{lines}</tbody></table>
<p>Below each image: its SSIM to the original's, and whether the judge finds it right (✓) or wrong (✗).
Prompts: {prompts}.</p>"""
    constants = {"stops": stops, "columns": len(rows())}
    script = Path(__file__).with_suffix(".js")
    return interactive("ratio-slider", "Images by the share of units removed", body, style, script, constants)


def _small(sprite: Path) -> bytes:
    """The sprite as a page shows it: a fifth of the bytes of the one that is kept, and no difference to the eye."""
    file = io.BytesIO()
    with Image.open(sprite) as image:
        image.convert("RGB").save(file, format="WEBP", quality=90, method=6)
    return file.getvalue()


def _percent(index: int, number: int) -> str:
    """Where CSS puts the background so that tile ``index`` of ``number`` is what is seen."""
    return f"{100 * index / (number - 1):.4f}%"
