"""Model cards: how the weights came about, what was measured on them and what was aimed at; and the object probe."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from string import Template

from ecodiff.lab import openmoji
from ecodiff.storage import provenance
from ecodiff.storage.paths import data_dir

from .recipes import VIDEO

PROBE_IMAGES = 12  # real one-object scenes a class

SETS = ("one object", "two objects, seen pairs", "two objects, held-out pairs")
TARGETS = {  # what the pipelines of the family aim at: row of the card -> at least
    "VAE PSNR (dB)": 27.0,
    "one object: objects found (%)": 90.0,
    "two objects, seen pairs: objects found (%)": 75.0,
    "two objects, held-out pairs: objects found (%)": 60.0,
    **{f"{name}: background right (%)": 95.0 for name in SETS},
    **{f"{name}: caption ranked first (%)": 85.0 for name in SETS},
}
SECONDS_FOR_512 = 90.0  # for 512 images with the slowest model, on two cores
DISTILLED_WITHIN = 5.0  # points that a step-distilled model may lie under its teacher in any of these shares
_NUMBER = re.compile(r"(-?[\d.]+)(?: \(95 % interval (-?[\d.]+) to (-?[\d.]+)\))?(?:; real scenes (-?[\d.]+))?")


@dataclass(frozen=True)
class Measured:
    """A number of a card: the mean, its 95 % interval where it has one, and what real scenes reach, the ceiling."""

    value: float
    low: float | None = None
    high: float | None = None
    real: float | None = None

    @classmethod
    def parse(cls, text: str) -> Measured | None:
        """The number that a card states in words, such as "77.7 (95 % interval 76.9 to 78.4); real scenes 100.0".

        None for a text of another form.
        """
        match = _NUMBER.fullmatch(text.strip())
        if match is None:
            return None
        return cls(*(None if part is None else float(part) for part in match.groups()))

    def __str__(self) -> str:
        if self.low is None:
            return f"{self.value:.1f}"
        return f"{self.value:.1f} ({self.low:.1f} to {self.high:.1f})"


def write_measured(folder: Path, measured: Mapping[str, str]) -> None:
    """Write ``measured.json`` beside the card: each row's numbers, or its text where it is no number."""
    rows: dict[str, dict | str] = {}
    for name, text in measured.items():
        number = Measured.parse(text)
        rows[name] = asdict(number) if number else text
    (folder / "measured.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def read_measured(folder: Path) -> dict[str, Measured]:
    """The numbers of a stored model by the row of its card; empty where it is not evaluated yet."""
    path = folder / "measured.json"
    if not path.is_file():
        return {}
    rows = json.loads(path.read_text(encoding="utf-8"))
    return {name: Measured(**row) for name, row in rows.items() if isinstance(row, dict)}


def gap(student: Mapping[str, Measured], teacher: Mapping[str, Measured]) -> tuple[str, float] | None:
    """The share of ``TARGETS`` in which a distilled model lies furthest under its teacher, and by how many points.

    None where the two models have no share in common.
    """
    gaps = {}
    for name in TARGETS:
        if name.endswith("(%)") and name in student and name in teacher:
            gaps[name] = round(teacher[name].value - student[name].value, 1)
    if not gaps:
        return None
    widest = max(gaps, key=lambda name: gaps[name])
    return widest, gaps[widest]


def fit_probe() -> float:
    """Fit the object probe on real one-object scenes and store it in ``data/models``; its ceiling is returned."""
    scenes = list(openmoji.scenes("train", PROBE_IMAGES * len(openmoji.object_names()), start=20_000_000, count=1))
    probe = openmoji.ObjectProbe.fit(openmoji.images(scenes), [scene.objects[0] for scene in scenes])
    folder = data_dir() / "models" / "openmoji-probe"
    folder.mkdir(parents=True, exist_ok=True)
    probe.save(folder / "probe.safetensors")
    text = _template("probe.md").substitute(
        pictures=len(scenes), ceiling=f"{100 * probe.ceiling:.1f}", objects=len(probe.names), commit=provenance.commit()
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
    return probe.ceiling


_TEMPLATES = {"CLIPModel": "judge.md", VIDEO: "video.md"}


def _template(name: str) -> Template:
    return Template((resources.files(__package__) / "templates" / name).read_text(encoding="utf-8"))


def write_card(folder: Path, trained: dict, measured: dict[str, str]) -> None:
    """Write ``README.md`` of a stored model in the Hub's form."""
    recipe, log = trained["recipe"], trained["log"]
    # The log also holds the machine and the commit.
    stages = {name: entry for name, entry in log.items() if isinstance(entry, dict) and "seconds" in entry}
    template = _TEMPLATES.get(recipe["pipeline"], "pipeline.md")
    text = _template(template).substitute(
        {key: recipe[key] for key in ("id", "pipeline", "stands_for", "seed")},
        about=" ".join(recipe.get("about", "").split()),
        call=", ".join(f"{name}={value}" for name, value in recipe.get("sampling", {}).items()),
        stages="\n".join(_stage(name, recipe[name]["train"], entry) for name, entry in stages.items()),
        machine=", ".join(f"{name} {value}" for name, value in log["machine"].items()),
        commit=log["commit"],
        rows="\n".join(f"| {name} | {value} |" for name, value in measured.items()),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def _stage(name: str, options: dict, entry: dict) -> str:
    return (
        f"- {name}: {options['steps']} steps of {options['batch_size']} scenes, {entry['seconds'] / 60:.0f} minutes, "
        f"final loss {entry['loss']:.4f}"
    )
