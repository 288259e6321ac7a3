"""The schematics of the book as SVG, each for light and for dark pages.

``python -m ecodiff book schematics`` writes book/_static/schematics/NAME-light.svg and NAME-dark.svg

A page shows one of the two by the theme's classes ``only-light`` and ``only-dark``: a file that is shown as an image
does not see which theme the reader has chosen. Text stays text, in the reader's fonts. Images are 600 units wide, so
that letters of 19.5 units have 11 pixels on a phone, where a figure is 342 pixels wide.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from ecodiff.method.hard_concrete import HardConcrete
from ecodiff.storage.files import write_whole
from ecodiff.storage.paths import root

from .plotting import COLOURS, PALETTE

WIDTH = 600
SIZE, INDEX_SIZE, LINE = 19.5, 15.5, 25  # letters, indices and the distance of lines
DASHES = {False: "", True: ' stroke-dasharray="6 5"'}

# What has a colour in the figures has the same one here.
ROLES = {
    "attention": COLOURS["attention"],
    "feed_forward": COLOURS["feed_forward"],
    "modulation": COLOURS["modulation"],
    "magnitude": COLOURS["magnitude"],
    "taylor": COLOURS["taylor"],
    "learned": COLOURS["learned"],
    "gate": PALETTE[6],
    "gradient": PALETTE[4],
    "plain": "#808080",
}


@dataclass(frozen=True)
class Theme:
    """The page's colours, by which those of a drawing are chosen so that they can be told from the ground."""

    name: str
    ground: str
    ink: str
    tint: float  # share of a role's colour in the fill of a box
    strong_tint: float  # the same in a fill that stands out
    edge: float  # contrast of lines with the ground; the accessibility guidelines ask 3 to 1 at least

    def line(self, role: str) -> str:
        """The colour of lines and edges."""
        return self._against_ground(ROLES.get(role, self.ink), self.edge)

    def word(self, role: str) -> str:
        """The colour of words: 4.5 to 1 against the ground at least, as the guidelines ask."""
        return self._against_ground(ROLES.get(role, self.ink), 4.5)

    def fill(self, role: str) -> str:
        return mixed(ROLES[role], self.ground, self.tint)

    def strong(self, role: str) -> str:
        """A fill that stands out from `fill`, on which words are still read."""
        return mixed(ROLES[role], self.ground, self.strong_tint)

    def _against_ground(self, colour: str, wanted: float) -> str:
        share = 1.0
        while contrast(mixed(colour, self.ink, share), self.ground) < wanted:
            share -= 0.05
        return mixed(colour, self.ink, share)


LIGHT = Theme("light", "#ffffff", "#222832", 0.16, 0.4, 3.0)
DARK = Theme("dark", "#121212", "#ced6dd", 0.24, 0.42, 4.5)
THEMES = (LIGHT, DARK)


def mixed(colour: str, other: str, share: float) -> str:
    """``share`` of one colour and the rest of the other, as "#rrggbb"."""
    pairs = zip(_channels(colour), _channels(other), strict=True)
    return "#" + "".join(f"{round(share * a + (1 - share) * b):02x}" for a, b in pairs)


def contrast(colour: str, other: str) -> float:
    """How far two colours differ in luminance, 1 to 21 (Web Content Accessibility Guidelines 2)."""
    lighter, darker = sorted((_luminance(colour), _luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def _channels(colour: str) -> list[int]:
    return [int(colour[start : start + 2], 16) for start in (1, 3, 5)]


def _luminance(colour: str) -> float:
    linear = []
    for channel in _channels(colour):
        value = channel / 255
        if value <= 0.04045:
            linear.append(value / 12.92)
        else:
            linear.append(((value + 0.055) / 1.055) ** 2.4)
    red, green, blue = linear
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


class Drawing:
    """A list of SVG elements in one theme. Points are measured from the left upper corner, y grows downwards.

    Words may hold ``*italic*``, ``**bold**``, `` `code` ``, ``_{index}`` and ``^{raised}``.
    """

    def __init__(self, title: str, height: int, theme: Theme):
        self.title, self.height, self.theme = title, height, theme
        self.elements: list[str] = []

    def text(self, x: float, y: float, words: str, anchor: str = "middle", role: str = "ink") -> None:
        """One line of words with its middle at the height ``y``; ``anchor`` is "start", "middle" or "end"."""
        colour = self.theme.word(role)
        baseline = y + 0.36 * SIZE
        self._add(f'<text x="{x:g}" y="{baseline:g}" text-anchor="{anchor}" fill="{colour}">{_spans(words)}</text>')

    def lines(self, x: float, y: float, *lines: str, anchor: str = "middle", role: str = "ink") -> None:
        """Lines below each other, the middle of the first at the height ``y``."""
        for i, words in enumerate(lines):
            self.text(x, y + i * LINE, words, anchor, role)

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        *lines: str,
        role: str = "plain",
        look: str = "filled",
    ) -> None:
        """A rectangle with lines of words in its middle.

        ``look`` is "filled", "strong" for what stands out, "empty", or "gone", which has a dashed edge and no fill.
        """
        fills = {"filled": self.theme.fill(role), "strong": self.theme.strong(role)}
        fill, dashes = fills.get(look, "none"), DASHES[look == "gone"]
        self._add(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6" fill="{fill}" '
            f'stroke="{self.theme.line(role)}" stroke-width="2"{dashes}/>'
        )
        first = y + height / 2 - (len(lines) - 1) * LINE / 2
        self.lines(x + width / 2, first, *lines)

    def band(self, x: float, y: float, width: float, height: float, role: str) -> None:
        """A filled rectangle without an edge: a part of a matrix."""
        fill = self.theme.line(role)
        self._add(f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}"/>')

    def line(self, *points: tuple[float, float], role: str = "ink", dashed: bool = False, width: float = 2) -> None:
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        dashes, colour = DASHES[dashed], self.theme.line(role)
        self._add(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width:g}"{dashes}/>')

    def arrow(self, *points: tuple[float, float], role: str = "ink", dashed: bool = False) -> None:
        """A line through the points with a head at the last one."""
        (x0, y0), (x, y) = points[-2:]
        length = math.hypot(x - x0, y - y0)
        dx, dy = (x - x0) / length, (y - y0) / length
        neck = (x - 10 * dx, y - 10 * dy)  # the line ends inside the head, so that its own end is not seen
        self.line(*points[:-1], neck, role=role, dashed=dashed)
        back = (x - 13 * dx, y - 13 * dy)
        corners = [(x, y), (back[0] - 6 * dy, back[1] + 6 * dx), (back[0] + 6 * dy, back[1] - 6 * dx)]
        path = " ".join(f"{round(px, 2):g},{round(py, 2):g}" for px, py in corners)
        self._add(f'<polygon points="{path}" fill="{self.theme.line(role)}"/>')

    def node(self, x: float, y: float, sign: str, role: str = "plain", radius: float = 20) -> None:
        """A circle with a sign in it: a gate or an operation."""
        fill, edge = self.theme.fill(role), self.theme.line(role)
        self._add(f'<circle cx="{x:g}" cy="{y:g}" r="{radius:g}" fill="{fill}" stroke="{edge}" stroke-width="2"/>')
        self.text(x, y, sign)

    def dot(self, x: float, y: float, role: str, hollow: bool = False) -> None:
        edge = self.theme.line(role)
        fill = edge
        if hollow:
            fill = self.theme.ground
        self._add(f'<circle cx="{round(x, 1):g}" cy="{y:g}" r="6" fill="{fill}" stroke="{edge}" stroke-width="2.5"/>')

    def svg(self) -> str:
        """The whole file. It has no ground of its own, so that the page's is seen."""
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{self.height}" '
            f'viewBox="0 0 {WIDTH} {self.height}" role="img" '
            f'font-family="system-ui, sans-serif" font-size="{SIZE}">'
        )
        return "\n".join([head, f"<title>{escape(self.title)}</title>", *self.elements, "</svg>", ""])

    def _add(self, element: str) -> None:
        self.elements.append(element)


_MARKED = re.compile(r"(\*\*.+?\*\*|\*.+?\*|`.+?`|_\{.+?\}|\^\{.+?\})")


def _spans(words: str) -> str:
    """Words with their marks as elements of an SVG text."""
    spans, shift = [], 0
    for part in _MARKED.split(words):
        if not part:
            continue
        style, wanted = "", 0
        if part.startswith("**"):
            part, style = part[2:-2], ' font-weight="600"'
        elif part.startswith("*"):
            part, style = part[1:-1], ' font-style="italic"'
        elif part.startswith("`"):
            part, style = part[1:-1], ' font-family="ui-monospace, monospace"'
        elif part.startswith(("_{", "^{")):
            wanted = {"_": 5, "^": -7}[part[0]]
            part, style = part[2:-1], f' font-size="{INDEX_SIZE}"'
            if part.isalpha():  # indices that are letters are variables too
                style += ' font-style="italic"'
        if wanted != shift:
            # A shift holds for all that follows it, so the next part has to take it back.
            style += f' dy="{wanted - shift}"'
        shift = wanted
        part = escape(part)
        if style:
            part = f"<tspan{style}>{part}</tspan>"
        spans.append(part)
    return "".join(spans)


def gated_head(theme: Theme) -> Drawing:
    drawing = Drawing("Attention with a gate after each head", 570, theme)
    drawing.box(200, 15, 200, 42, "tokens *x*")
    drawing.line((300, 57), (300, 78))
    drawing.line((105, 78), (490, 78))
    drawing.text(382, 145, "…")
    drawing.text(382, 350, "…")
    for x, head, name, value in ((105, "1", "1", "1"), (275, "2", "2", "0"), (490, "h", "*h*", "0.7")):
        role, look = "ink", "filled"
        closed = value == "0"
        if closed:
            role, look = "plain", "gone"
        heads = (f"**head** {name}", f"*Q*_{{{head}}} *K*_{{{head}}} *V*_{{{head}}}", f"gives *a*_{{{head}}}")
        drawing.arrow((x, 78), (x, 100))
        drawing.box(x - 75, 100, 150, 90, *heads, role="attention")
        drawing.arrow((x, 190), (x, 230))
        drawing.node(x, 250, "×", "gate")
        drawing.text(x + 28, 250, f"*z*_{{{head}}} = {value}", "start", "gate")
        drawing.arrow((x, 270), (x, 320), role=role, dashed=closed)
        drawing.box(x - 75, 320, 150, 60, f"*W*^{{o}}_{{{head}}}", role="attention", look=look)
        drawing.line((x, 380), (x, 405), role=role, dashed=closed)
    drawing.line((105, 405), (490, 405))
    drawing.arrow((300, 405), (300, 435))
    drawing.node(300, 455, "Σ")
    drawing.text(265, 455, "`to_out[0]`", "end")
    drawing.text(335, 455, "plus the bias *b*^{o}", "start")
    drawing.arrow((300, 475), (300, 510))
    drawing.box(200, 510, 200, 42, "output")
    return drawing


def gated_neuron(theme: Theme) -> Drawing:
    drawing = Drawing("A neuron of a GEGLU feed-forward with its gate", 650, theme)
    drawing.box(200, 15, 200, 42, "tokens *x*")
    drawing.line((300, 57), (300, 78))
    drawing.line((150, 78), (450, 78))
    drawing.arrow((150, 78), (150, 100))
    drawing.arrow((450, 78), (450, 100))
    drawing.box(35, 100, 230, 72, "column *j* of *W*_{v}", "(*xW*_{v} + *b*_{v})_{j}", role="feed_forward")
    drawing.box(335, 100, 230, 72, "column *j* of *W*_{g}", "GELU(*xW*_{g} + *b*_{g})_{j}", role="feed_forward")
    drawing.text(300, 196, "`net.0.proj`")
    drawing.arrow((150, 172), (150, 235), (280, 235))
    drawing.arrow((450, 172), (450, 235), (320, 235))
    drawing.node(300, 235, "×")
    drawing.arrow((300, 255), (300, 310))
    drawing.text(318, 278, "neuron *g*_{j}", "start")
    drawing.node(300, 330, "×", "gate")
    drawing.text(335, 330, "gate *z*_{j}", "start", "gate")
    drawing.arrow((300, 350), (300, 390))
    drawing.box(195, 390, 210, 50, "row *j* of *W*_{2}", role="feed_forward")
    drawing.text(425, 415, "`net.2`", "start")
    drawing.arrow((300, 440), (300, 495))
    drawing.node(300, 515, "Σ")
    drawing.lines(95, 503, "neurons", "before *j*")
    drawing.arrow((160, 515), (280, 515), role="plain", dashed=True)
    drawing.lines(505, 503, "neurons", "after *j*")
    drawing.arrow((440, 515), (320, 515), role="plain", dashed=True)
    drawing.arrow((300, 535), (300, 590))
    drawing.text(318, 560, "plus the bias *b*_{2}", "start")
    drawing.box(200, 590, 200, 42, "output")
    return drawing


def what_is_cut(theme: Theme) -> Drawing:
    drawing = Drawing("Rows and columns of weight matrices that go with a unit", 640, theme)
    drawing.text(20, 25, "**head** *i* **of an attention**", "start")
    for layer, x in {"to_q": 20, "to_k": 150, "to_v": 280}.items():
        _matrix(drawing, x, 50, 105, 120, "attention", rows=[(46, 26)], bias=False)
        drawing.text(x + 52, 192, f"`{layer}`")
    drawing.arrow((400, 110), (445, 110))
    _matrix(drawing, 455, 50, 110, 120, "attention", columns=[(42, 24)])
    drawing.text(515, 192, "`to_out[0]`")
    drawing.text(202, 226, "the rows of head *i*")
    drawing.text(515, 226, "its columns")

    drawing.line((20, 258), (580, 258), role="plain", width=1)
    drawing.text(20, 290, "**neuron** *j* **of a GEGLU feed-forward**", "start")
    _matrix(drawing, 20, 318, 190, 200, "feed_forward", rows=[(44, 8), (144, 8)])
    drawing.line((20, 418), (210, 418), role="feed_forward", dashed=True)
    drawing.text(115, 387, "values")
    drawing.text(115, 495, "GELU")
    drawing.text(125, 540, "`net.0.proj`")
    drawing.arrow((250, 418), (340, 418))
    _matrix(drawing, 355, 368, 200, 100, "feed_forward", columns=[(88, 8)])
    drawing.text(465, 540, "`net.2`")
    drawing.text(125, 574, "row *j* of both halves")
    drawing.text(285, 350, "bias", "start")
    drawing.arrow((280, 350), (244, 350), role="plain")
    drawing.text(465, 574, "its column *j*")
    drawing.text(300, 616, "Weights are stored as [out, in].")
    return drawing


def _matrix(drawing: Drawing, x, y, width, height, role: str, rows=(), columns=(), bias: bool = True) -> None:
    """A weight matrix with its bias beside it; ``rows`` and ``columns`` are (start, size) of the parts that go.

    The bias of a layer has one entry for each row, so it loses rows and no columns.
    """
    drawing.box(x, y, width, height, role=role)
    if bias:
        drawing.box(x + width + 8, y, 12, height, role=role)
    for start, size in rows:
        drawing.band(x, y + start, width, size, role)
        if bias:
            drawing.band(x + width + 8, y + start, 12, size, role)
    for start, size in columns:
        drawing.band(x + start, y, size, height, role)


def checkpoints(theme: Theme) -> Drawing:
    drawing = Drawing("The unrolled sampler with time-step checkpointing", 720, theme)
    drawing.box(20, 15, 560, 42, "λ  →  gates *z*, the same ones in both passes", role="gate")
    drawing.text(165, 88, "**forward**")
    drawing.text(430, 88, "**backward**")
    left, right, high = 165, 430, 150
    for i, step in enumerate((3, 2, 1)):
        y = 105 + i * high
        _kept_latents(drawing, left, y, f"*ẑ*_{{{step}}}")
        drawing.arrow((left, y + 40), (left, y + 65))
        drawing.box(85, y + 65, 160, 60, f"step {step}", "keeps nothing", look="gone")
        drawing.arrow((left, y + 125), (left, y + high))
        drawing.arrow((35, y + 95), (85, y + 95), role="gate")
    drawing.line((35, 57), (35, 105 + 2 * high + 95), role="gate")
    end = 105 + 3 * high
    _kept_latents(drawing, left, end, "*ẑ*_{0}")
    drawing.arrow((left, end + 40), (left, end + 80))
    drawing.box(45, end + 80, 510, 70, "loss: the distance of *ẑ*_{0} from the *z*_{0}", "of the model without gates")

    # The moment that is drawn: the last step is done, the one before it is in memory, the first has not begun.
    first, second, last = (155 + i * high for i in range(3))
    drawing.box(345, first, 170, 90, "step 3", "waits", look="gone")
    drawing.box(345, second, 170, 90, "step 2", "recomputed,", "in memory now", role="gradient", look="strong")
    drawing.box(345, last, 170, 90, "step 1", "done, freed", look="gone")
    drawing.arrow((left + 60, second - 30), (300, second - 30), (300, second + 45), (345, second + 45))
    drawing.arrow((right, last), (right, second + 90), role="gradient")
    drawing.text(right + 12, last - 30, "*g*", "start", "gradient")
    drawing.arrow((right, second), (right, first + 90), role="gradient", dashed=True)
    drawing.line((515, first + 45), (565, first + 45), role="plain", dashed=True)
    drawing.line((515, second + 45), (565, second + 45), role="gradient")
    drawing.line((515, last + 45), (565, last + 45), role="gradient")
    drawing.arrow((right, end + 80), (right, last + 90), role="gradient")
    drawing.arrow((565, last + 45), (565, 57), role="gradient")
    drawing.text(552, 88, "*G*", "end", "gradient")
    return drawing


def _kept_latents(drawing: Drawing, x: float, y: float, name: str) -> None:
    drawing.box(x - 60, y, 120, 40, f"{name} kept", role="learned", look="strong")


def hard_concrete(theme: Theme) -> Drawing:
    drawing = Drawing("A hard concrete gate: drawn, stretched, clipped, and later a threshold", 585, theme)
    distribution, draws = HardConcrete(delta=0.0), 16
    smooth = []
    for k in range(draws):  # evenly spread u, so that the drawing is no matter of luck; λ = 0
        u = (k + 0.5) / draws
        smooth.append(1 / (1 + math.exp(-math.log(u / (1 - u)) / distribution.temperature)))
    width = distribution.zeta - distribution.gamma
    stretched = [s * width + distribution.gamma for s in smooth]
    gates = [min(1.0, max(0.0, s)) for s in stretched]
    clipped = [gate in (0.0, 1.0) for gate in gates]

    drawing.text(20, 25, "**draw** *s* = σ((λ + *n*) / α) with noise *n*", "start")
    _draws(drawing, 70, "*s*", smooth, clipped, {"0": 0, "1": 1})
    drawing.text(20, 155, "**stretch** it a little beyond 0 and 1", "start")
    ends = {"γ": distribution.gamma, "0": 0, "1": 1, "ζ": distribution.zeta}
    _draws(drawing, 200, "*s̄*", stretched, clipped, ends)
    drawing.text(20, 285, "**clip** it: some gates are exactly 0 or 1", "start")
    _draws(drawing, 345, "*z*", gates, clipped, {"0": 0, "1": 1})

    drawing.line((20, 400), (580, 400), role="plain", width=1)
    drawing.text(20, 435, "**threshold**, after learning: keep if λ > τ", "start")
    _axis(drawing, 510, "λ")
    for x in (70, 95, 150, 180):
        drawing.dot(x, 510, "plain", hollow=True)
    for x in (270, 300, 350, 372, 402, 440, 478, 500, 520):
        drawing.dot(x, 510, "learned")
    drawing.line((225, 475), (225, 528), role="gradient", width=3)
    drawing.text(225, 550, "τ", role="gradient")
    drawing.text(125, 550, "removed")
    drawing.text(400, 550, "kept")
    return drawing


def _axis(drawing: Drawing, y: float, name: str) -> None:
    drawing.line((40, y), (550, y), role="plain")
    drawing.text(572, y, name)


def _draws(drawing: Drawing, y: float, name: str, values, clipped, ticks: dict[str, float]) -> None:
    """Values on an axis from γ to ζ, those that are ``clipped`` in the end hollow; equal ones above each other."""

    def place(value: float) -> float:
        return 110 + 370 * value

    _axis(drawing, y, name)
    for tick, value in ticks.items():
        drawing.line((place(value), y - 9), (place(value), y + 9), role="plain")
        drawing.text(place(value), y + 26, tick)
    for i, value in enumerate(values):
        height = 17 * values[:i].count(value)
        drawing.dot(place(value), y - height, "gate", hollow=clipped[i])


# What is looked at, and who looks there: from the widest view to the narrowest.
VIEWS = (
    ("learned", "final latents *z*_{0}, after all *T* steps", "learned, Gauss-Newton, occlusion"),
    ("taylor", "the denoising loss, step by step", "Taylor, Diff-Pruning, Fisher"),
    ("plain", "the error of the layer that reads the unit", "OBS"),
    ("plain", "that layer’s weights × activations", "WANDA"),
    ("magnitude", "the unit’s weights", "magnitude"),
)


def what_scores_see(theme: Theme) -> Drawing:
    drawing = Drawing("What each importance score sees", 590, theme)
    bottom, top = 520, 15
    for i, (role, what, scores) in enumerate(VIEWS):
        x = 15 + 22 * i
        drawing.box(x, top, WIDTH - 2 * x, bottom - top, role=role)
        drawing.lines(x + 18, top + 26, what, f"**{scores}**", anchor="start")
        top, bottom = top + 80, bottom - 18
    drawing.text(300, 560, "**random** looks at nothing")
    return drawing


@dataclass(frozen=True)
class Part:
    """A part of SDXL's U-Net: transformer blocks, each with two attentions of ``heads`` and one feed-forward."""

    name: str
    size: int  # latents on a side, for images of 1024 by 1024 pixels
    channels: int
    blocks: int
    heads: int = 0
    neurons: int = 0


DOWN = (
    Part("down_blocks.0", 128, 320, 0),
    Part("down_blocks.1", 64, 640, 4, 10, 2560),
    Part("down_blocks.2", 32, 1280, 20, 20, 5120),
)
MIDDLE = Part("mid_block", 32, 1280, 10, 20, 5120)
UP = (
    Part("up_blocks.2", 128, 320, 0),
    Part("up_blocks.1", 64, 640, 6, 10, 2560),
    Part("up_blocks.0", 32, 1280, 30, 20, 5120),
)


def sdxl_unet(theme: Theme) -> Drawing:
    drawing = Drawing("The U-Net of SDXL and its sites", 920, theme)
    drawing.text(145, 25, "noisy latents *z*_{t}")
    drawing.text(455, 25, "predicted noise")
    for i, (down, up) in enumerate(zip(DOWN, UP, strict=True)):
        y = 65 + 175 * i
        _part(drawing, 20, y, down)
        _part(drawing, 330, y, up)
        drawing.arrow((270, y + 70), (330, y + 70), role="plain", dashed=True)
        gap = 35 if i else 24
        drawing.arrow((145, y - gap), (145, y))
        drawing.arrow((455, y), (455, y - gap))
    y = 65 + 175 * 3
    drawing.line((145, y - 35), (145, y + 70))
    drawing.arrow((145, y + 70), (175, y + 70))
    _part(drawing, 175, y, MIDDLE)
    drawing.line((425, y + 70), (455, y + 70))
    drawing.arrow((455, y + 70), (455, y - 35))

    y = 770
    drawing.text(20, y, "**one transformer block has three sites**", "start")
    for x, name, what, role in (
        (20, "attn1", "self-attention", "attention"),
        (213, "attn2", "cross-attention", "attention"),
        (406, "ff", "GEGLU", "feed_forward"),
    ):
        drawing.box(x, y + 25, 174, 70, f"`{name}`", what, role=role)
        if x > 20:
            drawing.arrow((x - 19, y + 60), (x, y + 60))
    drawing.text(300, y + 125, "Dashed arrows are skip connections.")
    return drawing


def _part(drawing: Drawing, x: float, y: float, part: Part) -> None:
    size = f"{part.size} × {part.size}, {part.channels:,} wide"
    if not part.blocks:
        drawing.box(x, y, 250, 140, f"`{part.name}`", size, "convolutions only,", "no sites")
        return
    drawing.box(
        x, y, 250, 140,
        f"`{part.name}`", size, f"{part.blocks} transformer blocks",
        f"{2 * part.blocks * part.heads:,} heads", f"{part.blocks * part.neurons:,} neurons",
        role="attention",
    )  # fmt: skip


# The transformer of FLUX.1: blocks of each kind, units of a site, and channels of the modulation of one stream.
FLUX_DOUBLE, FLUX_SINGLE = 19, 38
FLUX_HEADS, FLUX_NEURONS = 24, 12_288
FLUX_MODULATION = {"double": 18_432, "single": 9_216}


def flux_transformer(theme: Theme) -> Drawing:
    drawing = Drawing("The transformer of FLUX and its sites", 985, theme)
    drawing.box(10, 50, 580, 420, look="empty")
    drawing.text(300, 24, f"**double block**, {FLUX_DOUBLE} times")
    streams = (
        (155, "image", "norm1", "to_out[0]", "ff"),
        (445, "text", "norm1_context", "to_add_out", "ff_context"),
    )
    for x, stream, norm, output, ff in streams:
        drawing.text(x, 78, f"{stream} tokens")
        drawing.arrow((x, 92), (x, 115))
        drawing.box(x - 120, 115, 240, 66, f"`{norm}`", f"{FLUX_MODULATION['double']:,} channels", role="modulation")
        drawing.arrow((x, 181), (x, 210))
        drawing.arrow((x, 276), (x, 305))
        drawing.box(x - 120, 305, 240, 46, f"`{output}` reads", role="attention", look="empty")
        drawing.arrow((x, 351), (x, 380))
        drawing.box(x - 120, 380, 240, 66, f"`{ff}`", f"{FLUX_NEURONS:,} neurons", role="feed_forward")
        drawing.line((x, 446), (x, 495))
    drawing.box(
        35, 210, 530, 66, "`attn`: both streams together", f"{FLUX_HEADS} heads, one gate each", role="attention"
    )

    drawing.line((155, 495), (445, 495))
    drawing.arrow((300, 495), (300, 530))
    drawing.text(300, 553, f"**single block**, {FLUX_SINGLE} times: both in one sequence")
    drawing.box(10, 578, 580, 338, look="empty")
    drawing.arrow((300, 578), (300, 605))
    drawing.box(180, 605, 240, 66, "`norm`", f"{FLUX_MODULATION['single']:,} channels", role="modulation")
    drawing.line((300, 671), (300, 690))
    drawing.line((155, 690), (445, 690))
    drawing.arrow((155, 690), (155, 712))
    drawing.arrow((445, 690), (445, 712))
    drawing.box(35, 712, 240, 66, "`attn`", f"{FLUX_HEADS} heads", role="attention")
    drawing.box(325, 712, 240, 66, "`proj_mlp`", f"{FLUX_NEURONS:,} neurons", role="feed_forward")
    drawing.arrow((155, 778), (155, 808))
    drawing.arrow((445, 778), (445, 808))
    drawing.box(35, 808, 265, 60, "columns of heads", role="attention", look="empty")
    drawing.box(300, 808, 265, 60, "columns of neurons", role="feed_forward", look="empty")
    drawing.text(300, 890, "`proj_out` reads both")
    drawing.arrow((300, 916), (300, 946))
    drawing.text(300, 964, "tokens of the next block")
    return drawing


def masked_or_removed(theme: Theme) -> Drawing:
    drawing = Drawing("A masked model and a smaller one", 640, theme)
    keep = (True, False, True, True, False)
    drawing.text(145, 25, "**masked**")
    drawing.text(455, 25, "**removed**")
    drawing.text(145, 55, "all heads run")
    drawing.text(455, 55, "three heads run")
    for i, kept in enumerate(keep):
        x = 30 + 46 * i
        drawing.box(x, 80, 46, 46, f"*a*_{{{i + 1}}}", role="attention")
        drawing.arrow((x + 23, 126), (x + 23, 160))
        drawing.node(x + 23, 180, str(int(kept)), "gate")
        if kept:
            drawing.arrow((x + 23, 200), (x + 23, 240))
            drawing.box(x, 240, 46, 110, role="attention")
        else:
            drawing.arrow((x + 23, 200), (x + 23, 240), role="plain", dashed=True)
            drawing.box(x, 240, 46, 110)
    drawing.text(145, 375, "`to_out[0]`, all columns")
    left = [i for i, kept in enumerate(keep) if kept]
    for k, i in enumerate(left):
        x = 386 + 46 * k
        drawing.box(x, 80, 46, 46, f"*a*_{{{i + 1}}}", role="attention")
        drawing.arrow((x + 23, 126), (x + 23, 240))
        drawing.box(x, 240, 46, 110, role="attention")
    drawing.text(455, 375, "`to_out[0]`, three columns")
    drawing.arrow((145, 392), (145, 430))
    drawing.arrow((455, 392), (455, 430))
    drawing.box(30, 430, 540, 50, "the same output, up to rounding")
    drawing.lines(145, 512, "hooks multiply by 0;", "no weight is changed", "and no time is saved")
    drawing.lines(455, 512, "smaller matrices,", "fewer operations,", "an ordinary pipeline")
    drawing.text(300, 612, "With no head left, both give the bias *b*^{o} alone.")
    return drawing


def data_flow(theme: Theme) -> Drawing:
    drawing = Drawing("From a pipeline to a smaller one, and from rows to claims", 1060, theme)
    drawing.text(20, 25, "**the library**", "start")
    steps = (
        ("`ecodiff.load`", "a pipeline"),
        ("`ecodiff.learn`", "gates: a λ for each unit"),
        ("`gates.mask`", "units to keep"),
        ("`ecodiff.prune`", "a smaller pipeline"),
        ("`save_pretrained`", "`ecodiff.load`"),
        ("`ecodiff.generate`", "images"),
    )
    for i, lines in enumerate(steps):
        y = 50 + 95 * i
        drawing.box(20, y, 290, 66, *lines, role="learned")
        if i:
            drawing.arrow((165, y - 29), (165, y))
    drawing.box(350, 145, 230, 66, "`ecodiff.scores`", "all other scores", role="learned")
    drawing.arrow((310, 83), (465, 83), (465, 145))
    drawing.arrow((465, 211), (465, 273), (310, 273))
    drawing.text(400, 256, "`make_mask`")

    drawing.line((20, 635), (580, 635), role="plain", width=1)
    drawing.text(20, 665, "**the book**", "start")
    drawing.arrow((165, 591), (165, 690))
    drawing.box(20, 690, 290, 66, "studies and benchmarks", "measure")
    drawing.box(350, 690, 230, 66, "`ecodiff.cost`", "counts")
    drawing.arrow((165, 756), (165, 790))
    drawing.box(20, 790, 290, 92, "rows: `data/results`", "found by the hash of", "their configuration")
    drawing.box(350, 790, 230, 92, "the paper’s", "printed numbers")
    drawing.arrow((90, 882), (90, 960))
    drawing.arrow((240, 882), (240, 920), (400, 920), (400, 960))
    drawing.arrow((470, 882), (470, 960))
    drawing.arrow((580, 723), (592, 723), (592, 920), (550, 920), (550, 960))
    drawing.box(20, 960, 180, 80, "chapters:", "text and cells", look="strong")
    drawing.box(350, 960, 230, 80, "claims: functions", "that give verdicts", look="strong")
    drawing.arrow((350, 1000), (200, 1000))
    return drawing


SCHEMATICS: dict[str, Callable[[Theme], Drawing]] = {
    "gated-head": gated_head,
    "gated-neuron": gated_neuron,
    "what-is-cut": what_is_cut,
    "checkpoints": checkpoints,
    "hard-concrete": hard_concrete,
    "what-scores-see": what_scores_see,
    "sdxl-unet": sdxl_unet,
    "flux-transformer": flux_transformer,
    "masked-or-removed": masked_or_removed,
    "data-flow": data_flow,
}


def made(names: Sequence[str] = tuple(SCHEMATICS)) -> dict[str, str]:
    """{file name: its text} of these schematics in both themes."""
    files = {}
    for name in names:
        for theme in THEMES:
            files[f"{name}-{theme.name}.svg"] = SCHEMATICS[name](theme).svg()
    return files


def folder() -> Path:
    """Where the files lie."""
    return root() / "book" / "_static" / "schematics"


def write() -> list[Path]:
    """Write the files anew and return their paths."""
    folder().mkdir(parents=True, exist_ok=True)
    paths = []
    for name, text in made().items():
        write_whole(folder() / name, text.encode())
        paths.append(folder() / name)
    return paths
