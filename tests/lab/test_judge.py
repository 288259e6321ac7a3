"""The judge: its measures on an oracle that reads captions and pictures exactly, and on a tiny untrained CLIP."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from ecodiff.errors import EcoDiffError
from ecodiff.lab import openmoji
from ecodiff.lab.openmoji.facts import PLACES, Facts, caption_ranks, questions, verdicts, views
from ecodiff.lab.zoo import build, contrast, recipes
from ecodiff.metrics.clip import Judge, clip_score, clip_score_metric


class Oracle:
    """A judge without networks: every statement has a vector; a picture is known by its bytes."""

    def __init__(self, pictures, shown):
        self.shown = {bytes(x.flatten().tolist()): facts for x, facts in zip(pictures, shown, strict=True)}
        for picture, facts in zip(pictures, shown, strict=True):
            if len(facts.objects) == 2:  # what stands at its two places; at the others, no object alone
                objects, axis, colour = facts.key
                at = dict(zip(("left", "right") if axis == "across" else ("top", "bottom"), objects, strict=True))
                seen = [Facts((at[place],), colour) if place in at else None for place in PLACES]
            else:
                seen = [Facts(facts.objects[:1], facts.colour), None, None, None]
            self.shown |= {bytes(x.flatten().tolist()): f for x, f in zip(views(picture), seen, strict=True)}

    def vector(self, facts):
        """Objects by place, number, axis and colour in coordinates of their own, so that each fact counts."""
        if facts is None:  # nothing that can be named: like the object that is last in the alphabet, a little
            return self.vector(Facts(openmoji.object_names()[-1:], "red")) * 1e-3
        objects, axis, colour = facts.key
        names, found = openmoji.object_names(), torch.zeros(3 * 120 + 4 + 3 + 10)
        for place, name in enumerate(objects):
            found[120 * place + names.index(name)] = 1
        found[360 + len(objects)] = found[364 + ("", "across", "down").index(axis)] = 1
        found[367 + tuple(openmoji.COLOURS).index(colour)] = 1
        return found / found.norm()

    def text_features(self, captions):
        return torch.stack([self.vector(read(caption)) for caption in captions])

    def image_features(self, images):
        return torch.stack([self.vector(self.shown[bytes(x.flatten().tolist())]) for x in images])


def read(caption):
    """The facts of a caption of the data's grammar."""
    for ending in (" on a ", " on an ", " in front of a ", " in front of an ", " on "):
        subject, found, rest = caption.rpartition(ending)
        if found and (colour := rest.removesuffix(" background")) in openmoji.COLOURS:
            break
    relation = next((r for r in openmoji.RELATIONS if f" {r} " in subject), "")
    parts = (subject.replace(f" {relation} ", ", ") if relation else subject).replace(" and ", ", ").split(", ")
    return Facts(tuple(part.split(" ", 1)[1] for part in parts), colour, relation)


@pytest.fixture(scope="module")
def scenes():
    chosen = list(openmoji.scenes("seen", 6, count=1)) + list(openmoji.scenes("seen", 8, count=2))
    return chosen + list(openmoji.scenes("seen", 2, count=3))


@pytest.fixture(scope="module")
def tiny():
    recipe = recipes.load_recipe("openmoji-clip", smoke=True)
    recipe["tokenizer"]["captions"] = 50
    return build.build(recipe)


def test_captions_state_their_facts(scenes):
    for scene in scenes:
        assert read(scene.caption) == Facts.of(scene)
        assert scene.caption in {Facts.of(scene).caption(wording) for wording in range(3)}


def test_captions_of_the_same_picture_have_one_key():
    same = [(("cat", "dog"), "left of"), (("dog", "cat"), "right of"), (("cat", "dog"), "")]
    assert len({Facts(objects, "red", relation).key for objects, relation in same}) == 1
    other = [(("cat", "dog"), "above"), (("cat", "dog"), "right of"), (("dog", "cat"), "above")]
    assert len({Facts(objects, "red", relation).key for objects, relation in same + other}) == 4


@pytest.mark.slow
def test_an_oracle_finds_every_fact_of_right_pictures(scenes):
    pictures = openmoji.images(scenes)
    found = verdicts(Oracle(pictures, [Facts.of(s) for s in scenes]), pictures, scenes)
    assert all(hits.all() for hits in found.values()), found
    assert set(found) == {"objects", "number", "relation", "colour", "all"}


@pytest.mark.slow
def test_larger_pictures_are_judged_as_the_scenes_they_show(scenes):
    pictures = openmoji.images(scenes)
    judge = Oracle(pictures, [Facts.of(s) for s in scenes])
    larger = pictures.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    assert verdicts(judge, larger, scenes)["all"].all()


@pytest.mark.slow
@pytest.mark.parametrize("kind, fact", [(0, "colour"), (1, "objects")])
def test_an_oracle_misses_exactly_the_fact_that_is_wrong(scenes, kind, fact):
    pictures, rng = openmoji.images(scenes), np.random.default_rng(0)
    found = verdicts(Oracle(pictures, [contrast.wrong(Facts.of(s), kind, rng) for s in scenes]), pictures, scenes)
    assert not found[fact].any() and not found["all"].any()
    assert all(found[other].all() for other in {"objects", "number", "relation", "colour"} - {fact})


@pytest.mark.slow
def test_an_oracle_sees_a_wrong_relation_and_a_wrong_number(scenes):
    two = [s for s in scenes if len(s.objects) == 2]
    pictures = openmoji.images(two)
    across = ("", "left of", "right of")
    turned = [Facts(s.objects, s.colour, "above" if s.relation in across else "left of") for s in two]
    assert not verdicts(Oracle(pictures, turned), pictures, two)["relation"].any()
    alone = [Facts(s.objects[:1], s.colour) for s in two]
    found = verdicts(Oracle(pictures, alone), pictures, two)
    assert not found["number"].any() and not found["objects"].any()


def test_questions_name_the_right_caption_first_and_once(scenes):
    for scene in scenes:
        for options in questions(scene).values():
            keys = [read(caption).key for caption in options]
            assert keys[0] == Facts.of(scene).key and keys[0] not in keys[1:]
            assert len(set(options)) == len(options)


def test_ranks_of_an_oracle_are_one_and_of_strangers_are_not(scenes):
    pictures = openmoji.images(scenes)
    facts = [Facts.of(s) for s in scenes]
    assert (caption_ranks(Oracle(pictures, facts), pictures, scenes, candidates=10) == 1).all()
    strangers = caption_ranks(Oracle(pictures, facts[1:] + facts[:1]), pictures, scenes, candidates=len(scenes))
    assert (strangers > 1).all() and strangers.max() <= len(scenes)
    with pytest.raises(EcoDiffError, match="need at least 2"):
        caption_ranks(Oracle(pictures, facts), pictures, scenes, candidates=100)


def test_clip_score_is_torchmetrics_own(tiny, scenes):
    from torchmetrics.multimodal import CLIPScore

    pictures, captions = openmoji.images(scenes), [s.caption for s in scenes]
    cosines = (tiny.image_features(pictures) * tiny.text_features(captions)).sum(-1)
    assert clip_score(pictures, captions, tiny) == pytest.approx(100 * max(cosines.mean().item(), 0), abs=1e-3)
    assert isinstance(clip_score_metric(tiny), CLIPScore)


def test_a_judge_is_saved_and_loaded_in_plain_format(tiny, scenes, tmp_path):
    from transformers import CLIPModel, CLIPProcessor

    tiny.save_pretrained(tmp_path)
    assert CLIPModel.from_pretrained(tmp_path).dtype == torch.float32 and CLIPProcessor.from_pretrained(tmp_path)
    loaded, pictures = Judge.load(tmp_path), openmoji.images(scenes[:3])
    assert torch.allclose(loaded.image_features(pictures), tiny.image_features(pictures), atol=1e-5)


def test_bad_input_is_one_sentence(tiny, scenes):
    pictures = openmoji.images(scenes[:2])
    with pytest.raises(EcoDiffError, match="2 images but 3 scenes"):
        verdicts(tiny, pictures, scenes[:3])
    with pytest.raises(EcoDiffError, match="2 images but 1 captions"):
        clip_score(pictures, ["a cat on red"], tiny)
    with pytest.raises(EcoDiffError, match="is no judge here"):
        Judge.load("openmoji-clop")
    with pytest.raises(EcoDiffError, match="no word of the OpenMoji scenes"):
        openmoji.caption(("gnu",), "red")


def test_wrong_captions_are_wrong(scenes):
    rng = np.random.default_rng(0)
    for scene in scenes:
        for kind in (0, 1, 2) * 5:
            assert contrast.wrong(Facts.of(scene), kind, rng).key != Facts.of(scene).key


def test_views_show_what_their_facts_say(scenes):
    options = {"crop": 1.0, "shift": 0}
    pictures, facts = contrast.views(scenes, options, np.random.default_rng(0))
    assert pictures.shape == (len(scenes), 3, 64, 64) and all(len(f.objects) == 1 for f in facts)
    assert all(f.objects[0] in s.objects for f, s in zip(facts, scenes, strict=True))
    picture = torch.arange(3 * 64 * 64.0).reshape(3, 64, 64)
    moved = contrast.shift(picture, 2, -1)
    assert torch.equal(moved[:, :-1, 2:], picture[:, 1:, :-2]) and moved.shape == picture.shape


def test_the_loss_leaves_out_captions_that_are_true_as_well():
    image = torch.eye(3)
    twice = contrast.contrastive_loss(image, image, torch.tensor(5.0), ["a", "b", "a"], ["a", "b", "a"])
    once = contrast.contrastive_loss(image, image, torch.tensor(5.0), ["a", "b", "c"], ["a", "b", "c"])
    assert twice < once
    more = contrast.contrastive_loss(image, image.repeat(2, 1), torch.tensor(5.0), ["a", "b", "c"], list("abcdef"))
    assert more > once


def test_a_judge_that_keeps_captions_reads_each_once_and_says_the_same(tiny, monkeypatch):
    captions = [scene.caption for scene in openmoji.scenes("train", 6)]
    keeping, read_now = replace(tiny, texts={}), []
    whole = keeping.model.get_text_features
    monkeypatch.setattr(keeping.model, "get_text_features", lambda **words: read_now.append(1) or whole(**words))
    first = keeping.text_features(captions[:4])
    again = keeping.text_features(captions[3::-1])
    assert len(read_now) == 1 and torch.equal(first.flip(0), again)
    assert torch.allclose(keeping.text_features([captions[5], captions[0]])[1], first[0]) and len(read_now) == 2
    assert torch.allclose(tiny.text_features(captions[:4]), first, atol=1e-6) and len(read_now) == 3
