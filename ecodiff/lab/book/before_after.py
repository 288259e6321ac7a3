"""The figure at the top of README.md: the same prompts and noise before and after a fifth of the units were removed.

``python -m ecodiff book before-after`` writes book/_static/before-after.png

Uses the recorded masks of chapter 5 (learned, seed 0) and the same scores that its table compares.
"""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg")

import torch

import ecodiff
from ecodiff.lab import openmoji
from ecodiff.lab.studies.measure import scores_of
from ecodiff.lab.studies.protocol import Protocol
from ecodiff.method.generate import generate
from ecodiff.method.learn import LearnConfig
from ecodiff.method.mask import make_mask
from ecodiff.method.sites import find_sites
from ecodiff.pipelines.parts import denoiser
from ecodiff.storage.paths import root

from . import plotting

RATIO, IMAGES = 0.2, 8


def draw_before_after() -> None:
    """Write the figure, with the recorded masks; each image has its own seed."""
    plotting.style()
    protocol = Protocol.of("openmoji-sdxl")
    pipe = ecodiff.load(protocol.model)
    config = LearnConfig(guidance_scale=protocol.guidance_scale)
    pipelines = {"original": pipe}
    for method in ("learned", "magnitude", "random"):
        scores = scores_of(pipe, method, openmoji.prompts("train", 100), config, seed=0)
        pipelines[method] = ecodiff.prune(pipe, make_mask(scores, find_sites(denoiser(pipe)), RATIO))
    prompts = openmoji.prompts("seen", IMAGES, start=200)
    rows = []
    for one in pipelines.values():
        rows.append(generate(one, prompts, range(IMAGES), progress=False, **protocol.sampling))
    figure = plotting.picture_grid(torch.stack(rows), rows=list(pipelines), size=1.1)
    figure.savefig(root() / "book" / "_static" / "before-after.png", dpi=110)
