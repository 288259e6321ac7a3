"""Training of the judge: images and captions of real scenes, with captions that say one thing wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, interpolate, normalize, pad

from ecodiff.lab import openmoji
from ecodiff.lab.openmoji.facts import Facts, cut
from ecodiff.metrics.clip import vectors

from .fit import fit
from .stages import pixels


def wrong(facts: Facts, kind: int, rng: np.random.Generator) -> Facts:
    """The same facts but for one: ``kind`` 0 the colour, 1 an object, 2 the relation (of two) or the number."""
    objects, colour, relation = facts.objects, facts.colour, facts.relation
    others = [name for name in openmoji.object_names() if name not in objects]
    if kind == 0:
        colours = [name for name in openmoji.COLOURS if name != colour]
        return Facts(objects, str(rng.choice(colours)), relation)
    if kind == 1:
        place = int(rng.integers(len(objects)))
        return Facts((*objects[:place], str(rng.choice(others)), *objects[place + 1 :]), colour, relation)
    if relation and rng.random() < 0.7:
        relations = [name for name in openmoji.RELATIONS if name != relation]
        return Facts(objects, colour, str(rng.choice(relations)))
    if len(objects) == 1:  # one object too many, before or after it
        pair = (objects[0], str(rng.choice(others)))
        if rng.random() >= 0.5:
            pair = pair[::-1]
        return Facts(pair, colour)
    place = int(rng.integers(len(objects)))  # one object too few
    return Facts((*objects[:place], *objects[place + 1 :]), colour)


def views(scenes: list[openmoji.Scene], options: dict, rng: np.random.Generator) -> tuple[Tensor, list[Facts]]:
    """Images of scenes (float [N, 3, 64, 64] in -1 … 1), changed at random, and what each shows.

    They are moved or cut down to one of their objects, and some are blurred; all are a little noisy.
    """
    images, facts = [], []
    for scene, image in zip(scenes, pixels(scenes, "cpu"), strict=True):
        if len(scene.objects) > 1 and rng.random() < options["crop"]:
            place = int(rng.integers(len(scene.objects)))
            images.append(cut(image, scene.boxes[place], int(rng.integers(1, 4))))
            facts.append(Facts((scene.objects[place],), scene.colour))
        else:
            images.append(shift(image, *rng.integers(-options["shift"], options["shift"] + 1, 2)))
            facts.append(Facts.of(scene))
    batch = torch.stack(images)
    # Generated images are less sharp than real ones: the judge must not mind.
    size = int(rng.integers(28, 64))
    blurred = torch.from_numpy(rng.random(len(batch)) < 0.4)
    if blurred.any():
        small = interpolate(batch[blurred], size=(size, size), mode="bilinear", antialias=True)
        batch[blurred] = interpolate(small, size=(openmoji.SIZE, openmoji.SIZE), mode="bilinear")
    noise = torch.from_numpy(rng.standard_normal(batch.shape, dtype=np.float32))
    strength = torch.from_numpy(rng.uniform(0, 0.1, (len(batch), 1, 1, 1)).astype(np.float32))
    return batch + strength * noise, facts


def shift(image: Tensor, dx: int, dy: int) -> Tensor:
    """An image [3, H, W] moved by (dx, dy) pixels; its border is repeated where it leaves a gap."""
    reach = max(abs(int(dx)), abs(int(dy)))
    if not reach:
        return image
    wide = pad(image[None], [reach] * 4, mode="replicate")[0]
    height, width = image.shape[-2:]
    return wide[:, reach - dy : reach - dy + height, reach - dx : reach - dx + width]


def contrastive_loss(image: Tensor, text: Tensor, scale: Tensor, image_keys: list, text_keys: list) -> Tensor:
    """CLIP's symmetric loss (Radford et al. 2021) with further wrong captions.

    image: unit vectors [N, D]; text: unit vectors [N + M, D], the right captions first. An image chooses among all
    captions, a right caption among the images. A caption that is true of another's image, too (the same key), is left
    out there.
    """
    n = len(image)
    rows = []
    for key in image_keys:
        rows.append([key == text_key for text_key in text_keys])
    same = torch.tensor(rows, device=image.device)
    same[:, :n] &= ~torch.eye(n, dtype=torch.bool, device=image.device)  # an image's own caption stays
    logits = (scale * image @ text.T).masked_fill(same, float("-inf"))
    target = torch.arange(n, device=image.device)
    return (cross_entropy(logits, target) + cross_entropy(logits[:, :n].T, target)) / 2


def train_contrast(judge, recipe: dict, folder: Path, name: str) -> dict:
    """The judge, from nothing, on real scenes alone."""
    options, model = recipe[name]["train"], judge.model

    def loss_of(scenes, generator):
        rng = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
        images, facts = views(scenes, options, rng)
        told = list(facts)  # first what is right, then what is wrong
        for shown in facts:
            told += [wrong(shown, kind % 3, rng) for kind in range(options["negatives"])]
        captions = [each.caption(int(rng.integers(3))) for each in told]
        words = judge.processor.tokenizer(captions, padding=True, return_tensors="pt").to(model.device)
        text = vectors(model.get_text_features(**words)).float()
        image = vectors(model.get_image_features(images.to(model.device))).float()
        scale = model.logit_scale.exp().clamp(max=100)  # as in the training of CLIP
        keys = [each.key for each in told]
        return contrastive_loss(normalize(image, dim=-1), normalize(text, dim=-1), scale, keys[: len(facts)], keys)

    return fit(name, [model], loss_of, options, folder, recipe["seed"])
