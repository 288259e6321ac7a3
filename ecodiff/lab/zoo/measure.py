"""What a model card states about quality, measured on real scenes and on pictures drawn with fresh noise."""

from __future__ import annotations

import diffusers
import torch
from torch import Tensor

from ecodiff import metrics
from ecodiff.lab import openmoji
from ecodiff.lab.openmoji import judges
from ecodiff.lab.openmoji.facts import caption_ranks, cut, verdicts
from ecodiff.method.generate import generate
from ecodiff.metrics.clip import Judge, clip_score
from ecodiff.pipelines.conditioning import through_vae

from .contrast import shift

# Wordings that no caption of the training data has; {0} is the object with its article, {1} the colour. Each fits the
# tokenizers, though FLUX's spells words that are new to it.
FREE = ("{1} all about {0}", "see {0}, all in {1}", "{0}, the wall is {1}")


def scene_sets(n: int) -> dict[str, list[openmoji.Scene]]:
    """The evaluation sets, n scenes each, none of which any training used."""
    return {
        "one object": list(openmoji.scenes("seen", n, start=6_000_000, count=1)),
        "two objects, seen pairs": list(openmoji.scenes("seen", n, start=6_000_000, count=2)),
        "two objects, held-out pairs": list(openmoji.scenes("heldout", n, start=6_000_000)),
    }


def measure_pipeline(pipe, sampling: dict, prompts: int = 500, seeds: int = 3) -> dict[str, str]:
    """Numbers of a pipeline's card, in words: each a mean over ``seeds`` of the noise with a 95 % interval over these
    and the captions (``metrics.nested_interval``).

    VAE PSNR (dB) on 256 real scenes; share (%) of one-object pictures named rightly by the object probe, and of right
    backgrounds; and where the judge is trained, for each evaluation set of ``prompts`` captions the share of pictures
    with all objects, with all facts (`verdicts`), and whose caption ranks first among 100 (or all, if
    fewer); one-object pictures from wordings never seen. Each with what real scenes reach, the ceiling. For FLUX what
    ``crossed`` says.
    """
    judge, sets = judges.judge(), scene_sets(prompts)
    asked = {name: (scenes, [scene.caption for scene in scenes]) for name, scenes in sets.items()}
    one = sets["one object"]
    asked["free wording"] = (one, free_wordings(one))
    found = {}
    for name, (scenes, captions) in asked.items():
        drawn = [
            generate(pipe, captions, range(first, first + prompts), **sampling)
            for first in range(7_000_000, 7_000_000 + seeds * 1_000_000, 1_000_000)
        ]
        found[name] = _found(judge, [openmoji.images(scenes), *drawn], scenes)
    pictures = openmoji.images(list(openmoji.scenes("seen", 256, start=5_000_000)))
    rows = {"VAE PSNR (dB)": f"{metrics.psnr(through_vae(pipe.vae, pictures), pictures).mean():.2f}"}
    for name, (real, *drawn) in found.items():
        for share, ceiling in real.items():
            interval = metrics.nested_interval([seed[share] for seed in drawn])
            rows[f"{name}: {share} (%)"] = f"{_words(interval)}; real scenes {sum(ceiling) / len(ceiling):.1f}"
    if isinstance(pipe, diffusers.FluxPipeline):
        rows |= crossed(pipe, judge, one, sampling)
    rows |= {"prompts a set": str(prompts), "seeds": str(seeds)}
    return rows | {"sampling": ", ".join(f"{name} {value}" for name, value in sampling.items())}


def crossed(pipe, judge: Judge | None, scenes: list[openmoji.Scene], sampling: dict) -> dict[str, str]:
    """FLUX reads a caption as a pooled vector (CLIP) and as tokens (T5). Given one caption so and another one so, whose
    object and background does it draw? Shares (%) in words, with intervals over pictures of one noise each."""
    pairs = zip(scenes, scenes[1:] + scenes[:1], strict=True)
    if not (pairs := [(a, b) for a, b in pairs if a.objects != b.objects and a.colour != b.colour]):
        return {}
    prompts = [{"prompt": pooled.caption, "prompt_2": tokens.caption} for tokens, pooled in pairs]
    drawn, rows = generate(pipe, prompts, range(7_000_000, 7_000_000 + len(prompts)), **sampling), {}
    for whose, own in zip(("tokens", "pooled vector"), zip(*pairs, strict=True), strict=True):
        hits = {"background": openmoji.background_correct(drawn, [scene.colour for scene in own], openmoji.COLOURS)}
        if judge is not None:
            hits["object"] = verdicts(judge, drawn, own)["objects"]
        for what, right in hits.items():
            shown = _words(metrics.bootstrap_interval(_percent(right)))
            rows[f"crossed captions: {what} of the {whose} (%)"] = shown
    return rows


def free_wordings(scenes: list[openmoji.Scene]) -> list[str]:
    """What one-object scenes show, in words that no caption of the data has."""
    nouns = [f"{openmoji.object_table()[scene.objects[0]]['article']} {scene.objects[0]}" for scene in scenes]
    return [FREE[i % len(FREE)].format(noun, s.colour) for i, (noun, s) in enumerate(zip(nouns, scenes, strict=True))]


def measure_judge(judge: Judge, prompts: int = 500) -> dict[str, str]:
    """Numbers of the judge's card, in words, with intervals over pictures.

    Shares (%) of real scenes as they are, moved by up to 4 pixels, cut to their middle 56x56; the CLIP score of right
    captions and of those of other scenes.
    """
    rows = {}
    for name, scenes in scene_sets(prompts).items():
        pictures = openmoji.images(scenes)
        offsets = torch.randint(-4, 5, (len(scenes), 2), generator=torch.Generator().manual_seed(0)).tolist()
        changed = {
            "as they are": pictures,
            "moved": torch.stack([shift(x.float(), *o) for x, o in zip(pictures, offsets, strict=True)]).byte(),
            "cut": torch.stack([cut(x.float(), (4, 4, 56), 0) for x in pictures]).round().clamp(0, 255).byte(),
        }
        for change, shares in zip(changed, _judged(judge, list(changed.values()), scenes), strict=True):
            for share, hits in shares.items():
                rows[f"{name}, {change}: {share} (%)"] = _words(metrics.bootstrap_interval(_percent(hits)))
        right = [scene.caption for scene in scenes]
        for whose, captions in (("right", right), ("others'", right[1:] + right[:1])):
            rows[f"{name}: CLIP score of {whose} captions"] = f"{clip_score(pictures, captions, judge):.1f}"
    return rows | {"scenes a set": str(prompts)}


def _judged(judge: Judge, sets: list[Tensor], scenes: list[openmoji.Scene]) -> list[dict[str, Tensor]]:
    """What the judge finds in each of several sets of pictures of the same scenes: bool [N] each."""
    shown = verdicts(judge, torch.cat(sets), scenes * len(sets))  # together, for the captions are the same
    parts = {name: hits.chunk(len(sets)) for name, hits in shown.items()}
    many = min(100, len(scenes))
    return [
        {
            "objects found": parts["objects"][i],
            "all facts right": parts["all"][i],
            "caption ranked first": caption_ranks(judge, images, scenes, many) == 1,
        }
        for i, images in enumerate(sets)
    ]


def _found(judge: Judge | None, sets: list[Tensor], scenes: list[openmoji.Scene]) -> list[dict[str, list[float]]]:
    """What probe and judge find in each of several sets of pictures of the same scenes: 100 or 0 for each picture."""
    judged = _judged(judge, sets, scenes) if judge is not None else [{} for _ in sets]
    every = ({**_probed(images, scenes), **hits} for images, hits in zip(sets, judged, strict=True))
    return [{name: _percent(hits) for name, hits in found.items()} for found in every]


def _probed(images: Tensor, scenes: list[openmoji.Scene]) -> dict[str, Tensor]:
    right = openmoji.background_correct(images, [scene.colour for scene in scenes], openmoji.COLOURS)
    if len(scenes[0].objects) != 1:
        return {"background right": right}
    named = judges.probe().correct(images, [scene.objects[0] for scene in scenes], progress=False)
    return {"object named by the probe": named, "background right": right}


def _percent(hits: Tensor) -> list[float]:
    return [100.0 * hit for hit in hits.tolist()]


def _words(interval: metrics.Interval) -> str:
    low, high = max(0.0, interval.low), min(100.0, interval.high)
    return f"{interval.mean:.1f} (95 % interval {low:.1f} to {high:.1f})"
