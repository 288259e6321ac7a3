"""The ratio slider of the chapter on methods: its images are those that the recorded rows speak of."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ecodiff import metrics
from ecodiff.errors import EcoDiffError
from ecodiff.lab.book import slider


@pytest.fixture(scope="module")
def stops():
    return slider.positions()


@pytest.fixture(scope="module")
def html():
    return slider.ratio_slider(start=0.2).data


@pytest.mark.slow
def test_images_have_the_ssim_that_is_recorded_for_them():
    images = {row: torch.tensor(of_row).permute(0, 3, 1, 2) for row, of_row in slider.images().items()}
    values = slider.measured()
    for row in slider.rows()[1:]:
        recorded = values[row]["ssim"][: slider.PROMPTS]
        # An image is generated anew on another machine now and then, and differs by rounding.
        assert metrics.ssim(images[row], images["original"]).tolist() == pytest.approx(recorded, abs=0.02), row


def test_each_stop_shows_every_method_and_says_what_the_rows_say(stops):
    assert [stop["share"] for stop in stops] == ["0\u00a0%", "10\u00a0%", "20\u00a0%", "30\u00a0%", "50\u00a0%"]
    recorded = slider.measured()
    for ratio, stop in zip((0.0, *slider.RATIOS), stops, strict=True):
        assert len(stop["rows"]) == len(slider.METHODS) and all(len(r["tiles"]) == slider.PROMPTS for r in stop["rows"])
        for method, line in zip(slider.METHODS, stop["rows"], strict=True):
            values = recorded[f"{method}, {ratio:.0%}" if ratio else "original"]
            assert len(values["facts"]) == len(values["ssim"]) == slider.IMAGES
            assert line["right"].startswith(f"right {100 * np.mean(values['facts']):.0f}\u00a0% (")
            assert line["ssim"].startswith(f"SSIM {np.mean(values['ssim']):.2f} (" if ratio else "SSIM 1")


def test_it_can_be_read_without_a_script_a_mouse_or_eyes(html, stops):
    before_script = html.split("<script>")[0]
    labels = re.findall(r'role="img" aria-label="([^"]+)"', before_script)
    assert len(labels) == len(slider.METHODS) * slider.PROMPTS and len(set(labels)) == len(labels)
    assert all("20\u00a0% removed, prompt: " in label and "SSIM" in label for label in labels)
    assert stops[2]["says"] in before_script and 'aria-live="polite"' in before_script
    assert re.search(r'<label>.*<input type="range"[^>]*aria-valuetext="20\u00a0%"', before_script, re.S)
    assert "print-color-adjust: exact" in before_script and "http" not in re.sub(r"base64,[\w+/=]+", "", before_script)


def test_the_page_grows_by_less_than_half_a_megabyte(html):
    assert len(html) < 500_000


def test_images_of_other_rows_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(slider, "sprite_file", lambda: tmp_path / "ratio_slider.png")
    with pytest.raises(EcoDiffError, match="is not in data/results.*ratio-slider"):
        slider.images()
    Image.new("RGB", (64, 64)).save(tmp_path / "ratio_slider.png")
    with pytest.raises(EcoDiffError, match="other weights, masks or prompts.*ratio-slider"):
        slider.images()


PAGE = """
const said = [];
const cells = () => Array.from({length: PROMPTS}, () => {
  const tile = {style: {}, setAttribute(name, value) { this[name] = value; }}, span = {};
  return {tile, span, querySelector: (wanted) => wanted === ".ratio-tile" ? tile : span};
});
const lines = Array.from({length: METHODS}, () => ({heads: [{}, {}], cells: cells()}));
for (const line of lines) line.querySelectorAll = (wanted) => wanted === "td" ? line.cells : line.heads;
const input = {value: START, setAttribute() {}, addEventListener() {}}, output = {}, says = {};
const box = {
  querySelector: (wanted) => ({input, output, ".ratio-says": says})[wanted],
  querySelectorAll: () => lines,
};
const document = {currentScript: {closest: () => box}};
SCRIPT
console.log(JSON.stringify({
  says: says.textContent, share: output.textContent, heads: lines.map((line) => line.heads.map((h) => h.textContent)),
  places: lines.map((line) => line.cells.map((cell) => cell.tile.style.backgroundPositionX)),
  labels: lines.map((line) => line.cells.map((cell) => cell.tile["aria-label"])),
}));
"""


@pytest.mark.skipif(not shutil.which("node"), reason="needs node, which runs the script outside of a browser")
def test_the_script_shows_what_python_counted(tmp_path, stops):
    constants = json.dumps({"stops": stops, "columns": len(slider.rows())})
    script = Path(slider.__file__).with_suffix(".js").read_text().replace("CONSTANTS", constants)
    page = PAGE.replace("SCRIPT", script).replace("START", "3")
    page = page.replace("PROMPTS", str(slider.PROMPTS)).replace("METHODS", str(len(slider.METHODS)))
    (tmp_path / "page.js").write_text(page)
    said = json.loads(subprocess.run(["node", tmp_path / "page.js"], capture_output=True, text=True, check=True).stdout)
    stop = stops[3]
    assert said["says"] == stop["says"] and said["share"] == stop["share"]
    assert said["heads"] == [[row["ssim"], row["right"]] for row in stop["rows"]]
    assert said["labels"] == [[tile["text"] for tile in row["tiles"]] for row in stop["rows"]]
    for row, places in zip(stop["rows"], said["places"], strict=True):
        whole = 100 * row["column"] / (len(slider.rows()) - 1)
        assert [float(place.rstrip("%")) for place in places] == pytest.approx([whole] * slider.PROMPTS)
