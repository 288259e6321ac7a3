"""The committed schematics are what the code draws, their words can be read, and their numbers are counted."""

import re
from collections import Counter
from itertools import combinations
from xml.etree import ElementTree

import pytest
import torch
from matplotlib import get_data_path
from matplotlib.ft2font import FT2Font

from ecodiff.cost.presets import preset
from ecodiff.lab.book import schematics
from ecodiff.method.sites import find_sites

SVG = "{http://www.w3.org/2000/svg}"
PHONE = 342  # pixels of a figure on a phone of 390 pixels


@pytest.fixture(scope="module")
def files():
    return schematics.made()


def test_the_committed_files_are_what_the_code_draws(files):
    """After a change: `python -m ecodiff book schematics`."""
    committed = {path.name: path.read_text(encoding="utf-8") for path in schematics.folder().iterdir()}
    assert committed == files


def test_both_themes_have_the_same_drawing(files):
    """Only colours differ."""
    for name in schematics.SCHEMATICS:
        light, dark = (re.sub("#[0-9a-f]{6}", "", files[f"{name}-{theme}.svg"]) for theme in ("light", "dark"))
        assert light == dark


@pytest.mark.parametrize("theme", schematics.THEMES, ids=lambda theme: theme.name)
def test_colours_can_be_told_from_what_they_lie_on(theme):
    for role in schematics.ROLES:
        assert schematics.contrast(theme.line(role), theme.ground) >= 3
        assert schematics.contrast(theme.word(role), theme.ground) >= 4.5
        for fill in (theme.fill(role), theme.strong(role)):
            assert schematics.contrast(theme.ink, fill) >= 4.5


@pytest.mark.parametrize("name", schematics.SCHEMATICS)
def test_words_are_large_enough_and_lie_beside_each_other(name, files):
    image = ElementTree.fromstring(files[f"{name}-light.svg"])
    width, height = float(image.get("width")), float(image.get("height"))
    assert float(image.get("font-size")) * PHONE / width >= 11
    assert image.find(f"{SVG}title").text
    boxes = [measured(text) for text in image.iter(f"{SVG}text")]
    for words, left, right, top, bottom in boxes:
        assert left >= 0 and right <= width and top >= 0 and bottom <= height, words
    for one, other in combinations(boxes, 2):
        apart = one[1] >= other[2] or other[1] >= one[2] or one[3] >= other[4] or other[3] >= one[4]
        assert apart, f"{one[0]!r} lies on {other[0]!r}"


@pytest.mark.parametrize("name", schematics.SCHEMATICS)
def test_words_stay_in_their_box(name, files):
    """Words that begin in a box end in it, with some room at its edges."""
    image = ElementTree.fromstring(files[f"{name}-light.svg"])
    rectangles = []
    for rectangle in image.iter(f"{SVG}rect"):
        x, y, width, height = (float(rectangle.get(key)) for key in ("x", "y", "width", "height"))
        rectangles.append((x, x + width, y, y + height))
    for text in image.iter(f"{SVG}text"):
        words, left, right, top, bottom = measured(text)
        for x0, x1, y0, y1 in rectangles:
            inside_in_height = y0 <= (top + bottom) / 2 <= y1
            if inside_in_height and x0 < (left + right) / 2 < x1:
                assert left >= x0 + 4 and right <= x1 - 4, words


def measured(text: ElementTree.Element) -> tuple[str, float, float, float, float]:
    """Words, left, right, top and bottom of a text in DejaVu, whose letters are wider than those of most systems."""
    size = schematics.SIZE
    width = advance(text.text, "DejaVuSans.ttf", size)
    for span in text:
        font = "DejaVuSans.ttf"
        if "monospace" in span.get("font-family", ""):
            font = "DejaVuSansMono.ttf"
        elif span.get("font-weight"):
            font = "DejaVuSans-Bold.ttf"
        width += advance(span.text, font, float(span.get("font-size", size)))
        width += advance(span.tail, "DejaVuSans.ttf", size)
    before = {"start": 0, "middle": width / 2, "end": width}[text.get("text-anchor")]
    left, baseline = float(text.get("x")) - before, float(text.get("y"))
    return "".join(text.itertext()), left, left + width, baseline - 0.75 * size, baseline + 0.25 * size


def advance(words: str | None, font: str, size: float) -> float:
    """Width of words in units of the image."""
    if not words:
        return 0.0
    face = FT2Font(f"{get_data_path()}/fonts/ttf/{font}")
    face.set_size(100, 72)  # of a large size, so that rounding to pixels does not matter
    face.set_text(words, 0.0)
    return face.get_width_height()[0] / 64 * size / 100


def test_the_sites_of_sdxl_are_those_of_its_configuration():
    sites, _ = sites_of("sdxl")
    counted: dict[str, Counter] = {}
    for site in sites.values():
        name = site.name.split(".attentions")[0]
        counted.setdefault(name, Counter())[site.kind] += site.units
    drawn = {}
    for part in (*schematics.DOWN, schematics.MIDDLE, *schematics.UP):
        if part.blocks:
            drawn[part.name] = {"attention": 2 * part.blocks * part.heads, "feed_forward": part.blocks * part.neurons}
    assert drawn == counted


def test_the_shape_of_sdxl_is_that_of_its_configuration():
    _, config = sites_of("sdxl")
    size, channels = config["sample_size"], list(config["block_out_channels"])
    assert [part.channels for part in schematics.DOWN] == channels
    assert [part.channels for part in schematics.UP] == channels
    for parts in (schematics.DOWN, schematics.UP):
        assert [part.size for part in parts] == [size, size // 2, size // 4]
    assert (schematics.MIDDLE.size, schematics.MIDDLE.channels) == (size // 4, channels[-1])


@pytest.mark.parametrize("name", ["flux-schnell", "flux-dev"])
def test_the_sites_of_flux_are_those_of_its_configuration(name):
    sites, config = sites_of(name)
    assert (config["num_layers"], config["num_single_layers"]) == (schematics.FLUX_DOUBLE, schematics.FLUX_SINGLE)
    units = {site.name.replace(".0.", "."): site.units for site in sites.values() if ".0." in site.name}
    heads, neurons, modulation = schematics.FLUX_HEADS, schematics.FLUX_NEURONS, schematics.FLUX_MODULATION
    double = {"attn": heads, "ff": neurons, "ff_context": neurons}
    double |= {"norm1": modulation["double"], "norm1_context": modulation["double"]}
    single = {"attn": heads, "proj_mlp": neurons, "norm": modulation["single"]}
    expected = {f"transformer_blocks.{site}": count for site, count in double.items()}
    expected |= {f"single_transformer_blocks.{site}": count for site, count in single.items()}
    assert units == expected


def sites_of(name: str):
    """The sites of a full-size model, built without weights, and its configuration."""
    with torch.device("meta"):
        network = preset(name).build()
    return find_sites(network, ("attention", "feed_forward", "modulation")), network.config
