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
    x = openmoji.images(scenes).float()
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    other_colour, other_object, no_object = [], [], []
    for scene in scenes:
        colour = _other(colours, scene.colour, scene.index)
        objects = tuple(_other(names, name, scene.index) for name in scene.objects)
        other_colour.append(torch.tensor(openmoji.render(scene.objects, colour, scene.boxes)))
        other_object.append(torch.tensor(openmoji.render(objects, scene.colour, scene.boxes)))
        no_object.append(torch.tensor(openmoji.render((), scene.colour, ())))
    images = {
        "nothing": x,
        "brighter by 20 of 255": x + 20,
        "noise, deviation 10 of 255": x + 10 * noise,
        "mean over 3x3 pixels": avg_pool2d(pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1),
        "moved by 1 pixel": pad(x, (1, 0, 0, 0), mode="replicate")[..., :-1],
        "moved by 3 pixels": pad(x, (3, 0, 0, 0), mode="replicate")[..., :-3],
        "another background": torch.stack(other_colour).permute(0, 3, 1, 2),
        "another object": torch.stack(other_object).permute(0, 3, 1, 2),
        "no object": torch.stack(no_object).permute(0, 3, 1, 2),
    }
    return {change: y.float().round().clamp(0, 255).to(torch.uint8) for change, y in images.items()}


def _other(choices: Sequence[str], present: str, step: int) -> str:
    """One of the choices that is not the present one; which, ``step`` says."""
    place = choices.index(present) + 1 + step % (len(choices) - 1)
    return choices[place % len(choices)]


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
        values: dict = {"fid": {}, "kid": {}}
        for n in sizes:
            orders = [torch.randperm(scenes, generator=generator) for _ in range(draws)]
            pairs = [(features[order[:n]], features[order[n : 2 * n]]) for order in orders]
            values["fid"][n] = [round(metrics.fid(*pair), 4) for pair in pairs]
            values["kid"][n] = [round(kid(*pair), 8) for pair in pairs]
        objects = [scene.objects[0] for scene in shown]
        return values | {"object": probe().correct(features, objects).int()}

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
        return {
            f"fid{ending}": round(metrics.fid(reference, seen), 4),
            f"kid{ending}": round(kid(reference, seen), 8),
        }

    values = {"real": measured(features[n:], others, openmoji.images(others))}
    for name, images in pictures.items():
        seen = metrics.inception_features(images, progress=False)
        small = own if name == "bicubic" else images  # colours are judged at the size of a scene
        values[name] = {**measured(seen, scenes, small), **distances(features[n:], seen, "_others")}
        if name in references:
            values[name]["ssim"] = [round(value, 4) for value in metrics.ssim(images, references[name]).tolist()]
    return values


def drawn_sets(pipe, cell: Cell, recompute: bool = False) -> dict[str, Tensor]:
    """The pictures ``original``, ``again`` and ``pruned`` of ``known_sets``: uint8 [N, 3, 64, 64]."""
    scenes = cell.protocol.scenes()
    kept = NOTHING if recompute else Kept()
    return {
        "original": draw(pipe, scenes, cell.seed, cell.protocol),
        "again": draw(pipe, scenes, cell.seed + 1, cell.protocol),
        "pruned": draw(smaller_model(pipe, cell, kept), scenes, cell.seed, cell.protocol),
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
        values = {name: _scores(images, captions) for name, images in pictures.items()}
        values["real, others' captions"] = _scores(pictures["real"], captions[1:] + captions[:1])
        return values

    return records.measure(config, measured, name="quality", recompute=recompute)


def _scores(images: Tensor, captions: Sequence[str]) -> dict:
    """CLIP scores of a set of images: torchmetrics' own of the set, and one for each image."""
    cosines = (judge().image_features(images) * judge().text_features(captions)).sum(-1)
    return {
        "score": round(clip_score(images, captions, judge()), 3),
        "each": [round(100 * value, 2) for value in cosines.tolist()],
    }
