"""How the measures of quality behave on known pictures: real ones, real ones changed, two halves of one set.

The rows of the chapter on quality (``data/results/quality.jsonl``). Nothing here compares methods: see
``ecodiff.lab.studies.measure``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate, pad

from ecodiff import metrics
from ecodiff.errors import EcoDiffError
from ecodiff.lab import openmoji
from ecodiff.lab.openmoji.judges import judge, probe, real_features
from ecodiff.metrics.clip import clip_score
from ecodiff.pipelines.conditioning import through_vae
from ecodiff.pipelines.identity import Identity
from ecodiff.storage import records

from .cell import Cell, describe_cell
from .images import draw
from .measure import NOTHING, Kept, smaller_model

NETWORK = "inception-2015-12-05"


def changed(scenes: Sequence[openmoji.Scene], seed: int = 0) -> dict[str, Tensor]:
    """Real scenes, each changed in one known way: {change: uint8 [N, 3, 64, 64]}, "nothing" first."""
    names, colours = openmoji.object_names(), list(openmoji.COLOURS)
    pictures = openmoji.images(scenes)
    x = pictures.float()
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))

    def other(choices: Sequence[str], now: str, step: int) -> str:
        return choices[(choices.index(now) + 1 + step % (len(choices) - 1)) % len(choices)]

    def drawn_again(objects, colour) -> Tensor:
        found = [openmoji.render(objects(s), colour(s), s.boxes if objects(s) else ()) for s in scenes]
        return torch.stack([torch.tensor(picture) for picture in found]).permute(0, 3, 1, 2)

    found = {
        "nothing": x,
        "brighter by 20 of 255": x + 20,
        "noise, deviation 10 of 255": x + 10 * noise,
        "mean over 3x3 pixels": avg_pool2d(pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1),
        "moved by 1 pixel": pad(x, (1, 0, 0, 0), mode="replicate")[..., :-1],
        "moved by 3 pixels": pad(x, (3, 0, 0, 0), mode="replicate")[..., :-3],
        "another background": drawn_again(lambda s: s.objects, lambda s: other(colours, s.colour, s.index)),
        "another object": drawn_again(
            lambda s: tuple(other(names, name, s.index) for name in s.objects), lambda s: s.colour
        ),
        "no object": drawn_again(lambda s: (), lambda s: s.colour),
    }
    return {change: y.float().round().clamp(0, 255).to(torch.uint8) for change, y in found.items()}


def resized(pictures: Tensor, size: int) -> Tensor:
    """uint8 pictures [N, 3, H, W] -> [N, 3, size, size], bicubic (as App. E.1 of the paper, with size 512)."""
    y = interpolate(pictures.float(), (size, size), mode="bicubic", antialias=True, align_corners=False)
    return y.round().clamp(0, 255).to(torch.uint8)


def halves(scenes: int, sizes: Sequence[int], draws: int, seed: int = 0, recompute: bool = False) -> dict:
    """FID and KID between two disjoint random sets of n real scenes, as a row of ``records``.

    Its values: ``fid`` and ``kid``, {n: [one a draw]} for n in ``sizes``; and ``object``, whether the probe names each
    of the ``scenes`` rightly. The sets are drawn anew ``draws`` times from the same scenes, so draws are not
    independent, least of all where n is half of the scenes. Raises EcoDiffError for sizes above that.
    """
    if max(sizes) > scenes // 2:
        raise EcoDiffError(f"{scenes} scenes have no two disjoint sets of {max(sizes)}: take at most {scenes // 2}.")
    config = {"measurement": "halves", "scenes": scenes, "sizes": sizes, "draws": draws, "seed": seed, **_judged_by()}

    def measured() -> dict:
        shown = list(openmoji.scenes("seen", scenes, count=1))
        features = real_features(shown)
        generator = torch.Generator().manual_seed(seed)
        found: dict = {"fid": {}, "kid": {}}
        for n in sizes:
            orders = [torch.randperm(scenes, generator=generator) for _ in range(draws)]
            pairs = [(features[order[:n]], features[order[n : 2 * n]]) for order in orders]
            found["fid"][n] = [round(metrics.fid(*pair), 4) for pair in pairs]
            found["kid"][n] = [round(kid(*pair), 8) for pair in pairs]
        return found | {"object": probe().correct(features, [scene.objects[0] for scene in shown]).int()}

    return records.measure(config, measured, name="quality", recompute=recompute)


def _judged_by() -> dict:
    """What every row with features depends on."""
    return {"network": NETWORK, "probe": probe().weight, "version": 1}


def kid(a: Tensor, b: Tensor) -> float:
    """KID of all pictures of two equally large sets of features at once."""
    return metrics.kid(a, b, subsets=1, subset_size=len(a))[0]


def known_sets(pipe, cell: Cell, recompute: bool = False) -> dict:
    """All measures on sets of known origin, {set: {measure: value, or one a picture}}, as a row of ``records``.

    ``real``: other real scenes; ``vae``: the prompts' own real scenes, encoded and decoded; ``bicubic``: the same,
    resized to 512 and so to Inception; ``original``, ``again``: the original model's pictures, the second time from
    other noise; ``pruned``: those of the cell's smaller model, from the noise of ``original``. ``fid`` and ``kid`` are
    to the prompts' real scenes, ``fid_others`` and ``kid_others`` to as many real scenes of other captions (a set that
    is independent of what is measured, as KID wants it). SSIM is to the prompts' real scenes for ``vae``, and to
    ``original`` for what is drawn.
    """
    described = describe_cell(Identity.of(pipe), cell)
    described.pop("judge")  # not asked here
    config = {"measurement": "known sets", "cell": described, "seed": cell.seed, **_judged_by()}
    return records.measure(config, lambda: _known_sets(pipe, cell, recompute), name="quality", recompute=recompute)


def _known_sets(pipe, cell: Cell, recompute: bool) -> dict:
    scenes = cell.protocol.scenes()
    n = len(scenes)
    others = [openmoji.scene(i, cell.protocol.split, cell.protocol.count) for i in range(n, 2 * n)]
    features = real_features([*scenes, *others])
    own = openmoji.images(scenes)
    pictures = {"bicubic": resized(own, 512), "vae": through_vae(pipe.vae, own), **drawn_sets(pipe, cell, recompute)}
    references = {"vae": own} | dict.fromkeys(("again", "pruned"), pictures["original"])

    def measured(seen: Tensor, shown: Sequence[openmoji.Scene], images: Tensor) -> dict:
        return {
            **distances(features[:n], seen),
            "object": probe().correct(seen, [scene.objects[0] for scene in shown]).int(),
            "colour": openmoji.background_correct(images, [scene.colour for scene in shown], openmoji.COLOURS).int(),
        }

    def distances(reference: Tensor, seen: Tensor, ending: str = "") -> dict:
        found = {"fid": round(metrics.fid(reference, seen), 4), "kid": round(kid(reference, seen), 8)}
        return {name + ending: value for name, value in found.items()}

    found = {"real": measured(features[n:], others, openmoji.images(others))}
    for name, images in pictures.items():
        seen = metrics.inception_features(images, progress=False)
        small = own if name == "bicubic" else images
        found[name] = {**measured(seen, scenes, small), **distances(features[n:], seen, "_others")}
        if name in references:
            found[name]["ssim"] = [round(value, 4) for value in metrics.ssim(images, references[name]).tolist()]
    return found


def drawn_sets(pipe, cell: Cell, recompute: bool = False) -> dict[str, Tensor]:
    """The pictures ``original``, ``again`` and ``pruned`` of ``known_sets``: uint8 [N, 3, 64, 64]."""
    scenes = cell.protocol.scenes()
    return {
        "original": draw(pipe, scenes, cell.seed, cell.protocol),
        "again": draw(pipe, scenes, cell.seed + 1, cell.protocol),
        "pruned": draw(smaller_model(pipe, cell, NOTHING if recompute else Kept()), scenes, cell.seed, cell.protocol),
    }


def judged_sets(pipe, cell: Cell, recompute: bool = False) -> dict | None:
    """CLIP scores of the same sets, {set: {"score": torchmetrics', "each": one a picture}}; None without a judge.

    ``real``: the prompts' real scenes; ``real, others' captions``: each with the caption of the next.
    """
    if judge() is None:
        return None
    config = {
        "measurement": "judged sets",
        "cell": describe_cell(Identity.of(pipe), cell),
        "seed": cell.seed,
        "version": 1,
    }

    def measured() -> dict:
        scenes = cell.protocol.scenes()
        captions = [scene.caption for scene in scenes]
        pictures = {"real": openmoji.images(scenes), **drawn_sets(pipe, cell, recompute)}
        asked = {name: (images, captions) for name, images in pictures.items()}
        asked["real, others' captions"] = (pictures["real"], captions[1:] + captions[:1])
        return {name: _scores(*pair) for name, pair in asked.items()}

    return records.measure(config, measured, name="quality", recompute=recompute)


def _scores(images: Tensor, captions: Sequence[str]) -> dict:
    cosines = (judge().image_features(images) * judge().text_features(captions)).sum(-1)
    return {
        "score": round(clip_score(images, captions, judge()), 3),
        "each": [round(100 * value, 2) for value in cosines.tolist()],
    }
