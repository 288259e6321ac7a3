"""What chapters measure and share: learned gates kept as files, methods under one protocol, latency in turns.

A cell of a comparison is a recorded row (``storage/records.py``). Its configuration names everything that its values
depend on, weights included, so a row is read where nothing has changed and measured again where anything has.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from ecodiff import metrics
from ecodiff.baselines import blocks
from ecodiff.baselines.deepcache import deepcache
from ecodiff.cost.trace import flops_while
from ecodiff.errors import EcoDiffError
from ecodiff.lab import openmoji
from ecodiff.method.gates import Gates
from ecodiff.method.generate import generate
from ecodiff.method.learn import LearnConfig, learn
from ecodiff.method.mask import make_mask
from ecodiff.method.resume import conditions, describe
from ecodiff.method.sites import find_sites
from ecodiff.method.surgery import fold_gates, prune
from ecodiff.pipelines.loading import denoiser, load_once
from ecodiff.pipelines.prompts import mix
from ecodiff.retraining import two_four
from ecodiff.retraining.config import RetrainConfig
from ecodiff.retraining.retrain import retrain
from ecodiff.scores import METHODS, prune_adapted
from ecodiff.storage import records
from ecodiff.storage.cache import cached, key, weights_hash
from ecodiff.storage.paths import data_dir

from .protocol import Protocol, anew, cache_folder, draw, judge, judge_pictures


@dataclass(frozen=True)
class Cell:
    """One cell of a table: how the units to go are chosen, and how the smaller model is judged.

    ``method`` is "original" (nothing goes), "learned", one of ``ecodiff.scores`` (with "blocks", "blocks-clip" and
    "sparse24"), or any of these with "+compensation" (the weights that stay are adapted), "+soft" (learned: the units
    that stay keep their gates as factors) and "+deepcache" (every other step reuses deep features; U-Nets only).
    ``seed`` is that of learning (or of the method's scores) and of the noise pictures are drawn from. ``prompts``
    captions of ``split`` are what learning or calibration sees. ``scope`` and ``count`` are ``make_mask``'s.
    """

    method: str = "learned"
    ratio: float = 0.2
    seed: int = 0
    protocol: Protocol = Protocol()
    config: LearnConfig = LearnConfig()
    prompts: int = 100
    split: str = "train"
    scope: str = "kind"
    count: str = "units"
    retrain: RetrainConfig | None = None
    """Retrain the smaller model so, on pictures that the original draws for the same captions."""
    learned_on: str = ""
    """Id of another model with the same sites, whose scores are taken; ``config`` is then for drawing with that one."""

    @property
    def seeded(self) -> LearnConfig:
        """``config`` with the cell's own seed: what a mask is learned with."""
        return replace(self.config, seed=self.seed)

    def captions(self) -> list[str]:
        """The captions that learning or calibration sees."""
        return list(_captions(self.split, self.prompts))


@lru_cache(maxsize=16)
def _captions(split: str, number: int) -> tuple[str, ...]:
    """Drawn once: pages describe hundreds of cells."""
    return tuple(openmoji.prompts(split, number))


def learned_gates(pipe, captions: Sequence[str], config: LearnConfig, *, recompute: bool = False) -> Gates:
    """Gates learned with this configuration: from ``data/results/gates`` if they are kept there, else learned and kept.

    The file's name is the hash of configuration, captions, scheduler and the denoiser's weights. ECODIFF_RECORDS=off
    neither reads nor writes.
    """
    path = _kept_gates(pipe, captions, config)
    if path in _learned_here:
        return _learned_here[path]
    kept = records.enabled()
    if kept and path.exists() and not (recompute or records.recompute_asked()):
        return Gates.load(path, denoiser(pipe))
    gates = _learned_here[path] = learn(pipe, captions, config, progress=False)
    if kept:
        path.parent.mkdir(parents=True, exist_ok=True)
        gates.save(path)
    return gates


def _kept_gates(pipe, captions: Sequence[str], config: LearnConfig) -> Path:
    """The file in which ``learned_gates`` keeps the gates of this configuration."""
    name = key({**describe(pipe, list(captions), config), "updates": config.updates})
    return data_dir() / "results" / "gates" / f"{name[:16]}.safetensors"


_learned_here: dict[Path, Gates] = {}  # so that a process that recomputes learns each mask once


def scores_of(pipe, method: str, captions: Sequence[str], config: LearnConfig, seed: int, recompute: bool = False):
    """Scores {site: [units]} of a method by name: "learned" (with this seed), or one of ``ecodiff.scores``.

    Methods that watch the model draw see the first captions (``calibration``), with the steps, guidance, kinds and call
    arguments of ``config``.
    """
    method, _ = apart(method)
    if method == "learned":
        return learned_gates(pipe, captions, replace(config, seed=seed), recompute=recompute).scores()
    if method not in METHODS:
        raise EcoDiffError(f"Unknown method {method!r}: take learned, {', '.join(METHODS)}.")
    seen, settings = calibration(method, captions), {"kinds": config.kinds, **_sampling(config, seed)}

    def compute() -> Tensor:
        found = METHODS[method](pipe, seen, progress=False, **settings)
        return torch.cat([found[name] for name in sorted(found)])

    sites = find_sites(denoiser(pipe), config.kinds)
    scores = _computed_once(pipe, {"method": method, "captions": seen, **settings}, compute)
    return dict(zip(sorted(sites), scores.split([sites[name].units for name in sorted(sites)]), strict=True))


def _computed_once(pipe, request: dict, compute: Callable[[], Tensor]) -> Tensor:
    """Scores, kept beside pictures: other ratios and evaluation sets need the same ones."""
    request = {**request, "version": 1}
    request |= {name: weights_hash(part) for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    request |= {"scheduler": json.loads(json.dumps(dict(pipe.scheduler.config), default=repr))}
    return cached(cache_folder("scores"), "scores", request, compute)


UNSEEING = ("random", "magnitude", "sparse24")  # methods that look at no picture: their rows depend on no captions
EXTRAS = ("compensation", "soft", "deepcache")  # what a method's name may have after it


def apart(method: str) -> tuple[str, list[str]]:
    """A method's name and its extras. Raises EcoDiffError for an extra that is none, or one that does not fit."""
    name, *extras = method.split("+")
    for extra in extras:
        if extra not in EXTRAS:
            raise EcoDiffError(f"Method {method!r}: +{extra} is not known: take +{', +'.join(EXTRAS)}.")
    if "soft" in extras and (name != "learned" or "compensation" in extras):
        raise EcoDiffError(f"Method {method!r}: only learned masks have gates to keep, without compensation.")
    return name, extras


def pruned_by(pipe, method: str, mask: Mapping[str, Tensor], captions: Sequence[str], config: LearnConfig, seed: int):
    """The smaller pipeline for a mask: cut and, for a method "...+compensation", adapted to what has gone."""
    if "compensation" not in apart(method)[1]:
        return prune(pipe, mask)
    kinds = tuple(kind for kind in config.kinds if kind != "modulation")
    seen = calibration("obs", captions)
    return prune_adapted(pipe, mask, seen, kinds=kinds, progress=False, **_sampling(config, seed))


def calibration(method: str, captions: Sequence[str]) -> list[str]:
    """The captions a method of ``ecodiff.scores`` watches: the first 32; 8 for occlusion, which draws them anew for
    every part; all for Gauss-Newton, which makes one backward pass with each, as a learned mask makes many."""
    return list(captions[: {"occlusion": 8, "gauss-newton": len(captions)}.get(method, 32)])


def _sampling(config: LearnConfig, seed: int) -> dict:
    return {
        "seed": seed,
        "num_inference_steps": config.num_inference_steps,
        "guidance_scale": config.guidance_scale,
        "call": config.call,
    }


def compare(pipe, cell: Cell, *, recompute: bool = False, only_recorded: bool = False) -> dict | None:
    """What one cell comes to, recorded or measured now; with ``only_recorded`` None where it is not recorded.

    Returns lists with one entry a picture: ``ssim`` (to the original's picture of the same caption and noise),
    ``colour`` (1 where the background has the named colour); with ``protocol.features`` also ``object`` (1 where the
    probe names the one object) and the numbers ``fid`` and ``kid`` to the real scenes of the same captions; with a
    trained judge ``clip`` (100 times the cosine with the caption), ``found`` (1 where all objects are there) and
    ``facts`` (1 where all that the caption says is); and the denoiser's number of ``parameters`` and its ``gflop`` for
    a picture (``picture_gflop``).
    """
    described = describe_cell(pipe, cell)
    if only_recorded:
        row = records.find(described, name="compare")
        return row and row["values"]
    return records.measure(described, lambda: measure_cell(pipe, cell, recompute), name="compare", recompute=recompute)[
        "values"
    ]


def describe_cell(pipe, cell: Cell) -> dict:
    """Everything that the values of a cell depend on: what its row is found by."""
    captions, config = cell.captions(), cell.seeded
    (base, extras), judged_by = apart(cell.method), judge()
    source = _source(pipe, cell)
    described = {
        "weights": weights_hash(denoiser(pipe)),
        "vae": weights_hash(pipe.vae),
        "conditions": key(conditions(pipe)),
        "judge": weights_hash(judged_by.model) if judged_by else None,
        "method": cell.method,
        "ratio": 0.0 if base == "original" else cell.ratio,
        "scope": cell.scope,
        "count": cell.count,
        "seed": cell.seed,
        "protocol": asdict(cell.protocol),
    }
    if base in UNSEEING and config.kinds != LearnConfig().kinds:
        described["kinds"] = config.kinds
    if base == "learned":
        described["learned"] = {**describe(source, captions, config), "updates": config.updates}
    elif cell.learned_on:
        described["scores of"] = weights_hash(denoiser(source))
    if cell.retrain:
        described["retrain"] = {**asdict(cell.retrain), "captions": key(captions)}
    if "compensation" in extras or base not in ("original", "learned", *UNSEEING):
        described["calibration"] = {
            **_sampling(config, cell.seed),
            "captions": key({name: calibration(name, captions) for name in (base, "obs")}),
            "kinds": config.kinds,
            "version": 1,
        }
    return described


def _source(pipe, cell: Cell):
    """The pipeline whose units are scored."""
    return load_once(cell.learned_on) if cell.learned_on else pipe


def gates_file(pipe, cell: Cell) -> Path:
    """Where the gates of a cell of learned masks are kept once they are learned."""
    return _kept_gates(_source(pipe, cell), cell.captions(), cell.seeded)


def smaller_model(pipe, cell: Cell, recompute: bool = False):
    """The pipeline that a cell judges; for "original" ``pipe`` itself."""
    smaller = _pruned(pipe, cell, recompute)
    if not cell.retrain:
        return smaller
    captions, settings = cell.captions(), cell.protocol.sampling
    seeds = [mix(cell.seed, i) for i in range(len(captions))]
    pictures = generate(pipe, captions, seeds, cache_dir=cache_folder("pictures"), progress=False, **settings)
    call = {name: value for name, value in settings.items() if name != "num_inference_steps"}
    config = replace(cell.retrain, seed=cell.seed, call=call)
    return retrain(smaller, pictures, captions, config, progress=False)


def _pruned(pipe, cell: Cell, recompute: bool):
    method, extras = apart(cell.method)
    if method == "original":
        return pipe
    if method == "sparse24":
        return two_four.sparsify(pipe)
    captions = cell.captions()
    if method in BLOCKS:
        return _without_blocks(pipe, method, calibration(method, captions), cell)
    mask = _mask(pipe, cell, recompute)
    if "soft" in extras:
        gates = learned_gates(_source(pipe, cell), captions, cell.seeded)
        pipe = fold_gates(pipe, gates.deterministic())
    return pruned_by(pipe, cell.method, mask, captions, cell.config, cell.seed)


def _mask(pipe, cell: Cell, recompute: bool = False) -> dict[str, Tensor]:
    """The mask {site: bool [units]} of a cell whose method scores units."""
    method, _ = apart(cell.method)
    scores = scores_of(_source(pipe, cell), method, cell.captions(), cell.config, cell.seed, recompute)
    return make_mask(scores, find_sites(denoiser(pipe)), cell.ratio, scope=cell.scope, count=cell.count)


def removed_units(pipe, cell: Cell, *, only_recorded: bool = False) -> dict[str, dict] | None:
    """How many units of each site a cell's mask removes, recorded or computed now; None where it is not recorded.

    Returns {site: {"kind", "units", "removed", "params_per_unit"}}. The mask depends on no image that is judged, so the
    row does not depend on the protocol.
    """
    described = describe_cell(pipe, cell)
    for judging in ("protocol", "judge", "vae"):
        del described[judging]
    described |= {"what": "removed_units", "version": 1}

    def count() -> dict:
        mask, sites = _mask(pipe, cell), find_sites(denoiser(pipe))
        return {
            name: {
                "kind": site.kind,
                "units": site.units,
                "removed": int((~mask[name]).sum()),
                "params_per_unit": site.params_per_unit,
            }
            for name, site in sites.items()
        }

    if only_recorded:
        row = records.find(described, name="removed_units")
        return row and row["values"]
    return records.measure(described, count, name="removed_units")["values"]


def compare_sparing(pipe, cell: Cell, sites: Sequence[str], *, only_recorded: bool = False) -> dict | None:
    """What a cell comes to if no unit of these sites may go, recorded or measured now; as ``compare`` otherwise.

    The next units of the cell's own order go in their place, so that as much is removed. Raises EcoDiffError for a name
    that is no site.
    """
    sites = sorted(sites)
    known = find_sites(denoiser(pipe))
    if unknown := [name for name in sites if name not in known]:
        raise EcoDiffError(f"{unknown[0]!r} is no site of this model: take some of {', '.join(known)}.")
    described = {**describe_cell(pipe, cell), "spared": sites}

    def measured() -> dict:
        scores = dict(scores_of(pipe, cell.method, cell.captions(), cell.config, cell.seed))
        scores |= {name: torch.full_like(scores[name], float("inf")) for name in sites}
        mask = make_mask(scores, known, cell.ratio, scope=cell.scope, count=cell.count)
        return _judged(pipe, prune(pipe, mask), cell)

    if only_recorded:
        row = records.find(described, name="spared")
        return row and row["values"]
    return records.measure(described, measured, name="spared")["values"]


BLOCKS = ("blocks", "blocks-clip")  # whole blocks by the prediction's error (LAPTOP-Diff), by CLIP score (SnapFusion)


def _without_blocks(pipe, method: str, captions: Sequence[str], cell: Cell):
    model, settings = denoiser(pipe), _sampling(cell.config, cell.seed)
    sizes = blocks.candidates(model)
    if method == "blocks-clip" and judge() is None:
        raise EcoDiffError("blocks-clip needs the judge: run python -m ecodiff zoo train openmoji-clip.")

    def compute() -> Tensor:
        if method == "blocks":
            found = blocks.scores(pipe, captions, progress=False, **settings)
        else:
            found = blocks.clip_scores(pipe, captions, judge(), progress=False, **settings)
        return torch.tensor([found[name] for name in sizes], dtype=torch.float64)

    by = {"judge": weights_hash(judge().model)} if method == "blocks-clip" else {}
    values = _computed_once(pipe, {"method": method, "captions": captions, **by, **settings}, compute)
    scores = dict(zip(sizes, values.tolist(), strict=True))
    choose = blocks.choose if method == "blocks" else blocks.choose_in_order
    return blocks.remove(pipe, choose(scores, sizes, cell.ratio))


def measure_cell(pipe, cell: Cell, recompute: bool = False) -> dict:
    """The values of a cell, measured now; gates, scores and pictures that are kept are read, unless ``recompute``."""
    with anew(recompute):
        return _judged(pipe, smaller_model(pipe, cell, recompute), cell)


def _judged(pipe, smaller, cell: Cell) -> dict:
    """What ``compare`` returns of a smaller pipeline, drawn and judged now."""
    protocol, scenes = cell.protocol, cell.protocol.scenes()
    reused = "deepcache" in apart(cell.method)[1]
    drawn = original = draw(pipe, scenes, cell.seed, protocol)
    with deepcache(smaller, interval=2) if reused else nullcontext():
        if reused or smaller is not pipe:
            drawn = draw(smaller, scenes, cell.seed, protocol, keep=not reused)
        gflop = picture_gflop(smaller, protocol)
    return {
        "parameters": sum(p.numel() for p in denoiser(smaller).parameters()),
        "gflop": gflop,
        "ssim": [round(value, 4) for value in metrics.ssim(drawn, original).tolist()],
        **judge_pictures(drawn, scenes, features=protocol.features),
    }


def picture_gflop(pipe, protocol: Protocol) -> float:
    """Billions of floating-point operations of the denoiser for one picture: all steps, with guidance's second call,
    attention's products included. Counted while one is drawn."""
    scenes = protocol.scenes()[:1]
    return flops_while(denoiser(pipe), lambda: draw(pipe, scenes, 0, protocol, keep=False)).total / 1e9


def interval_text(per_seed: Sequence[Sequence[float]], scale: float = 1.0, digits: int | None = None) -> str:
    """Mean over all seeds' values with its 95 % interval (bootstrap over seeds and pictures) as text, such as
    "0.812 (0.798 to 0.825)"; with three digits, or one for values that are scaled up, unless told otherwise."""
    values = [[scale * value for value in seed_values] for seed_values in per_seed if seed_values]
    if not values:
        return "–"
    interval = metrics.nested_interval(values)
    if digits is None:
        digits = 1 if scale > 1 else 3
    return f"{interval.mean:.{digits}f} ({interval.low:.{digits}f} to {interval.high:.{digits}f})"


def difference(first: Sequence[Sequence[float]], second: Sequence[Sequence[float]]) -> metrics.Interval:
    """Mean difference first - second with its 95 % interval over seeds and pictures, paired by both.

    Where no picture differs at all in a measure that is 0 or 1, resampling can only give an interval of no width. Then
    the interval is that of the rule of three: with n pictures of which none differs, up to a share of 1 - 0.05^(1/n),
    about 3/n, could differ with a chance of 5 % (Hanley & Lippman-Hand 1983).
    """
    pairs = [[a - b for a, b in zip(xs, ys, strict=True)] for xs, ys in zip(first, second, strict=True)]
    interval = metrics.nested_interval(pairs)
    values = {value for group in (*first, *second) for value in group}
    if interval.low == interval.high == 0 and values <= {0, 1}:
        unseen = 1 - 0.05 ** (1 / len(pairs[0]))
        return replace(interval, low=-unseen, high=unseen)
    return interval


def verdict(cells: Mapping[str, Sequence[Mapping[str, Sequence[float]]]], ours: str = "learned") -> str:
    """Sentences that say, from the paired intervals, whether ``ours`` keeps more than each other method."""
    lines = []
    for other in cells:
        if other == ours:
            continue
        for measure, words in (("ssim", "SSIM"), ("object", "objects named")):
            sets = [[cell.get(measure, []) for cell in cells[name]] for name in (ours, other)]
            if not sets[0][0]:
                continue
            d = difference(*sets)
            shown = f"{d.mean:+.3f}, 95 % interval {d.low:+.3f} to {d.high:+.3f}"
            lines.append(f"- {words}, {ours} against {other}: {d.word} (paired difference {shown}).")
    return "\n".join(lines)


def latency(models: Mapping[str, object], captions: Sequence[str], *, turns: int = 5, **settings) -> dict[str, dict]:
    """Seconds of drawing the captions with each pipeline, in turns; ratios to the first pipeline, pair by pair."""
    seconds: dict[str, list[float]] = {label: [] for label in models}
    for turn in range(turns + 1):  # the first turn warms up
        for label, pipe in models.items():
            started = time.perf_counter()
            generate(pipe, captions, range(len(captions)), progress=False, **settings)
            if turn:
                seconds[label].append(time.perf_counter() - started)
    base = seconds[next(iter(models))]
    result = {}
    for label, times in seconds.items():
        ratios = [a / b for a, b in zip(times, base, strict=True)]
        low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
        result[label] = {"seconds": statistics.median(times), "ratio": middle, "low": low, "high": high}
    return result
