"""Where trained models are kept: fp16 safetensors, checksums, a model card, one fixed image to compare with."""

from __future__ import annotations

import hashlib
import json
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ecodiff.errors import EcoDiffError
from ecodiff.lab import identities, openmoji
from ecodiff.metrics.clip import Judge
from ecodiff.pipelines.contents import weights_hash
from ecodiff.pipelines.identity import Identity
from ecodiff.pipelines.loading import load
from ecodiff.storage.paths import data_dir
from ecodiff.storage.saving import replaced_files

from .recipes import is_judge, is_video

MANIFEST = "checksums.sha256"
# What ``evaluate`` writes about one model.
EVALUATED = ("README.md", "measured.json", "fixed.png", "fixed.json", identities.FILE)
FIXED = {"prompt": "a cat and a pizza on a green background", "seed": 0}
FIXED_CLIP = "a cat that moves left on a green background"


def stored_ids() -> list[str]:
    """Ids of the trained models (pipelines and judge) under ``data/models``."""
    return sorted(path.parent.name for path in (data_dir() / "models").glob("*/recipe.json"))


def save(pipe, recipe: dict, log: dict, folder: Path) -> None:
    """Write a trained pipeline (or judge) in its library's folder format, weights in fp16, all files or none.

    The card and the numbers of an earlier model there go with it; ``evaluate`` writes new ones. Other files stay.
    """
    with replaced_files(folder, outdated=EVALUATED) as written, _in_fp16(pipe):
        temporary = Path(written)
        _forget_batches(pipe)
        pipe.save_pretrained(temporary)
        for path in (*temporary.glob("text_encoder*/config.json"), *temporary.glob("config.json")):
            # transformers loads in the dtype its config names, diffusers in fp32: without this they would differ
            path.write_text(json.dumps(_loaded_in_fp32(json.loads(path.read_text())), indent=2) + "\n")
        for path in (*temporary.rglob("config.json"), *temporary.glob("model_index.json")):
            # a borrowed part, and a pipeline made from another, name the folder they were loaded from
            config = json.loads(path.read_text())
            if config.pop("_name_or_path", None) is not None:
                path.write_text(json.dumps(config, indent=2) + "\n")
        (temporary / "recipe.json").write_text(json.dumps({"recipe": recipe, "log": log}, indent=1) + "\n")


def _forget_batches(pipe) -> None:
    """Take from tokenizers how the last batch was padded, which they keep and would write."""
    for part in getattr(pipe, "components", {}).values():
        backend = getattr(part, "backend_tokenizer", None)
        if backend:
            backend.no_padding()
            backend.no_truncation()


@contextmanager
def _in_fp16(pipe):
    pipe.to(torch.float16)
    try:
        yield
    finally:
        pipe.to(torch.float32)


def _loaded_in_fp32(config: dict) -> dict:
    """A configuration that names fp32 as its dtype, also in the configurations inside it."""
    changed = dict(config)
    for name, value in config.items():
        if isinstance(value, dict):
            changed[name] = _loaded_in_fp32(value)
    if "dtype" in config:
        changed["dtype"] = "float32"
    return changed


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def data_files() -> list[Path]:
    """All files of the data folder whose checksum is kept: models, objects, the paper's tables, recorded gates."""
    files = []
    for path in data_dir().rglob("*"):
        if not path.is_file() or path.suffix == ".jsonl" or path.name in (MANIFEST, "README.md"):
            continue
        if not any(part.startswith(".") for part in path.relative_to(data_dir()).parts):
            files.append(path)
    return sorted(files)


def write_checksums() -> Path:
    """Write ``data/checksums.sha256`` in the form that ``sha256sum --check`` reads."""
    lines = [f"{_digest(path)}  {path.relative_to(data_dir()).as_posix()}\n" for path in data_files()]
    (data_dir() / MANIFEST).write_text("".join(lines))
    return data_dir() / MANIFEST


def changed_files(folder: str = "") -> list[str]:
    """Names of data files below ``folder`` that are missing or differ from the manifest."""
    changed = []
    for line in (data_dir() / MANIFEST).read_text().splitlines():
        digest, _, name = line.partition("  ")
        path = data_dir() / name
        if name.startswith(folder) and (not path.is_file() or _digest(path) != digest):
            changed.append(name)
    return changed


def fixed_picture(pipe, sampling: dict) -> np.ndarray:
    """The image that tells whether a stored pipeline still generates what it did: uint8 [64, 64, 3].

    Of a pipeline that generates clips, it is the frames of one side by side: uint8 [32, 9 · 32, 3].
    """
    from ecodiff.method.generate import generate

    prompt = FIXED_CLIP if is_video(pipe) else FIXED["prompt"]
    images = generate(pipe, [prompt], [FIXED["seed"]], progress=False, **sampling)
    if is_video(pipe):
        images = images.movedim(1, -2).flatten(-2)
    return images[0].permute(1, 2, 0).numpy()


def recipe_of(name: str) -> dict:
    """The recipe a stored model was trained by, with the log of its training."""
    path = data_dir() / "models" / name / "recipe.json"
    if not path.exists():
        raise EcoDiffError(f"{name!r} has no recipe.json in data/models: run python -m ecodiff zoo train {name}.")
    return json.loads(path.read_text())


def check(name: str) -> str:
    """Verify a stored model and say so in words; raises EcoDiffError for one that is not as it was stored.

    Verified are checksums, loading by plain diffusers (or transformers), and the fixed image (mean error up to 2/255);
    for the judge the fixed scores (within 0.01).
    """
    changed = changed_files(f"models/{name}/")
    if changed:
        raise EcoDiffError(f"data/{changed[0]} is missing or was changed: restore it with git checkout data.")
    recipe, folder = recipe_of(name)["recipe"], data_dir() / "models" / name
    weights = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    same = _check_judge(folder) if is_judge(recipe) else _check_pipeline(folder, recipe["sampling"])
    identities.check(folder, identity_of_weights(name))
    return f"ok, {weights / 1e6:.1f} MB of weights, {same}"


def identity_of_weights(name: str) -> dict:
    """What ``identity.json`` of a stored model holds, found in its weights."""
    if is_judge(recipe_of(name)["recipe"]):
        return {"weights": weights_hash(Judge.load(name).model)}
    return asdict(Identity.of(load(name)))


def _check_pipeline(folder: Path, sampling: dict) -> str:
    from diffusers import DiffusionPipeline

    stored = np.asarray(Image.open(_fixed(folder, "fixed.png"))).astype(int)
    generated = fixed_picture(DiffusionPipeline.from_pretrained(folder), sampling).astype(int)
    error = np.abs(generated - stored).mean()
    if error > 2:
        raise EcoDiffError(f"{folder.name} generates another image than its fixed.png (mean error {error:.1f} of 255).")
    return f"fixed image within {error:.2f}/255"


def _fixed(folder: Path, name: str) -> Path:
    if not (folder / name).is_file():
        raise EcoDiffError(f"{folder.name} has no {name} yet: run python -m ecodiff zoo evaluate {folder.name}.")
    return folder / name


def _check_judge(folder: Path) -> str:
    stored = torch.tensor(json.loads(_fixed(folder, "fixed.json").read_text()))
    error = (fixed_scores(Judge.load(folder)) - stored).abs().max().item()
    if error > 0.01:
        raise EcoDiffError(f"{folder.name} gives other scores than its fixed.json (largest difference {error:.3f}).")
    return f"fixed scores within {error:.4f}"


def fixed_scores(judge: Judge) -> torch.Tensor:
    """The scores that tell whether a stored judge still judges as it did: cosines of 8 real scenes and captions."""
    scenes = list(openmoji.scenes("seen", 8, start=9_000_000))
    return judge.image_features(openmoji.images(scenes)) @ judge.text_features([s.caption for s in scenes]).T


def evaluate(name: str, prompts: int = 500, seeds: int = 3) -> dict:
    """Measure a stored model, write its card and what ``check`` compares with; see ``zoo.measure`` for the numbers."""
    from .card import write_card, write_measured
    from .measure import measure_judge, measure_pipeline

    trained, folder = recipe_of(name), data_dir() / "models" / name
    if is_judge(trained["recipe"]):
        judge = Judge.load(name)
        (folder / "fixed.json").write_text(json.dumps(fixed_scores(judge).tolist()) + "\n")
        measured = measure_judge(judge, prompts)
    else:
        pipe, sampling = load(name), trained["recipe"]["sampling"]
        Image.fromarray(fixed_picture(pipe, sampling)).save(folder / "fixed.png")
        measured = measure_pipeline(pipe, sampling, prompts, seeds)
    identities.write(folder, identity_of_weights(name))
    write_card(folder, trained, measured)
    write_measured(folder, measured)
    write_checksums()
    return measured
