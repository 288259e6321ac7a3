"""The picture at the top of README.md: the same captions and noise before and after a fifth of the units went.

``python -m ecodiff book before-after`` writes book/_static/before-after.png

Uses the recorded masks of chapter 5 (learned, seed 0) and the same scores that its table compares.
"""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg")

import torch

import ecodiff
from ecodiff.lab import openmoji
from . import plotting
from ecodiff.lab.studies.measure import scores_of
from ecodiff.method.generate import generate
from ecodiff.method.learn import LearnConfig
from ecodiff.method.mask import make_mask
from ecodiff.storage.paths import root
from ecodiff.pipelines.parts import denoiser
from ecodiff.lab.studies.protocol import Protocol
from ecodiff.method.sites import find_sites

RATIO, PICTURES = 0.2, 8


def draw_before_after() -> None:
    """Write the picture, with the recorded masks and the pictures' own seeds."""
    plotting.style()
    protocol = Protocol.of("openmoji-sdxl")
    pipe = ecodiff.load(protocol.model)
    captions = openmoji.prompts("train", 100)
    config = LearnConfig(guidance_scale=protocol.guidance_scale)
    shown = openmoji.prompts("seen", PICTURES, start=200)
    rows = {"original": pipe}
    for method in ("learned", "magnitude", "random"):
        scores = scores_of(pipe, method, captions, config, seed=0)
        rows[method] = ecodiff.prune(pipe, make_mask(scores, find_sites(denoiser(pipe)), RATIO))
    settings = protocol.sampling
    drawn = torch.stack([generate(p, shown, range(PICTURES), progress=False, **settings) for p in rows.values()])
    figure = plotting.picture_grid(drawn, rows=list(rows), size=1.1)
    figure.savefig(root() / "book" / "_static" / "before-after.png", dpi=110)
