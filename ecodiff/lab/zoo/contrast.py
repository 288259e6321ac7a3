"""Training of the judge: pictures and captions of real scenes, with captions that say one thing wrong."""

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
        return Facts(objects, str(rng.choice([c for c in openmoji.COLOURS if c != colour])), relation)
    if kind == 1:
        place = int(rng.integers(len(objects)))
        return Facts((*objects[:place], str(rng.choice(others)), *objects[place + 1 :]), colour, relation)
    if relation and rng.random() < 0.7:
        return Facts(objects, colour, str(rng.choice([r for r in openmoji.RELATIONS if r != relation])))
    if len(objects) == 1:
        pair = (objects[0], str(rng.choice(others)))
        return Facts(pair if rng.random() < 0.5 else pair[::-1], colour)
    place = int(rng.integers(len(objects)))
    return Facts((*objects[:place], *objects[place + 1 :]), colour)


def views(scenes: list[openmoji.Scene], options: dict, rng: np.random.Generator) -> tuple[Tensor, list[Facts]]:
    """Pictures float [N, 3, 64, 64] in -1 … 1, moved, some cut down to one of their objects, blurred or noisy; and
    what each shows."""
    pictures, facts = [], []
    for scene, picture in zip(scenes, pixels(scenes, "cpu"), strict=True):
        if len(scene.objects) > 1 and rng.random() < options["crop"]:
            place = int(rng.integers(len(scene.objects)))
            pictures.append(cut(picture, scene.boxes[place], int(rng.integers(1, 4))))
            facts.append(Facts((scene.objects[place],), scene.colour))
        else:
            pictures.append(shift(picture, *rng.integers(-options["shift"], options["shift"] + 1, 2)))
            facts.append(Facts.of(scene))
    batch = torch.stack(pictures)
    # Drawn pictures are less sharp than real ones: the judge must not mind.
    size = int(rng.integers(28, 64))
    blurred = torch.from_numpy(rng.random(len(batch)) < 0.4)
    if blurred.any():
        small = interpolate(batch[blurred], size=(size, size), mode="bilinear", antialias=True)
        batch[blurred] = interpolate(small, size=(openmoji.SIZE, openmoji.SIZE), mode="bilinear")
    noise = torch.from_numpy(rng.standard_normal(batch.shape, dtype=np.float32))
    strength = torch.from_numpy(rng.uniform(0, 0.1, (len(batch), 1, 1, 1)).astype(np.float32))
    return batch + strength * noise, facts


def shift(picture: Tensor, dx: int, dy: int) -> Tensor:
    """A picture [3, H, W] moved by (dx, dy) pixels; its border is repeated where it leaves a gap."""
    reach = max(abs(int(dx)), abs(int(dy)))
    if not reach:
        return picture
    wide = pad(picture[None], [reach] * 4, mode="replicate")[0]
    height, width = picture.shape[-2:]
    return wide[:, reach - dy : reach - dy + height, reach - dx : reach - dx + width]


def contrastive_loss(image: Tensor, text: Tensor, scale: Tensor, image_keys: list, text_keys: list) -> Tensor:
    """CLIP's symmetric loss (Radford et al. 2021) with further wrong captions.

    image: unit vectors [N, D]; text: unit vectors [N + M, D], the right captions first. A picture chooses among all
    captions, a right caption among the pictures. A caption that is true of another's picture too (the same key) is
    left out there.
    """
    n = len(image)
    same = torch.tensor([[a == b for b in text_keys] for a in image_keys], device=image.device)
    same[:, :n] &= ~torch.eye(n, dtype=torch.bool, device=image.device)
    logits = (scale * image @ text.T).masked_fill(same, float("-inf"))
    target = torch.arange(n, device=image.device)
    return (cross_entropy(logits, target) + cross_entropy(logits[:, :n].T, target)) / 2


def train_contrast(judge, recipe: dict, folder: Path, name: str) -> dict:
    """The judge, from nothing, on real scenes alone."""
    options, model = recipe[name]["train"], judge.model

    def loss_of(scenes, generator):
        rng = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
        pictures, facts = views(scenes, options, rng)
        false = [wrong(f, kind % 3, rng) for f in facts for kind in range(options["negatives"])]
        captions = [f.caption(int(rng.integers(3))) for f in (*facts, *false)]
        device = model.device
        words = judge.processor.tokenizer(captions, padding=True, return_tensors="pt").to(device)
        text = vectors(model.get_text_features(**words)).float()
        image = vectors(model.get_image_features(pictures.to(device))).float()
        scale = model.logit_scale.exp().clamp(max=100)
        keys = [f.key for f in facts]
        return contrastive_loss(
            normalize(image, dim=-1), normalize(text, dim=-1), scale, keys, keys + [f.key for f in false]
        )

    return fit(name, [model], loss_of, options, folder, recipe["seed"])
