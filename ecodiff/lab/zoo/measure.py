"""What a model card states about quality, measured on real scenes and on images generated from fresh noise."""

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
from .recipes import is_video

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
    """Numbers of a pipeline's card, in words, each with what real scenes reach, the ceiling.

    Each is a mean over ``seeds`` of the noise with a 95 % interval over these and the captions
    (``metrics.nested_interval``). The rows are the VAE's PSNR (dB) on 256 real scenes; the share (%) of one-object
    images named rightly by the object probe, and of right backgrounds; where the judge is trained, for each evaluation
    set of ``prompts`` captions, the share of images with all objects, with all facts (`verdicts`), and whose caption
    ranks first among 100 (or all, if fewer); all these for one-object images from wordings never seen; and for FLUX
    what ``crossed`` says. Of clips they are those of ``measure_clips``.
    """
    if is_video(pipe):
        return measure_clips(pipe, sampling, prompts, seeds)
    judge, scenes_of = judges.judge(), scene_sets(prompts)
    captions_of = {}
    for name, scenes in scenes_of.items():
        captions_of[name] = [scene.caption for scene in scenes]
    one = scenes_of["one object"]
    scenes_of["free wording"], captions_of["free wording"] = one, free_wordings(one)
    images = openmoji.images(list(openmoji.scenes("seen", 256, start=5_000_000)))
    rows = {"VAE PSNR (dB)": f"{metrics.psnr(through_vae(pipe.vae, images), images).mean():.2f}"}
    for name, scenes in scenes_of.items():
        generated = []
        for seed in range(7_000_000, 7_000_000 + seeds * 1_000_000, 1_000_000):
            generated.append(generate(pipe, captions_of[name], range(seed, seed + prompts), **sampling))
        real, *shares = _found(judge, [openmoji.images(scenes), *generated], scenes)
        for share, ceiling in real.items():
            interval = metrics.nested_interval([hits[share] for hits in shares])
            rows[f"{name}: {share} (%)"] = f"{_words(interval)}; real scenes {sum(ceiling) / len(ceiling):.1f}"
    if isinstance(pipe, diffusers.FluxPipeline):
        rows |= crossed(pipe, judge, one, sampling)
    rows |= {"prompts a set": str(prompts), "seeds": str(seeds)}
    return rows | {"sampling": ", ".join(f"{name} {value}" for name, value in sampling.items())}


def measure_clips(pipe, sampling: dict, prompts: int, seeds: int) -> dict[str, str]:
    """Numbers of the card of a pipeline that generates clips, in words, each with what real clips reach.

    They are the VAE's PSNR (dB) on the frames of 64 real clips and, for clips of pairs of object and motion that
    training had and that it never had, the shares (%) whose object, background, motion and all three are right. Their
    intervals are Wilson's (``metrics.share_interval``), over one clip a caption and noise.
    """
    real = openmoji.videos(list(openmoji.clips("seen", 64, start=5_000_000)))
    with torch.no_grad():
        latents = [pipe.vae.encode(part.movedim(1, 2).float() / 127.5 - 1).latent_dist.mean for part in real.split(16)]
        decoded = torch.cat([pipe.vae.decode(part).sample for part in latents]).movedim(2, 1)
    restored = ((decoded + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    rows = {"VAE PSNR (dB)": f"{metrics.psnr(restored.flatten(0, 1), real.flatten(0, 1)).mean():.2f}"}
    for name, split in (("seen pairs", "seen"), ("held-out pairs", "heldout")):
        clips = list(openmoji.clips(split, prompts * seeds, start=6_000_000))
        noise = range(7_000_000, 7_000_000 + len(clips))
        shown = openmoji.clip_verdicts(generate(pipe, [clip.caption for clip in clips], noise, **sampling), clips)
        ceiling = openmoji.clip_verdicts(openmoji.videos(clips), clips)
        for fact, words in _CLIP_FACTS.items():
            share, best = metrics.share_interval(shown[fact].double()), 100 * ceiling[fact].double().mean().item()
            low, high = 100 * share.low, 100 * share.high
            interval = f"{100 * share.mean:.1f} (95 % interval {low:.1f} to {high:.1f})"
            rows[f"{name}: {words} (%)"] = f"{interval}; real scenes {best:.1f}"
    rows["clips a set"] = str(prompts * seeds)
    return rows | {"sampling": ", ".join(f"{name} {value}" for name, value in sampling.items())}


_CLIP_FACTS = {
    "object": "object right",
    "colour": "background right",
    "motion": "motion right",
    "all": "all facts right",
}


def crossed(pipe, judge: Judge | None, scenes: list[openmoji.Scene], sampling: dict) -> dict[str, str]:
    """Whose object and background FLUX generates where its two text encoders read different captions.

    FLUX reads a caption as a pooled vector (CLIP) and as tokens (T5). Here each image has one caption for the tokens
    and another one for the pooled vector. Returned are shares (%) in words, with intervals over images of one noise
    each.
    """
    tokens, pooled = [], []
    for one, other in zip(scenes, scenes[1:] + scenes[:1], strict=True):
        if one.objects != other.objects and one.colour != other.colour:
            tokens.append(one)
            pooled.append(other)
    if not tokens:
        return {}
    prompts = [{"prompt": b.caption, "prompt_2": a.caption} for a, b in zip(tokens, pooled, strict=True)]
    images = generate(pipe, prompts, range(7_000_000, 7_000_000 + len(prompts)), **sampling)
    rows = {}
    for whose, own in (("tokens", tokens), ("pooled vector", pooled)):
        hits = {"background": openmoji.background_correct(images, [scene.colour for scene in own], openmoji.COLOURS)}
        if judge is not None:
            hits["object"] = verdicts(judge, images, own)["objects"]
        for what, right in hits.items():
            share = _words(metrics.bootstrap_interval(_percent(right)))
            rows[f"crossed captions: {what} of the {whose} (%)"] = share
    return rows


def free_wordings(scenes: list[openmoji.Scene]) -> list[str]:
    """What one-object scenes show, in words that no caption of the data has."""
    wordings = []
    for number, scene in enumerate(scenes):
        name = scene.objects[0]
        noun = f"{openmoji.object_table()[name]['article']} {name}"
        wordings.append(FREE[number % len(FREE)].format(noun, scene.colour))
    return wordings


def measure_judge(judge: Judge, prompts: int = 500) -> dict[str, str]:
    """Numbers of the judge's card, in words, with intervals over images.

    They are shares (%) of real scenes as they are, moved by up to 4 pixels, and cut to their middle 56x56; and the CLIP
    score of right captions and of those of other scenes.
    """
    rows = {}
    for name, scenes in scene_sets(prompts).items():
        images = openmoji.images(scenes)
        offsets = torch.randint(-4, 5, (len(scenes), 2), generator=torch.Generator().manual_seed(0)).tolist()
        moved = [shift(image.float(), *offset) for image, offset in zip(images, offsets, strict=True)]
        middles = [cut(image.float(), (4, 4, 56), 0) for image in images]
        changed = {
            "as they are": images,
            "moved": torch.stack(moved).byte(),
            "cut": torch.stack(middles).round().clamp(0, 255).byte(),  # resized, and so between whole numbers
        }
        for change, shares in zip(changed, _judged(judge, list(changed.values()), scenes), strict=True):
            for share, hits in shares.items():
                rows[f"{name}, {change}: {share} (%)"] = _words(metrics.bootstrap_interval(_percent(hits)))
        right = [scene.caption for scene in scenes]
        for whose, captions in (("right", right), ("others'", right[1:] + right[:1])):
            rows[f"{name}: CLIP score of {whose} captions"] = f"{clip_score(images, captions, judge):.1f}"
    return rows | {"scenes a set": str(prompts)}


def _judged(judge: Judge, sets: list[Tensor], scenes: list[openmoji.Scene]) -> list[dict[str, Tensor]]:
    """What the judge finds in each of several sets of images of the same scenes: bool [N] each."""
    shown = verdicts(judge, torch.cat(sets), scenes * len(sets))  # together, for the captions are the same
    parts = {name: hits.chunk(len(sets)) for name, hits in shown.items()}
    candidates = min(100, len(scenes))
    judged = []
    for images, objects, facts in zip(sets, parts["objects"], parts["all"], strict=True):
        first = caption_ranks(judge, images, scenes, candidates) == 1
        judged.append({"objects found": objects, "all facts right": facts, "caption ranked first": first})
    return judged


def _found(judge: Judge | None, sets: list[Tensor], scenes: list[openmoji.Scene]) -> list[dict[str, list[float]]]:
    """What probe and judge find in each of several sets of images of the same scenes: 100 or 0 for each image."""
    found = [_probed(images, scenes) for images in sets]
    if judge is not None:
        found = [probed | judged for probed, judged in zip(found, _judged(judge, sets, scenes), strict=True)]
    percents = []
    for hits in found:
        percents.append({name: _percent(right) for name, right in hits.items()})
    return percents


def _probed(images: Tensor, scenes: list[openmoji.Scene]) -> dict[str, Tensor]:
    """Whether each background is right and, of one-object scenes, whether the probe names the object."""
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
