"""The gradient of gates that are drawn anew in recomputation, against the exact one."""

import pytest
import torch
from tiny import tiny_sd

from ecodiff.lab.studies import redrawn
from ecodiff.storage import records

SETTINGS = {"num_inference_steps": 2, "guidance_scale": 1.0, "height": 16, "width": 16}
WORDS = ["a cat", "a pizza", "a dog", "a tree"]


def gradient(pipe, restore, keep_last=0, steps=2):
    settings = SETTINGS | {"num_inference_steps": steps}
    return redrawn.gradient(
        pipe, WORDS[:2], log_alpha=1.0, delta=0.1, seed=0, restore=restore, settings=settings, keep_last=keep_last
    )


@pytest.mark.slow
def test_a_restored_draw_has_the_gradient_of_kept_activations_and_a_new_draw_has_another():
    pipe = tiny_sd()
    exact = gradient(pipe, restore=True, keep_last=2)
    assert torch.equal(gradient(pipe, restore=True), exact)
    assert not torch.equal(gradient(pipe, restore=False), exact)


@pytest.mark.slow
def test_a_kept_step_would_hide_the_difference():
    """With T = 1 and its only step kept, nothing is recomputed: the cosine would be 1 whatever is drawn."""
    pipe = tiny_sd()
    assert torch.equal(gradient(pipe, restore=False, keep_last=1, steps=1), gradient(pipe, restore=True, steps=1))
    assert not torch.equal(gradient(pipe, restore=False, steps=1), gradient(pipe, restore=True, steps=1))


@pytest.mark.slow
def test_cosines_are_recorded_one_per_seed(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "data_dir", lambda: tmp_path)
    pipe = tiny_sd()
    call = {"height": 16, "width": 16}
    asked = {"steps": 1, "log_alpha": 1.0, "delta": 0.1, "seeds": 2, "guidance_scale": 1.0, "call": call}
    found = redrawn.cosines(pipe, WORDS, **asked)
    assert len(found) == 2 and all(-1 <= value < 0.999 for value in found) and found[0] != found[1]
    monkeypatch.setattr(redrawn, "gradient", None)  # what is recorded is read
    assert redrawn.cosines(pipe, WORDS, **asked) == pytest.approx(found)
