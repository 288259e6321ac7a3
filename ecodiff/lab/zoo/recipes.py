"""Recipes of the embedded family: one YAML file a model under ``ecodiff/lab/zoo/configs``, and what it starts from."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import yaml

from ecodiff.errors import EcoDiffError
from ecodiff.storage.paths import data_dir


def recipe_ids() -> list[str]:
    """Ids of the embedded models, one recipe each."""
    folder = resources.files(__package__) / "configs"
    return sorted(path.name.removesuffix(".yaml") for path in folder.iterdir() if path.name.endswith(".yaml"))


def load_recipe(name: str, smoke: bool = False) -> dict:
    """Read a recipe; with ``smoke`` its own ``smoke`` section is laid over it (a few steps of everything).

    Raises EcoDiffError for an id without a recipe.
    """
    if name not in recipe_ids():
        raise EcoDiffError(f"There is no recipe {name!r} to train: take one of {', '.join(recipe_ids())}.")
    recipe = yaml.safe_load((resources.files(__package__) / "configs" / f"{name}.yaml").read_text(encoding="utf-8"))
    override = recipe.pop("smoke", {})
    if smoke:
        return _merge(recipe, override)
    return recipe


def _merge(base: dict, override: dict) -> dict:
    merged = dict(base)
    for key, value in override.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            value = _merge(base[key], value)
        merged[key] = value
    return merged


def is_judge(recipe: dict) -> bool:
    """Whether a recipe makes the judge and no pipeline."""
    return recipe["pipeline"] == "CLIPModel"


VIDEO = "WanPipeline"  # class of the pipelines of the family that generate clips


def is_video(pipe) -> bool:
    """Whether a pipeline of the family generates clips and no images."""
    return type(pipe).__name__ == VIDEO


def needs(recipe: dict) -> list[str]:
    """Ids of the trained models that a recipe starts from: those that lend a VAE or a text encoder, the teacher."""
    lenders = [recipe.get(part, {}).get("from") for part in ("vae", "text_encoder", "text_encoder_2")]
    names = dict.fromkeys([*lenders, recipe.get("teacher")])  # one model may lend several parts
    return [name for name in names if name]


def training_order() -> list[str]:
    """All ids, each after those it starts from."""
    order: list[str] = []

    def add(name: str) -> None:
        for other in needs(load_recipe(name)):
            add(other)
        if name not in order:
            order.append(name)

    for name in recipe_ids():
        add(name)
    return order


def trained_folder(name: str, wanted_by: str, models: Path | None = None) -> Path:
    """Folder of a trained model that another recipe starts from; ``models`` left out: ``data/models``.

    Raises EcoDiffError where it is not trained yet.
    """
    folder = (models or data_dir() / "models") / name
    if not (folder / "model_index.json").is_file():
        raise EcoDiffError(
            f"{wanted_by} starts from {name}, which is not in {folder.parent}: run python -m ecodiff zoo train {name}."
        )
    return folder
