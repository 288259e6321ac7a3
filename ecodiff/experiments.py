"""What chapters measure and share: learned gates kept as files, methods under one protocol, latency in turns.

A cell of a comparison is a recorded row (``ecodiff.records``). Its configuration names everything that its values
depend on, weights included, so a row is read where nothing has changed and measured again where anything has.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path

from torch import Tensor

from . import data, metrics, records
from .cache import key, weights_hash
from .errors import EcoDiffError
from .gates import Gates
from .generate import generate
from .learn import LearnConfig, learn
from .mask import make_mask
from .methods import METHODS, prune_compensated, second_moments
from .paths import data_dir, data_file
from .pipelines import denoiser
from .resume import describe
from .sites import find_sites
from .surgery import prune


@dataclass(frozen=True)
class Protocol:
    """How a model is judged: one-object prompts of the ``seen`` split, a noise of its own for each prompt and seed.

    ``objects`` also runs the object probe (Inception, about a picture in a tenth of a second on two cores).
    """

    model: str = "openmoji-sdxl"
    split: str = "seen"
    pictures: int = 200
    num_inference_steps: int = 12
    guidance_scale: float = 3.0
    objects: bool = True
    version: int = 1

    def scenes(self) -> list[data.Scene]:
        """The scenes whose captions are drawn."""
        return list(data.scenes(self.split, self.pictures, count=1))


def learned_gates(pipe, captions: Sequence[str], config: LearnConfig, *, recompute: bool = False) -> Gates:
    """Gates learned with this configuration: from ``data/results/gates`` if they are kept there, else learned and kept.

    The file's name is the hash of configuration, captions, scheduler and the denoiser's weights. ECODIFF_RECORDS=off
    neither reads nor writes.
    """
    model = denoiser(pipe)
    name = key({**describe(pipe, list(captions), config), "updates": config.updates})
    path = data_dir() / "results" / "gates" / f"{name[:16]}.safetensors"
    if name in _learned_here:
        return _learned_here[name]
    kept = os.environ.get("ECODIFF_RECORDS", "").lower() != "off"
    if kept and path.exists() and not (recompute or os.environ.get("ECODIFF_RECOMPUTE")):
        return Gates.load(path, model)
    gates = _learned_here[name] = learn(pipe, captions, config, progress=False)
    if kept:
        path.parent.mkdir(parents=True, exist_ok=True)
        gates.save(path)
    return gates


_learned_here: dict[str, Gates] = {}  # so that a process that recomputes learns each mask once


def scores_of(pipe, method: str, captions: Sequence[str], config: LearnConfig, seed: int, recompute: bool = False):
    """Scores {site: [units]} of a method by name: "learned" (with this seed), or one of ``ecodiff.methods``.

    Methods that watch the model draw see the first captions (``calibration``), with the steps, guidance, kinds and call
    arguments of ``config``.
    """
    method = method.removesuffix(COMPENSATED)
    if method == "learned":
        return learned_gates(pipe, captions, replace(config, seed=seed), recompute=recompute).scores()
    if method not in METHODS:
        raise EcoDiffError(f"Unknown method {method!r}: take learned, {', '.join(METHODS)}.")
    return METHODS[method](
        pipe, calibration(method, captions), kinds=config.kinds, progress=False, **_sampling(config, seed)
    )


COMPENSATED = "+compensation"  # after a method's name: the weights that stay are adapted by second moments


def pruned_by(pipe, method: str, mask: Mapping[str, Tensor], captions: Sequence[str], config: LearnConfig, seed: int):
    """The smaller pipeline for a mask: cut and, for a method "...+compensation", adapted to what has gone."""
    if not method.endswith(COMPENSATED):
        return prune(pipe, mask)
    kinds = tuple(kind for kind in config.kinds if kind != "modulation")
    seen = calibration("obs", captions)
    return prune_compensated(
        pipe, mask, second_moments(pipe, seen, kinds=kinds, progress=False, **_sampling(config, seed))
    )


def calibration(method: str, captions: Sequence[str]) -> list[str]:
    """The captions a method of ``ecodiff.methods`` watches: the first 32; 8 for occlusion, which draws them anew for
    every part."""
    return list(captions[: 8 if method == "occlusion" else 32])


def _sampling(config: LearnConfig, seed: int) -> dict:
    return {
        "seed": seed,
        "num_inference_steps": config.num_inference_steps,
        "guidance_scale": config.guidance_scale,
        "call": config.call,
    }


def compare(
    pipe,
    method: str,
    ratio: float,
    seed: int,
    protocol: Protocol,
    *,
    captions: Sequence[str],
    config: LearnConfig,
    recompute: bool = False,
) -> dict[str, list[float]]:
    """One cell: prune by a method's scores, draw, and judge each picture.

    ``seed`` is that of learning (or of the method's scores) and of the noise pictures are drawn from. Method "original"
    prunes nothing; "obs+compensation", or any method so, also adapts the weights that stay.

    Returns lists with one entry a picture: ``ssim`` (to the original's picture of the same caption and noise),
    ``colour`` (1 where the background has the named colour), ``object`` (1 where the probe names the object; empty
    without ``protocol.objects``).
    """
    described = {
        "weights": weights_hash(denoiser(pipe)),
        "vae": weights_hash(pipe.vae),
        "method": method,
        "ratio": 0.0 if method == "original" else ratio,
        "scope": "kind",
        "count": "units",
        "seed": seed,
        "protocol": asdict(protocol),
        "learned": {**describe(pipe, list(captions), replace(config, seed=seed)), "updates": config.updates}
        if method.removesuffix(COMPENSATED) == "learned"
        else None,
    }
    if method.endswith(COMPENSATED) or method not in ("original", "learned", "random", "magnitude"):
        described["calibration"] = {
            **_sampling(config, seed),
            "captions": key({name: calibration(name, captions) for name in (method.removesuffix(COMPENSATED), "obs")}),
            "kinds": config.kinds,
            "version": 1,
        }

    def judge() -> dict:
        scenes = protocol.scenes()
        original = _draw(pipe, scenes, seed, protocol)
        if method == "original":
            drawn = original
        else:
            scores = scores_of(pipe, method, captions, config, seed, recompute)
            mask = make_mask(scores, find_sites(denoiser(pipe)), ratio)
            drawn = _draw(pruned_by(pipe, method, mask, captions, config, seed), scenes, seed, protocol)
        return {
            "ssim": [round(value, 4) for value in metrics.ssim(drawn, original).tolist()],
            **judge_pictures(drawn, scenes, objects=protocol.objects),
        }

    return records.measure(described, judge, name="compare", recompute=recompute)["values"]


def judge_pictures(drawn: Tensor, scenes: Sequence[data.Scene], objects: bool = True) -> dict[str, list[int]]:
    """Whether each picture (uint8 [N, 3, 64, 64]) has its scene's background and, if asked, names its object."""
    colour = metrics.background_correct(drawn, [scene.colour for scene in scenes], data.COLOURS)
    named = probe().correct(drawn, [scene.objects[0] for scene in scenes], progress=False) if objects else []
    return {"colour": [int(hit) for hit in colour], "object": [int(hit) for hit in named]}


@lru_cache(maxsize=1)
def probe() -> metrics.ObjectProbe:
    """The object probe kept under ``data/models/openmoji-probe``."""
    return metrics.ObjectProbe.load(data_file("models/openmoji-probe/probe.safetensors"))


def _draw(pipe, scenes: Sequence[data.Scene], seed: int, protocol: Protocol) -> Tensor:
    return generate(
        pipe,
        [scene.caption for scene in scenes],
        [1_000_000 * (seed + 1) + scene.index for scene in scenes],
        num_inference_steps=protocol.num_inference_steps,
        guidance_scale=protocol.guidance_scale,
        cache_dir=_pictures_folder(),
        progress=False,
    )


def _pictures_folder() -> Path | None:
    """Drawn pictures are kept outside git, so that cells share the original's; none with ECODIFF_RECORDS=off."""
    off = os.environ.get("ECODIFF_RECORDS", "").lower() == "off"
    return None if off else data_dir() / ".cache" / "pictures"


def interval_text(per_seed: Sequence[Sequence[float]], scale: float = 1.0) -> str:
    """Mean over all seeds' values with its 95 % interval (bootstrap over pictures), as "0.812 (0.798 to 0.825)"."""
    values = [scale * value for seed_values in per_seed for value in seed_values]
    if not values:
        return "–"
    interval = metrics.bootstrap_interval(values)
    digits = 1 if scale > 1 else 3
    return f"{interval.mean:.{digits}f} ({interval.low:.{digits}f} to {interval.high:.{digits}f})"


def difference(first: Sequence[Sequence[float]], second: Sequence[Sequence[float]]) -> metrics.Interval:
    """Mean difference first - second with its 95 % interval, paired by picture and seed."""
    pairs = [a - b for xs, ys in zip(first, second, strict=True) for a, b in zip(xs, ys, strict=True)]
    return metrics.bootstrap_interval(pairs)


def verdict(cells: Mapping[str, Sequence[Mapping[str, Sequence[float]]]], ours: str = "learned") -> str:
    """Sentences that say, from the paired intervals, whether ``ours`` keeps more than each other method."""
    lines = []
    for other in cells:
        if other == ours:
            continue
        for measure, words in (("ssim", "SSIM"), ("object", "objects named")):
            sets = [[cell[measure] for cell in cells[name]] for name in (ours, other)]
            if not sets[0][0]:
                continue
            d = difference(*sets)
            outcome = "keeps more" if d.low > 0 else "keeps less" if d.high < 0 else "cannot be told apart"
            shown = f"{d.mean:+.3f}, 95 % interval {d.low:+.3f} to {d.high:+.3f}"
            than = "than" if outcome != "cannot be told apart" else "from"
            lines.append(f"- {words}: {ours} {outcome} {than} {other} (paired difference {shown}).")
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
