"""Images before and after a fifth of the units were removed: of the introduction, the landing page and README.

``python -m ecodiff book before-after`` writes book/_static/before-after.png

Uses the recorded masks (learned, seed 0) and the same scores that the tables of methods compare.
"""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
import torch
from torch import Tensor

import ecodiff
from ecodiff.lab import openmoji, studies
from ecodiff.lab.studies.measure import Kept, scores_of
from ecodiff.lab.studies.protocol import Protocol
from ecodiff.method.generate import generate
from ecodiff.method.learn import LearnConfig
from ecodiff.method.mask import make_mask
from ecodiff.method.sites import find_sites
from ecodiff.pipelines.parts import denoiser
from ecodiff.storage.paths import root

from . import plotting

MODEL, RATIO, IMAGES = studies.SCHNELL, 0.2, 8
METHODS = ("learned", "magnitude", "random")


def before_and_after(
    pipe,
    prompts: Sequence[str],
    sampling: dict,
    captions: Sequence[str],
    config: LearnConfig,
    ratio: float = RATIO,
    recompute: bool = False,
) -> dict[str, Tensor]:
    """Images uint8 [N, 3, H, W] of the prompts: "original", and one entry for each of ``METHODS``.

    The i-th prompt has noise i in all of them.

    Args:
        pipe: the model whose units are removed.
        prompts: what is generated.
        sampling: further arguments of ``generate``.
        captions, config: what the mask is learned with.
        ratio: share of the units of each kind that goes.
        recompute: learn the mask again, once per process, instead of reading the recorded one.
    """
    kept = Kept(gates=not recompute)
    pipelines = {"original": pipe}
    for method in METHODS:
        scores = scores_of(pipe, method, captions, config, seed=0, kept=kept)
        pipelines[method] = ecodiff.prune(pipe, make_mask(scores, find_sites(denoiser(pipe)), ratio))
    images = {}
    for name, one in pipelines.items():
        images[name] = generate(one, prompts, range(len(prompts)), progress=False, **sampling)
    return images


def draw_before_after() -> None:
    """Write the figure, with the recorded masks; each image has its own seed."""
    matplotlib.use("Agg")  # here and not at the top: a chapter that imports this module shows its figures
    plotting.style()
    pipe = ecodiff.load(MODEL)
    cell = studies.base(MODEL)
    prompts = openmoji.prompts("seen", IMAGES, start=200)
    images = before_and_after(pipe, prompts, Protocol.of(MODEL).sampling, cell.captions(), cell.config)
    figure = plotting.picture_grid(torch.stack(list(images.values())), rows=list(images), size=1.1)
    figure.savefig(root() / "book" / "_static" / "before-after.png", dpi=110)
