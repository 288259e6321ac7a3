"""Random scores: the floor that every method has to beat."""

from __future__ import annotations

import torch
from torch import Tensor

from ecodiff.method.sites import sites_but
from ecodiff.pipelines.checks import checked_seed
from ecodiff.pipelines.parts import denoiser


def scores(pipe, prompts=(), *, kinds=("attention", "feed_forward"), seed: int = 0, **sampling) -> dict[str, Tensor]:
    """Uniform numbers in [0, 1), {site name: fp32 [units]}; the same for the same seed.

    Prompts and other settings are not used.
    """
    generator = torch.Generator().manual_seed(checked_seed(seed, "random"))
    sites = sites_but(denoiser(pipe), kinds, sampling.get("exclude", ()))
    return {name: torch.rand(site.units, generator=generator) for name, site in sites.items()}
