"""OpenMoji scenes: deterministic by index, split by object pairs, captions that say what is drawn."""

import hashlib
import itertools

import numpy as np
import pytest

from ecodiff.errors import EcoDiffError
from ecodiff.lab import openmoji


def test_a_scene_is_the_same_however_it_is_reached():
    direct = openmoji.scene(7)
    listed = next(itertools.islice(openmoji.scenes("train"), 7, None))
    assert np.array_equal(direct.image, listed.image)
    assert direct.caption == listed.caption and direct.boxes == listed.boxes


def test_scenes_do_not_change_between_versions():
    # Recorded results and trained weights rest on these pictures; whoever changes them changes all of those.
    captions = "\n".join(openmoji.prompts("train", 50) + openmoji.prompts("seen", 50) + openmoji.prompts("heldout", 50))
    assert hashlib.sha256(captions.encode()).hexdigest()[:16] == "f46f3d894268c7fb"


def test_splits_are_disjoint_in_pairs():
    def pairs(split, n):
        found = set()
        for item in openmoji.scenes(split, n):
            found |= {tuple(sorted(pair)) for pair in itertools.combinations(item.objects, 2)}
        return found

    train, heldout = pairs("train", 600), pairs("heldout", 200)
    assert train and heldout and not train & heldout
    assert all(openmoji.is_heldout(*pair) for pair in heldout) and not any(openmoji.is_heldout(*pair) for pair in train)


def test_a_tenth_of_all_pairs_is_held_out():
    names = openmoji.object_names()
    share = np.mean([openmoji.is_heldout(a, b) for a, b in itertools.combinations(names, 2)])
    assert 0.08 < share < 0.12 and len(names) == 120
    assert openmoji.is_heldout("cat", "pizza") == openmoji.is_heldout("pizza", "cat")


def test_caption_names_every_object_and_the_background():
    for item in openmoji.scenes("train", 200):
        assert all(name in item.caption for name in item.objects) and item.colour in item.caption


@pytest.mark.slow
def test_background_has_the_named_colour():
    for item in openmoji.scenes("seen", 40):
        corner = np.median(np.concatenate([item.image[0], item.image[-1]]), axis=0)
        assert np.abs(corner - np.array(openmoji.COLOURS[item.colour])).max() <= 1, item.caption


@pytest.mark.slow
@pytest.mark.parametrize("relation", openmoji.RELATIONS)
def test_relations_place_the_objects_as_they_say(relation):
    found = [item for item in openmoji.scenes("train", 300) if item.relation == relation]
    assert found
    for item in found:
        (x0, y0, s0), (x1, y1, s1) = item.boxes
        dx, dy = x0 + s0 / 2 - x1 - s1 / 2, y0 + s0 / 2 - y1 - s1 / 2
        assert {"left of": dx < -9, "right of": dx > 9, "above": dy < -9, "below": dy > 9}[relation]


def test_two_objects_do_not_overlap_much():
    for item in openmoji.scenes("train", 100, count=2):
        (x0, y0, s0), (x1, y1, s1) = item.boxes
        width = max(0, min(x0 + s0, x1 + s1) - max(x0, x1))
        height = max(0, min(y0 + s0, y1 + s1) - max(y0, y1))
        assert width * height <= 0.15 * min(s0, s1) ** 2


def test_count_is_obeyed():
    assert {len(item.objects) for item in openmoji.scenes("seen", 20, count=1)} == {1}
    assert {len(item.objects) for item in openmoji.scenes("train", 20, count=3)} == {3}


@pytest.mark.slow
def test_served_as_a_data_set_with_its_licence():
    table = openmoji.dataset("heldout", 3)
    assert table.column_names == ["image", "caption", "objects", "colour", "relation", "boxes"]
    assert table.info.license == openmoji.LICENSE
    assert np.array_equal(np.asarray(table[1]["image"]), openmoji.scene(1, "heldout").image)
    endless = openmoji.dataset("train")
    assert [row["caption"] for row in endless.take(3)] == openmoji.prompts("train", 3)


@pytest.mark.parametrize("arguments", [(0, "test"), (-1, "train"), (0, "heldout", 1), (0, "train", 4)])
def test_nonsense_is_one_clear_sentence(arguments):
    with pytest.raises(EcoDiffError, match="OpenMoji|negative|cannot show"):
        openmoji.scene(*arguments)


def test_objects_are_named_as_unicode_names_them():
    import emoji

    codes = {}
    for character, entry in emoji.EMOJI_DATA.items():
        codes[entry["en"].strip(":")] = "-".join(f"{ord(c):04X}" for c in character if ord(c) != 0xFE0F)
    for name, row in openmoji.object_table().items():
        assert codes[row["emoji"]] == row["code"].replace("-FE0F", ""), name
