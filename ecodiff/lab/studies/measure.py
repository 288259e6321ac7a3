"""Measuring cells: units are scored, removed, and the smaller model's images are judged. `results` reads what is there.

A cell of a comparison is a recorded row (``storage/records.py``). Its configuration names everything that its values
depend on, weights included, so a row is read where nothing has changed and measured again where anything has.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ecodiff.baselines import blocks
from ecodiff.baselines.deepcache import deepcache
from ecodiff.cost.watch import flops_while
from ecodiff.errors import EcoDiffError
from ecodiff.lab.openmoji.judges import judge
from ecodiff.method.gates import Gates
from ecodiff.method.generate import generate
from ecodiff.method.learn import LearnConfig, learn
from ecodiff.method.mask import make_mask
from ecodiff.method.sites import find_sites
from ecodiff.method.surgery import fold_gates, prune
from ecodiff.pipelines.contents import weights_hash
from ecodiff.pipelines.identity import Identity, describe_run
from ecodiff.pipelines.loading import load_once
from ecodiff.pipelines.parts import denoiser
from ecodiff.pipelines.prompts import mix
from ecodiff.retraining import two_four
from ecodiff.retraining.retrain import retrain
from ecodiff.scores import METHODS, prune_adapted
from ecodiff.storage import records
from ecodiff.storage.cache import cache_folder, cached

from .cell import BLOCKS, Cell, apart, calibration, describe_cell, sampling_of
from .images import draw, judge_pictures, similarity
from .plan import SEEDS
from .protocol import Protocol
from .results import as_it_is, chosen, describe_removed, describe_sparing, file_of_gates


@dataclass(frozen=True)
class Kept:
    """What is kept from earlier measurements and may be read: learned gates; scores and images."""

    gates: bool = True
    images: bool = True


NOTHING = Kept(gates=False, images=False)


def run(cell: Cell, pipe=None, *, recompute: bool = False, identity: Identity | None = None) -> dict:
    """What one cell comes to, recorded or measured now.

    Returns lists with one entry an image: ``ssim`` (to the original's image of the same caption and noise), ``colour``
    (1 where the background has the named colour); with ``protocol.features`` also ``object`` (1 where the probe names
    the one object) and the numbers ``fid`` and ``kid`` to the real scenes of the same captions; with a trained judge
    ``clip`` (100 times the cosine with the caption), ``found`` (1 where all objects are there) and ``facts`` (1 where
    all that the caption says is); of clips ``motion`` (1 where the object moves as it should); and the denoiser's
    number of ``parameters`` and its ``gflop`` for an image (``picture_gflop``).

    Args:
        cell: what is measured.
        pipe: the model; by default that of the cell's protocol.
        recompute: measure again, from nothing that is kept, and replace the row.
        identity: of ``pipe``, where it is known already.
    """
    if pipe is None:
        pipe = load_once(cell.protocol.model)
    described = describe_cell(identity or Identity.of(pipe), cell)
    kept = NOTHING if recompute else Kept()
    row = records.measure(described, lambda: measure_cell(pipe, cell, kept), name="compare", recompute=recompute)
    return row["values"]


def measured(
    study: str,
    model: str,
    seeds: int = SEEDS,
    *,
    only: Sequence[str] = (),
    adjust: Callable[[Cell], Cell] = as_it_is,
) -> dict[str, list[dict]]:
    """A study as `results.recorded` returns it, with what is not recorded measured now."""
    rows: dict[str, list[dict]] = {}
    pipe = load_once(model)
    identity = Identity.of(pipe)
    for _, name, cell in chosen(study, model, seeds, only):
        rows.setdefault(name, []).append(run(adjust(cell), pipe, identity=identity))
    return rows


def learned_gates(pipe, captions: Sequence[str], config: LearnConfig, *, recompute: bool = False) -> Gates:
    """Gates learned with this configuration: from ``data/results/gates`` if they are kept there, else learned and kept.

    The file's name is the hash of configuration, captions, scheduler and the denoiser's weights. ECODIFF_RECORDS=off
    neither reads nor writes.
    """
    described = describe_run(Identity.of(pipe, vae=False), list(captions), config)
    path = file_of_gates({**described, "updates": config.updates})
    if path in learned_here:
        return learned_here[path]
    stored = records.enabled()
    if stored and path.exists() and not (recompute or records.recompute_asked()):
        return Gates.load(path, denoiser(pipe))
    gates = learned_here[path] = learn(pipe, captions, config, progress=False)
    if stored:
        path.parent.mkdir(parents=True, exist_ok=True)
        gates.save(path)
    return gates


learned_here: dict[Path, Gates] = {}  # so that a process that recomputes learns each mask once


def scores_of(pipe, method: str, captions: Sequence[str], config: LearnConfig, seed: int, kept: Kept = Kept()):
    """Scores {site: [units]} of a method by name: "learned" (with this seed), or one of ``ecodiff.scores``.

    Methods that watch the model generate images see the first captions (``calibration``), with the steps, guidance,
    kinds and call arguments of ``config``.
    """
    method, _ = apart(method)
    if method == "learned":
        return learned_gates(pipe, captions, replace(config, seed=seed), recompute=not kept.gates).scores()
    if method not in METHODS:
        raise EcoDiffError(f"Unknown method {method!r}: take learned, {', '.join(METHODS)}.")
    seen, settings = calibration(method, captions), {"kinds": config.kinds, **sampling_of(config, seed)}

    def compute() -> Tensor:
        computed = METHODS[method](pipe, seen, progress=False, **settings)
        return torch.cat([computed[name] for name in sorted(computed)])  # the cache stores one tensor

    scores = _computed_once(pipe, {"method": method, "captions": seen, **settings}, compute, kept)
    sites = find_sites(denoiser(pipe), config.kinds)
    names = sorted(sites)
    parts = scores.split([sites[name].units for name in names])
    return dict(zip(names, parts, strict=True))


def _computed_once(pipe, request: dict, compute: Callable[[], Tensor], kept: Kept) -> Tensor:
    """Scores, kept beside images: other ratios and evaluation sets need the same ones."""
    request = {**request, "version": 1}
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module):
            request[name] = weights_hash(part)
    request["scheduler"] = json.loads(json.dumps(dict(pipe.scheduler.config), default=repr))
    return cached(cache_folder("scores", anew=not kept.images), "scores", request, compute)


def pruned_by(pipe, method: str, mask: Mapping[str, Tensor], captions: Sequence[str], config: LearnConfig, seed: int):
    """The smaller pipeline for a mask: cut and, for a method "...+compensation", adapted to what has gone."""
    _, extras = apart(method)
    if "compensation" not in extras:
        return prune(pipe, mask)
    kinds = tuple(kind for kind in config.kinds if kind != "modulation")
    seen = calibration("obs", captions)
    return prune_adapted(pipe, mask, seen, kinds=kinds, progress=False, **sampling_of(config, seed))


def smaller_model(pipe, cell: Cell, kept: Kept = Kept()):
    """The pipeline that a cell judges; for "original" ``pipe`` itself."""
    smaller = _pruned(pipe, cell, kept)
    if not cell.retrain:
        return smaller
    captions, settings = cell.captions(), cell.protocol.sampling
    seeds = [mix(cell.seed, i) for i in range(len(captions))]
    folder = cache_folder("pictures", anew=not kept.images)
    images = generate(pipe, captions, seeds, cache_dir=folder, progress=False, **settings)
    call = {name: value for name, value in settings.items() if name != "num_inference_steps"}
    config = replace(cell.retrain, seed=cell.seed, call=call)
    return retrain(smaller, images, captions, config, progress=False)


def _pruned(pipe, cell: Cell, kept: Kept):
    """The pipeline of a cell before any retraining."""
    method, extras = apart(cell.method)
    if method == "original":
        return pipe
    if method == "sparse24":
        return two_four.sparsify(pipe)
    captions = cell.captions()
    if method in BLOCKS:
        return _without_blocks(pipe, method, calibration(method, captions), cell, kept)
    mask = _mask(pipe, cell, kept)
    if "soft" in extras:
        gates = learned_gates(source_of(pipe, cell), captions, cell.seeded)
        pipe = fold_gates(pipe, gates.deterministic())
    return pruned_by(pipe, cell.method, mask, captions, cell.config, cell.seed)


def source_of(pipe, cell: Cell):
    """The pipeline whose units are scored."""
    if cell.learned_on:
        return load_once(cell.learned_on)
    return pipe


def _mask(pipe, cell: Cell, kept: Kept = Kept()) -> dict[str, Tensor]:
    """The mask {site: bool [units]} of a cell whose method scores units."""
    method, _ = apart(cell.method)
    scores = scores_of(source_of(pipe, cell), method, cell.captions(), cell.config, cell.seed, kept)
    return make_mask(scores, find_sites(denoiser(pipe)), cell.ratio, scope=cell.scope, count=cell.count)


def removed_units(pipe, cell: Cell) -> dict[str, dict]:
    """How many units of each site a cell's mask removes, recorded or computed now.

    Returns {site: {"kind", "units", "removed", "params_per_unit"}}. The mask depends on no image that is judged, so the
    row does not depend on the protocol.
    """

    def count() -> dict:
        mask = _mask(pipe, cell)
        counts = {}
        for name, site in find_sites(denoiser(pipe)).items():
            counts[name] = {
                "kind": site.kind,
                "units": site.units,
                "removed": int((~mask[name]).sum()),
                "params_per_unit": site.params_per_unit,
            }
        return counts

    return records.measure(describe_removed(Identity.of(pipe), cell), count, name="removed_units")["values"]


def sparing(pipe, cell: Cell, sites: Sequence[str]) -> dict:
    """What a cell comes to if no unit of these sites may go, recorded or measured now; as ``run`` otherwise.

    The next units of the cell's own order go in their place, so that as much is removed. Raises EcoDiffError for a name
    that is no site.
    """
    known = find_sites(denoiser(pipe))
    unknown = [name for name in sites if name not in known]
    if unknown:
        raise EcoDiffError(f"{unknown[0]!r} is no site of this model: take some of {', '.join(known)}.")

    def measure() -> dict:
        scores = dict(scores_of(pipe, cell.method, cell.captions(), cell.config, cell.seed))
        for name in sites:
            scores[name] = torch.full_like(scores[name], float("inf"))  # above every threshold
        mask = make_mask(scores, known, cell.ratio, scope=cell.scope, count=cell.count)
        return _judged(pipe, prune(pipe, mask), cell)

    return records.measure(describe_sparing(Identity.of(pipe), cell, sites), measure, name="spared")["values"]


def _without_blocks(pipe, method: str, captions: Sequence[str], cell: Cell, kept: Kept):
    """The pipeline without the whole blocks that a method of ``BLOCKS`` chooses."""
    settings = sampling_of(cell.config, cell.seed)
    sizes = blocks.candidates(denoiser(pipe))
    request = {"method": method, "captions": captions, **settings}
    choose = blocks.choose
    if method == "blocks-clip":
        if judge() is None:
            raise EcoDiffError("blocks-clip needs the judge: run python -m ecodiff zoo train openmoji-clip.")
        request["judge"] = weights_hash(judge().model)
        choose = blocks.choose_in_order

    def compute() -> Tensor:
        if method == "blocks":
            computed = blocks.scores(pipe, captions, progress=False, **settings)
        else:
            computed = blocks.clip_scores(pipe, captions, judge(), progress=False, **settings)
        return torch.tensor([computed[name] for name in sizes], dtype=torch.float64)

    values = _computed_once(pipe, request, compute, kept)
    scores = dict(zip(sizes, values.tolist(), strict=True))
    return blocks.remove(pipe, choose(scores, sizes, cell.ratio))


def measure_cell(pipe, cell: Cell, kept: Kept = Kept()) -> dict:
    """The values of a cell, measured now."""
    return _judged(pipe, smaller_model(pipe, cell, kept), cell, kept)


def _judged(pipe, smaller, cell: Cell, kept: Kept = Kept()) -> dict:
    """What ``run`` returns of a smaller pipeline, generated and judged now."""
    anew = not kept.images
    protocol, scenes = cell.protocol, cell.protocol.scenes()
    _, extras = apart(cell.method)
    reused = "deepcache" in extras
    drawn = original = draw(pipe, scenes, cell.seed, protocol, anew=anew)
    with deepcache(smaller, interval=2) if reused else nullcontext():
        if reused or smaller is not pipe:
            # The cache knows images by the weights of the pipeline, which reuse does not change: it must not keep them.
            drawn = draw(smaller, scenes, cell.seed, protocol, keep=not reused, anew=anew)
        gflop = picture_gflop(smaller, protocol)
    return {
        "parameters": sum(p.numel() for p in denoiser(smaller).parameters()),
        "gflop": gflop,
        "ssim": similarity(drawn, original),
        **judge_pictures(drawn, scenes, features=protocol.features),
    }


def picture_gflop(pipe, protocol: Protocol) -> float:
    """Billions of floating-point operations of the denoiser for one image, counted while one is generated.

    All steps count, guidance's second call and attention's products included.
    """
    scenes = protocol.scenes()[:1]
    return flops_while(denoiser(pipe), lambda: draw(pipe, scenes, 0, protocol, keep=False)).total / 1e9
