"""Training of an embedded model: the stages that its recipe names, one after another."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from ecodiff.errors import EcoDiffError
from ecodiff.metrics.clip import Judge
from ecodiff.pipelines.contents import weights_hash
from ecodiff.pipelines.loading import load
from ecodiff.storage.fingerprint import key
from ecodiff.storage.paths import data_dir
from ecodiff.storage.provenance import commit, machine

from .build import build
from .contrast import train_contrast
from .distil import train_distil, train_guidance
from .fit import fast_precision
from .recipes import is_judge
from .stages import train_decoder, train_denoiser, train_vae, train_words

STAGES = {
    "vae": train_vae,
    "denoiser": train_denoiser,
    "decoder": train_decoder,
    "words": train_words,
    "guidance": train_guidance,
    "distil": train_distil,
    "contrast": train_contrast,
}


def plan(recipe: dict) -> str:
    """What a training will cost, in words, before it starts."""
    parts = []
    for stage in recipe["stages"]:
        options = recipe[stage]["train"]
        parts.append(f"{stage} {options['steps']} steps of {options['batch_size']} scenes")
    place = "gpu" if torch.cuda.is_available() else "cpu"
    precision = "bf16" if fast_precision() == "bf16" else "fp32"
    minutes = sum(recipe["minutes"].values())
    return (
        f"{recipe['id']}: {', '.join(parts)}; at full size about {minutes} minutes on two idle CPU cores with fast "
        f"bf16, minutes on a GPU. This {place} will use {precision}."
    )


def train(recipe: dict, folder: Path, models: Path | None = None, go_on: bool = False):
    """Run the stages of a recipe, with checkpoints in ``folder``; returns the trained pipeline (or judge) and a log.

    ``models`` is the folder with the trained models it starts from (left out: ``data/models``). ``go_on`` starts from
    the stored model of this recipe itself and runs the stages that its log does not have: for longer training, add a
    stage such as ``denoiser_2``. Raises EcoDiffError where a model is missing, where it was trained by another recipe
    or has all stages, and where a checkpoint belongs to other options or to another start.
    """
    from accelerate import PartialState

    stages, before = recipe["stages"], {}
    if go_on:
        model, before = _stored(recipe, models)
        stages = [stage for stage in stages if stage not in before]
    else:
        model = build(recipe, models)
    model.to(PartialState().device)
    log = {}
    for stage in stages:
        # A checkpoint made from other weights (a VAE, a teacher, an earlier stage) must not be taken up: its options
        # name what it started from.
        parts = {n: weights_hash(m) for n, m in model.components.items() if isinstance(m, torch.nn.Module)}
        options = {**recipe[stage]["train"], "origin": key(parts)}
        train_stage = STAGES[stage.partition("_")[0]]  # denoiser_2 trains what denoiser does
        log[stage] = train_stage(model, {**recipe, stage: {"train": options}}, folder, stage)
    model.to("cpu")
    return model, {**before, **log, "machine": machine(), "commit": commit()}


def _stored(recipe: dict, models: Path | None):
    """The stored model of a recipe in fp32, and the log of the stages that trained it."""
    folder = (models or data_dir() / "models") / recipe["id"]
    if not (folder / "recipe.json").is_file():
        raise EcoDiffError(f"{recipe['id']} is not in {folder.parent}: train it first, without --go-on.")
    trained = json.loads((folder / "recipe.json").read_text())
    before = {stage: entry for stage, entry in trained["log"].items() if stage in trained["recipe"]["stages"]}
    for stage in before:
        if stage not in recipe["stages"] or trained["recipe"][stage] != recipe[stage]:
            raise EcoDiffError(
                f"{folder} was trained by another recipe (stage {stage!r} differs): a stage that is over must stay as "
                "it was; add a new one, such as denoiser_2."
            )
    if len(before) == len(recipe["stages"]):
        raise EcoDiffError(f"{folder} has all stages of its recipe: add one, such as denoiser_2, to go on.")
    model = Judge.load(folder) if is_judge(recipe) else load(folder)
    return model, before
