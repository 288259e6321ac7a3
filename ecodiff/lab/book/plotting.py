"""The look of every figure, and the ways a chapter puts results on its page.

Figures get number, caption and alternative text from the cell's metadata (`mystnb: {figure: ..., image: {alt: ...}}`);
the functions here only draw.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from cycler import cycler

# Okabe and Ito's colours, ordered so that neighbours also differ in lightness: they stay apart for colour-blind
# readers and on a grey print, where line styles and markers help.
PALETTE = ["#0072B2", "#E69F00", "#000000", "#009E73", "#D55E00", "#56B4E9", "#CC79A7"]
DASHES = ["-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (8, 3))]
MARKERS = ["o", "s", "^", "D", "v", "P", "X"]

# One colour for one thing in the whole book.
COLOURS = {
    "original": "#000000", "learned": "#0072B2", "random": "#999999", "magnitude": "#E69F00", "taylor": "#009E73",
    "attention": "#0072B2", "feed_forward": "#E69F00", "modulation": "#009E73",
    "published": "#D55E00", "closed form": "#0072B2",
}  # fmt: skip


def style() -> None:
    """Set the book's figure style; call it once, in a chapter's first cell."""
    sns.set_theme(
        context="notebook",
        style="whitegrid",
        palette=PALETTE,
        rc={
            "figure.figsize": (7.0, 3.2),
            "figure.constrained_layout.use": True,
            "figure.facecolor": "white",
            "axes.prop_cycle": cycler(color=PALETTE, linestyle=DASHES),
            "axes.edgecolor": "0.3",
            "axes.titlesize": "medium",
            "grid.color": "0.9",
            "legend.frameon": False,
            "legend.fontsize": "small",
            "lines.linewidth": 1.8,
            "svg.hashsalt": "ecodiff",
        },
    )
    try:  # sharp on dense screens; there is nothing to set outside of a notebook
        from matplotlib_inline.backend_inline import set_matplotlib_formats

        set_matplotlib_formats("retina")
    except (ImportError, AttributeError):
        pass


def panels(columns: int = 1, rows: int = 1, width: float = 7.0, height: float = 3.2, **options):
    """A figure and the flat list of its axes: `rows` times `columns` panels, lettered (a), (b), ... if several.

    `height` is that of a row; sizes are in inches.
    """
    figure, axes = plt.subplots(rows, columns, figsize=(width, height * rows), squeeze=False, **options)
    axes = list(axes.flat)
    if len(axes) > 1:
        for letter, axis in zip("abcdefghijklmnopqrstuvwxyz", axes, strict=False):
            axis.set_title(f"({letter})", loc="left")
    return figure, axes


def legend_below(figure, *axes, columns: int = 4) -> None:
    """Put one legend under the panels, where it lies on no data.

    It has the labels of `axes`, or else of the first panel, each once.
    """
    handles_by_label = {}
    for axis in axes or figure.axes[:1]:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles_by_label.setdefault(label, handle)
    figure.legend(handles_by_label.values(), handles_by_label.keys(), loc="outside lower center", ncols=columns)


def picture_grid(pictures, rows: Sequence[str] = (), columns: Sequence[str] = (), size: float = 0.9):
    """A figure of images in rows and columns, with a name for each row and column.

    pictures: uint8, [rows, columns, 3, height, width] (as `ecodiff.generate` stacks them), or a list of rows, which may
    differ in size. Of videos, [rows, columns, frames, 3, height, width], the first frame is shown.
    """
    pictures = [np.asarray(row) for row in pictures]
    count_rows, count_columns = len(pictures), len(pictures[0])
    room = (size * count_columns + 1.0, size * count_rows + 0.3)  # with some for the names
    figure, axes = plt.subplots(count_rows, count_columns, figsize=room, squeeze=False)
    for i in range(count_rows):
        for j in range(count_columns):
            axis = axes[i, j]
            image = pictures[i][j]
            if image.ndim == 4:
                image = image[0]
            axis.imshow(image.transpose(1, 2, 0), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            sns.despine(ax=axis, left=True, bottom=True)
            if i == 0 and columns:
                axis.set_title(columns[j], fontsize="small")
            if j == 0 and rows:
                axis.set_ylabel(rows[i], rotation=0, ha="right", va="center", fontsize="small")
    return figure


def table(rows: Sequence[Mapping[str, object]], caption: str, name: str) -> None:
    """Show rows as a numbered table that `{numref}` can name; numbers are shown as the strings they are given as.

    An interval "(a to b)" stays on one line: narrow columns break before it. "learned+compensation" may break after +.
    """
    from IPython.display import Markdown, display

    rules = []
    for head in rows[0]:
        numbers = all(_is_number(row[head]) for row in rows)
        rules.append("---:" if numbers else "---")  # numbers are set flush right
    lines = [list(rows[0]), rules]
    for row in rows:
        lines.append([row[head] for head in rows[0]])
    body = []
    for line in lines:
        body.append("| " + " | ".join(_cell(entry) for entry in line) + " |")
    display(Markdown("\n".join([f":::{{table}} {caption}", f":name: {name}", "", *body, ":::"])))


def note(text: str) -> None:
    """Show a text as Markdown; nothing for an empty one, which a page would show as the object that it is."""
    from IPython.display import Markdown, display

    if text:
        display(Markdown(text))


def _cell(entry: object) -> str:
    text = str(entry).replace("|", r"\|")
    text = re.sub(r"\((\S+) to (\S+)\)", "(\\1\u00a0to\u00a0\\2)", text)  # spaces at which no line breaks
    return re.sub(r"(?<=[a-z]\+)(?=[a-z])", "\u200b", text)  # a place without width at which a line may break


def _is_number(entry: object) -> bool:
    """Whether an entry is a number as tables show it: with a true minus sign, ∞, or per cent."""
    text = str(entry).replace("−", "-").replace("∞", "inf").rstrip(" %")
    try:
        float(text)
    except ValueError:
        return False
    return True


def publish(**numbers) -> None:
    """Make numbers usable in the text, of this page or another, as ``{glue:text}`name:.2f```."""
    try:
        from myst_nb import glue
    except ImportError:  # Colab, where the page is not built
        return
    for name, value in numbers.items():
        if hasattr(value, "item"):  # glue keeps the repr of a value, and that of a tensor is no number
            value = value.item()
        glue(name.replace("_", "-"), value, display=False)
