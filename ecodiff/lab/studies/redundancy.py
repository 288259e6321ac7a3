"""How many units a model can do without, one at a time: what makes pruning without retraining possible at all (§1).

One unit is gated to 0, all others stay, and the same captions are drawn from the same noise. The change is the root
mean square difference between the pictures and those of the whole model, in levels of an 8-bit channel (0 to 255), so
that three limits can be put beside it:

    another batch shape   the change that float rounding alone makes
    bf16 arithmetic       the change of a precision that real checkpoints are commonly drawn in
    one level             each value of the picture up or down by one: no screen and no eye shows that

A unit is under a limit if the picture that changes most is. The hooks of ``apply_gates`` do this without surgery.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from ecodiff import metrics
from ecodiff.errors import EcoDiffError
from ecodiff.lab import openmoji
from ecodiff.method.generate import generate
from ecodiff.method.hooks import apply_gates
from ecodiff.method.sites import Site, find_sites
from ecodiff.pipelines.identity import Identity
from ecodiff.pipelines.parts import denoiser
from ecodiff.storage import records
from ecodiff.storage.fingerprint import key

from .protocol import Protocol

Unit = tuple[str, int]
"""A site's name and the number of one of its units."""

ONE_LEVEL = 1.0
_FIRST_SCENE = 9_500_000  # far from the scenes of all other measurements


def sample_units(sites: Mapping[str, Site], per_kind: int, seed: int = 0) -> list[Unit]:
    """``per_kind`` different units of each kind of site (all, where there are fewer), drawn by ``seed``."""
    if per_kind < 1:
        raise EcoDiffError(f"per_kind={per_kind}: a sample needs at least one unit of each kind.")
    chosen: list[Unit] = []
    for kind in _kinds(sites):
        units = []
        for name, site in sites.items():
            if site.kind == kind:
                units += [(name, number) for number in range(site.units)]
        chosen += random.Random(f"{seed} {kind}").sample(units, min(per_kind, len(units)))
    return chosen


def without(units: Sequence[Unit], sites: Mapping[str, Site]) -> dict[str, Tensor]:
    """Gates that are 0 for these units and 1 for the others of their sites, as ``apply_gates`` takes them."""
    values = {name: torch.ones(sites[name].units) for name, _ in units}
    for name, index in units:
        values[name][index] = 0.0
    return values


def change(pictures: Tensor, original: Tensor) -> dict[str, list[float]]:
    """How each picture uint8 [N, 3, H, W] differs from its original: ``rms`` in levels of 255, and ``ssim``."""
    levels = (pictures.float() - original.float()).square().mean((1, 2, 3)).sqrt()
    return {
        "rms": [round(value, 4) for value in levels.tolist()],
        "ssim": [round(value, 6) for value in metrics.ssim(pictures, original).tolist()],
    }


def measure(
    pipe, protocol: Protocol, *, per_kind: int = 64, prompts: int = 3, seed: int = 0, recompute: bool = False
) -> dict:
    """The recorded row (``data/results/redundancy.jsonl``) of single removals, or a new one.

    Its values: ``units`` (site, number, kind), ``rms`` and ``ssim`` of each unit's removal (a list of one number a
    prompt), ``references`` {name: the same of a change that removes nothing}, and ``together``: all units of the sample
    that stay under one level alone, removed at once.

    Args:
        pipe: the pipeline.
        protocol: how it is drawn (``Protocol.of(model)``).
        per_kind: units of each kind in the sample. A unit costs one drawing of the prompts.
        prompts: scenes of split ``seen`` whose captions are drawn, the same for all models.
        seed: draws the sample.
        recompute: measure anew and replace the row.
    """
    scenes = list(openmoji.scenes("seen", prompts, start=_FIRST_SCENE))
    captions, noise = [scene.caption for scene in scenes], list(range(prompts))
    model = Identity.of(pipe)
    config = {
        "what": "single removals",
        "model": protocol.model,
        "weights": model.denoiser,
        "vae": model.vae,
        "conditions": key(model.conditions),
        "per_kind": per_kind,
        "captions": captions,
        "sampling": protocol.sampling,
        "seed": seed,
        "version": 1,
    }

    def run() -> dict:
        return removals(pipe, captions, noise, protocol.sampling, per_kind, seed)

    return records.measure(config, run, name="redundancy", recompute=recompute)


def removals(pipe, captions: list[str], noise: list[int], sampling: Mapping, per_kind: int, seed: int) -> dict:
    """The values of ``measure``, measured now."""
    network = denoiser(pipe)
    sites = find_sites(network)

    def drawn(gone: Sequence[Unit] = (), seeds: list[int] = noise, **options) -> Tensor:
        with apply_gates(network, without(gone, sites), sites) if gone else nullcontext():
            return generate(pipe, captions, seeds, progress=False, **options, **sampling)

    original = drawn()
    with in_bf16(pipe):
        rounded = drawn()
    references = {
        "another batch shape": drawn(batch_size=1) if len(captions) > 1 else original,
        "bf16 arithmetic": rounded,
        "one level": _one_level_off(original),
        "another noise": drawn(seeds=[value + 1000 for value in noise]),
    }
    units = sample_units(sites, per_kind, seed)
    changes = [change(drawn([unit]), original) for unit in units]
    hidden = []  # removed alone, none of these shows in any image
    for unit, found in zip(units, changes, strict=True):
        if max(found["rms"]) <= ONE_LEVEL:
            hidden.append(unit)
    population = dict.fromkeys(_kinds(sites), 0)
    for site in sites.values():
        population[site.kind] += site.units
    return {
        "units": [[name, index, sites[name].kind] for name, index in units],
        "population": population,
        "rms": [found["rms"] for found in changes],
        "ssim": [found["ssim"] for found in changes],
        "references": {name: change(images.to(torch.uint8), original) for name, images in references.items()},
        "together": {"units": len(hidden), **change(drawn(hidden), original)},
    }


def _one_level_off(images: Tensor) -> Tensor:
    """Images with each value up or down by one, at random; values at an end of 0 to 255 go the other way."""
    flips = 2 * torch.randint(0, 2, images.shape, generator=torch.Generator().manual_seed(0)) - 1
    at_an_end = (images + flips).clamp(0, 255) == images
    return torch.where(at_an_end, images - flips, images + flips)


@contextmanager
def in_bf16(pipe) -> Iterator[None]:
    """Inside, matrix products and convolutions are computed in bf16; noise, weights and scheduler stay in fp32."""
    with torch.autocast(pipe.device.type, torch.bfloat16), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")  # an unfused norm
        yield


def _kinds(sites: Mapping[str, Site]) -> list[str]:
    """The kinds of these sites, each once, in their order."""
    return list(dict.fromkeys(site.kind for site in sites.values()))


def worst(values: Mapping, kind: str | None = None) -> list[float]:
    """The change (``rms``) of each unit's removal in the picture that changes most; of one kind, or of all units."""
    changes = []
    for (_, _, kind_of_unit), levels in zip(values["units"], values["rms"], strict=True):
        if kind in (None, kind_of_unit):
            changes.append(max(levels))
    return changes


def limits(values: Mapping) -> dict[str, float]:
    """The limits of the module's docstring in levels: the largest change of each reference that removes nothing."""
    return {name: max(found["rms"]) for name, found in values["references"].items() if name != "another noise"}
