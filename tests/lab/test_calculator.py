"""The calculator of the cost chapter: what Python prints is what the script shows."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from ecodiff.lab.book import calculator
from ecodiff.storage import records

ROWS = {
    row["values"]["name"]: row["values"] for row in records.rows("cost") if row["config"].get("what") == "calculator"
}
# A page with just enough of a document for the script: it fills in cells and verdict, which are then compared.
PAGE = """
let differing = [];
for (const given of CASES) {
  const fields = {
    model: {value: given.name}, steps: {value: given.steps, min: 1, max: 100},
    batch: {value: given.batch, min: 1, max: 64}, ratio: {value: given.percent, min: 0, max: 50},
    gpu: {value: given.gpu, min: 4, max: 200}, guided: {checked: given.guided},
  };
  const lines = given.table.map(() => [{}, {}]), says = {};
  const box = {
    querySelector: (wanted) => wanted === ".cost-says" ? says : fields[wanted.match(/name=(\\w+)/)[1]],
    querySelectorAll: () => lines.map((cells) => ({querySelectorAll: () => cells})),
    addEventListener() {},
  };
  const document = {currentScript: {closest: () => box}};
  SCRIPT
  const shown = [says.textContent, ...lines.map((cells) => cells.map((cell) => cell.textContent))];
  const printed = [given.says, ...given.table];
  if (JSON.stringify(shown) !== JSON.stringify(printed)) differing.push({shown, printed});
}
console.log(JSON.stringify(differing));
"""


@pytest.mark.skipif(not shutil.which("node"), reason="needs node, which runs the script outside of a browser")
def test_the_script_says_what_python_prints(tmp_path):
    cases = []
    for name, row in ROWS.items():
        for steps, batch, ratio, gpu, guided in (
            (row["steps"], 1, 0.2, 24, True),
            (7, 3, 0.37, 9, True),
            (4, 1, 0.2, 200, False),
            (50, 2, 0.1, 24, True),
        ):
            cases.append({
                "name": name, "steps": steps, "batch": batch, "percent": round(100 * ratio), "gpu": gpu,
                "guided": guided, "says": calculator.verdict(row, steps, batch, ratio, gpu, guided),
                "table": [line[1:] for line in calculator.table(row, steps, batch, ratio, guided)],
            })  # fmt: skip
    constants = {"rows": list(ROWS.values()), "far": calculator.FAR}
    constants |= {"context": calculator.CONTEXT, "fragments": calculator.FRAGMENTS}
    script = Path(calculator.__file__).with_suffix(".js").read_text().replace("CONSTANTS", json.dumps(constants))
    page = tmp_path / "page.js"
    page.write_text(PAGE.replace("SCRIPT", script).replace("CASES", json.dumps(cases)))
    said = subprocess.run(["node", page], capture_output=True, text=True, check=True).stdout
    assert len(cases) == 40 and json.loads(said) == []


def test_the_verdict_stands_first_and_in_print():
    shown = calculator.calculator(list(ROWS.values()), "sdxl")
    html = shown._repr_html_() if hasattr(shown, "_repr_html_") else shown.data
    verdict = calculator.verdict(ROWS["sdxl"], ROWS["sdxl"]["steps"], 1, 0.2, 24)
    assert verdict in html and html.index(verdict) < html.index('name="model"') < html.index("<tbody>")


def test_a_small_gpu_generates_only_after_pruning():
    """The paper's claim about FLUX.1 schnell: 24 GB do with 15 % of its units removed."""
    row = ROWS["flux-schnell"]
    assert "Generating does not fit" in calculator.verdict(row, 4, 1, 0.2, 16)
    assert calculator.amounts(row, 4, 1, 0.15).offloaded < 24e9 < calculator.amounts(row, 4, 1, 0.0).offloaded
