"""Training of an embedded model: the stages that its recipe names, one after another."""

from __future__ import annotations

from pathlib import Path

import torch

from ..cache import key, weights_hash
from ..records import commit, machine
from .build import build
from .contrast import train_contrast
from .distil import train_distil, train_guidance
from .fit import fast_precision
from .recipes import needs
from .stages import train_decoder, train_denoiser, train_vae

STAGES = {
    "vae": train_vae,
    "denoiser": train_denoiser,
    "decoder": train_decoder,
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
    place = "this GPU" if torch.cuda.is_available() else "this CPU"
    minutes = sum(recipe["minutes"].values())
    return (
        f"{recipe['id']}: {', '.join(parts)}; at full size about {minutes} minutes on two idle CPU cores with fast "
        f"bf16, minutes on a GPU. {place.capitalize()} will use {'bf16' if fast_precision() == 'bf16' else 'fp32'}."
    )


def train(recipe: dict, folder: Path, models: Path | None = None):
    """Run the stages of a recipe, with checkpoints in ``folder``; returns the trained pipeline (or judge) and a log.

    ``models`` is the folder with the trained models it starts from (left out: ``data/models``). Raises EcoDiffError
    where one is missing, and where a checkpoint belongs to other options or to another start.
    """
    from accelerate import PartialState

    model = build(recipe, models)
    if needs(recipe):
        # A checkpoint made from another VAE or teacher must not be taken up: its options name the weights.
        parts = {n: weights_hash(m) for n, m in model.components.items() if isinstance(m, torch.nn.Module)}
        for stage in recipe["stages"]:
            recipe = {**recipe, stage: {**recipe[stage], "train": {**recipe[stage]["train"], "origin": key(parts)}}}
    model.to(PartialState().device)
    log = {stage: STAGES[stage](model, recipe, folder) for stage in recipe["stages"]}
    model.to("cpu")
    return model, {**log, "machine": machine(), "commit": commit()}
