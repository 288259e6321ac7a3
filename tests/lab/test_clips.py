"""Clips: always the same, all of their captions readable; and their judge on real clips and on what shows nothing."""

from dataclasses import replace

import pytest
import torch

from ecodiff.errors import EcoDiffError
from ecodiff.lab import openmoji
from ecodiff.lab.openmoji.drawing import is_heldout
from ecodiff.lab.openmoji.moving import MOTIONS, clip_caption
from ecodiff.lab.studies.cell import Cell, describe_cell
from ecodiff.lab.studies.images import judge_pictures, similarity
from ecodiff.lab.studies.protocol import Protocol
from ecodiff.pipelines.identity import Identity


def of_motion(motion, colour="green"):
    return next(c for c in openmoji.clips("seen") if c.motion == motion and c.colour == colour)


def test_a_clip_is_always_the_same():
    first, again = openmoji.clip(5), openmoji.clip(5)
    assert first == again and (first.frames == again.frames).all()
    assert first.frames.shape == (9, 32, 32, 3)
    assert openmoji.clip(5, "seen") != first


@pytest.mark.parametrize("split", ["train", "seen", "heldout"])
def test_pairs_of_object_and_motion_are_held_out_of_training(split):
    heldout = {is_heldout(c.object, c.motion) for c in openmoji.clips(split, 60)}
    assert heldout == {split == "heldout"}


def test_an_object_stays_inside_its_clip():
    for clip in openmoji.clips("train", 200):
        for left, top, size in clip.boxes:
            assert min(left, top) >= 0 and max(left, top) + size <= 128, clip.caption


def test_the_judge_sees_what_real_clips_show():
    """On 300 clips it is right in all three facts in each; here on fewer of them."""
    clips = list(openmoji.clips("seen", 8, start=500))
    shown = openmoji.clip_verdicts(openmoji.videos(clips), clips)
    assert all(hits.all() for hits in shown.values())


@pytest.mark.parametrize("motion, other", [("left", "right"), ("up", "down"), ("grow", "shrink")])
def test_a_clip_that_runs_backwards_shows_the_opposite_motion(motion, other):
    video = openmoji.videos([of_motion(motion)])
    assert openmoji.clip_facts(video)[0]["motion"] == motion
    assert openmoji.clip_facts(video.flip(1))[0]["motion"] == other


def test_a_clip_that_stands_still_has_no_motion_and_an_empty_one_no_object():
    clip = of_motion("left")
    video = openmoji.videos([clip])
    still = openmoji.clip_facts(video[:, :1].expand(-1, 9, -1, -1, -1).contiguous())[0]
    assert still == {"object": clip.object, "colour": clip.colour, "motion": "none"}
    empty = torch.tensor(openmoji.COLOURS["pink"], dtype=torch.uint8).view(1, 1, 3, 1, 1).expand(1, 9, 3, 32, 32)
    assert openmoji.clip_facts(empty.contiguous())[0] == {"object": "none", "colour": "pink", "motion": "none"}


def test_frames_in_random_order_show_no_motion():
    video = openmoji.videos([of_motion("up")])[:, [4, 0, 8, 2, 6, 1, 7, 3, 5]]
    assert openmoji.clip_facts(video)[0]["motion"] == "none"


def test_a_wrong_object_colour_or_motion_is_seen():
    clip = of_motion("right")
    video = openmoji.videos([clip])
    for changed in ({"object": "tree"}, {"colour": "pink"}, {"motion": "left"}):
        shown = openmoji.clip_verdicts(video, [replace(clip, **changed)])
        assert [name for name in ("object", "colour", "motion") if not shown[name].item()] == list(changed)
        assert not shown["all"].item()


def test_unknown_words_and_other_tensors_are_refused_in_one_sentence():
    for call in (
        lambda: clip_caption("sofa", "red", "left"),
        lambda: clip_caption("cat", "red", "sideways"),
        lambda: openmoji.clip(0, "test"),
        lambda: openmoji.clip(-1),
        lambda: openmoji.clip_facts(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)),
        lambda: openmoji.clip_verdicts(torch.zeros(2, 9, 3, 32, 32, dtype=torch.uint8), [of_motion("left")]),
    ):
        with pytest.raises(EcoDiffError):
            call()


def test_captions_name_object_motion_and_colour():
    assert clip_caption("apple", "red", "left") == "an apple that moves left on a red background"
    captions = {clip_caption("cat", "orange", motion, wording) for motion in MOTIONS for wording in range(3)}
    assert len(captions) == 18


CALL = {"height": 32, "width": 32, "num_frames": 9, "max_sequence_length": 16}


def test_a_cell_of_a_model_of_clips_has_their_captions_and_their_judge():
    model = Identity("WanPipeline", "weights", "vae", {}, {})
    cell = Cell(protocol=Protocol(call=CALL, pictures=3), prompts=4)
    assert cell.captions() == [clip.caption for clip in openmoji.clips("train", 4)]
    assert cell.protocol.scenes() == list(openmoji.clips("seen", 3))
    assert describe_cell(model, cell)["judge"] == "clips, version 1"
    of_images = Cell(protocol=Protocol(pictures=3), prompts=4)
    assert of_images.captions() == openmoji.prompts("train", 4)


def test_clips_are_judged_and_compared_as_a_study_records_them():
    clips = list(openmoji.clips("seen", 3))
    videos = openmoji.videos(clips)
    assert judge_pictures(videos, clips) == dict.fromkeys(("object", "colour", "motion", "facts"), [1, 1, 1])
    backwards = judge_pictures(videos.flip(1), clips)
    assert backwards["object"] == [1, 1, 1] and backwards["motion"] == backwards["facts"] == [0, 0, 0]
    assert similarity(videos, videos) == [1.0, 1.0, 1.0]
    one_frame = videos.clone()
    one_frame[1, 4] = 0
    first, second, third = similarity(one_frame, videos)
    assert first == third == 1.0 and 8 / 9 <= second < 0.95
