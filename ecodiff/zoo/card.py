"""Model cards: how the weights came about, and what was measured on them; and the object probe."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from string import Template

from .. import data, metrics, records
from ..paths import data_dir

PROBE_PICTURES = 12  # real one-object scenes a class


def fit_probe() -> float:
    """Fit the object probe on real one-object scenes, keep it in ``data/models/openmoji-probe``, return its ceiling."""
    scenes = list(data.scenes("train", PROBE_PICTURES * len(data.object_names()), start=20_000_000, count=1))
    probe = metrics.ObjectProbe.fit(data.images(scenes), [scene.objects[0] for scene in scenes])
    folder = data_dir() / "models" / "openmoji-probe"
    folder.mkdir(parents=True, exist_ok=True)
    probe.save(folder / "probe.safetensors")
    text = _template("probe.md").substitute(
        pictures=len(scenes), ceiling=f"{100 * probe.ceiling:.1f}", objects=len(probe.names), commit=records.commit()
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
    return probe.ceiling


def _template(name: str) -> Template:
    return Template((resources.files(__package__) / "templates" / name).read_text(encoding="utf-8"))


def write_card(folder: Path, trained: dict, measured: dict[str, str]) -> None:
    """Write ``README.md`` of a stored model in the Hub's form."""
    recipe, log = trained["recipe"], trained["log"]
    stages = {name: entry for name, entry in log.items() if isinstance(entry, dict) and "seconds" in entry}
    text = _template("judge.md" if recipe["pipeline"] == "CLIPModel" else "pipeline.md").substitute(
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
