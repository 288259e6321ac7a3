"""Where trained pipelines are kept: fp16 safetensors, checksums, a model card, one fixed picture to compare with."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from .. import pipelines
from ..errors import EcoDiffError
from ..paths import data_dir

MANIFEST = "checksums.sha256"
FIXED = {"prompt": "a cat and a pizza on a green background", "seed": 0}


def stored_ids() -> list[str]:
    """Ids of the pipelines under ``data/models``."""
    return sorted(path.parent.name for path in (data_dir() / "models").glob("*/model_index.json"))


def save(pipe, recipe: dict, log: dict, folder: Path) -> None:
    """Write a trained pipeline in diffusers' folder format, weights in fp16; the folder appears whole or not at all."""
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder.parent))
    try:
        pipe.to(torch.float16).save_pretrained(temporary)
        for path in temporary.glob("text_encoder*/config.json"):
            # transformers loads in the dtype its config names, diffusers in fp32: without this they would differ
            path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "float32"}, indent=2) + "\n")
        (temporary / "recipe.json").write_text(json.dumps({"recipe": recipe, "log": log}, indent=1) + "\n")
        if folder.exists():
            shutil.rmtree(folder)
        temporary.chmod(0o755)
        os.replace(temporary, folder)
    except OSError as error:
        raise EcoDiffError(f"{folder}: could not be saved ({error}); nothing was written there.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        pipe.to(torch.float32)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def data_files() -> list[Path]:
    """All files of the data folder whose checksum is kept: models, objects, the paper's tables, recorded gates."""
    skipped = {MANIFEST, "README.md"}
    files = (path for path in data_dir().rglob("*") if path.is_file() and path.suffix != ".jsonl")
    hidden = lambda path: any(part.startswith(".") for part in path.relative_to(data_dir()).parts)  # noqa: E731
    return sorted(path for path in files if path.name not in skipped and not hidden(path))


def write_checksums() -> Path:
    """Write ``data/checksums.sha256`` in the form that ``sha256sum --check`` reads."""
    lines = [f"{_digest(path)}  {path.relative_to(data_dir()).as_posix()}\n" for path in data_files()]
    (data_dir() / MANIFEST).write_text("".join(lines))
    return data_dir() / MANIFEST


def changed_files(folder: str = "") -> list[str]:
    """Names of data files below ``folder`` that are missing or differ from the manifest."""
    wrong = []
    for line in (data_dir() / MANIFEST).read_text().splitlines():
        digest, _, name = line.partition("  ")
        if name.startswith(folder) and (not (data_dir() / name).is_file() or _digest(data_dir() / name) != digest):
            wrong.append(name)
    return wrong


def fixed_picture(pipe, sampling: dict) -> np.ndarray:
    """The picture that tells whether a stored pipeline still draws what it drew: uint8 [64, 64, 3]."""
    from ..generate import generate

    return generate(pipe, [FIXED["prompt"]], [FIXED["seed"]], progress=False, **sampling)[0].permute(1, 2, 0).numpy()


def recipe_of(name: str) -> dict:
    """The recipe a stored pipeline was trained by, with the log of its training."""
    path = data_dir() / "models" / name / "recipe.json"
    if not path.exists():
        raise EcoDiffError(f"{name!r} has no recipe.json in data/models: run python -m ecodiff.zoo train {name}.")
    return json.loads(path.read_text())


def check(name: str) -> str:
    """Verify a stored pipeline: checksums, loading by plain diffusers, its fixed picture (mean error under 2/255)."""
    from diffusers import DiffusionPipeline

    if wrong := changed_files(f"models/{name}/"):
        raise EcoDiffError(f"data/{wrong[0]} is missing or was changed: restore it with git checkout data.")
    folder = data_dir() / "models" / name
    pipe = DiffusionPipeline.from_pretrained(folder)
    drawn = fixed_picture(pipe, recipe_of(name)["recipe"]["sampling"]).astype(int)
    kept = np.asarray(Image.open(folder / "fixed.png")).astype(int)
    error = np.abs(drawn - kept).mean()
    if error > 2:
        raise EcoDiffError(f"{name} draws another picture than its fixed.png (mean error {error:.1f} of 255).")
    weights = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    return f"ok, {weights / 1e6:.1f} MB of weights, fixed picture within {error:.2f}/255"


def evaluate(name: str, prompts: int = 200) -> dict:
    """Measure a stored pipeline and write its card and fixed picture; see ``measure_quality`` for the numbers."""
    from .card import measure_quality, write_card

    folder = data_dir() / "models" / name
    pipe = pipelines.load(name)
    sampling = recipe_of(name)["recipe"]["sampling"]
    Image.fromarray(fixed_picture(pipe, sampling)).save(folder / "fixed.png")
    measured = measure_quality(pipe, sampling, prompts)
    write_card(folder, recipe_of(name), measured)
    write_checksums()
    return measured


