"""`ecodiff.check` says of a pipeline what can be pruned and whether learning is exact, and finds what is wrong."""

import inspect
from dataclasses import replace

import pytest
import torch
from tiny import PROMPTS, QUICK, TINY, quiet, sized, tiny_sd

import ecodiff


@pytest.mark.slow
@pytest.mark.parametrize("model", TINY)
def test_the_first_families_are_exact(model):
    pipe = TINY[model]()
    found = ecodiff.check(pipe, PROMPTS, replace(QUICK, call=sized(pipe)))
    assert found.learns and found.failing == {} and found.problem is None, str(found)
    assert found.open_loss < 1e-8 and found.gradient == 0 and 0 < found.reached < 1
    assert "exact" in str(found) and type(pipe).__name__ in str(found)


def test_a_loop_that_cuts_gradients_off_is_told_in_a_sentence():
    pipe = tiny_sd()
    step = type(pipe.scheduler).step

    class Detached(type(pipe.scheduler)):
        def step(self, output, *args, **kwargs):
            return step(self, output.detach(), *args, **kwargs)

    pipe.scheduler = Detached.from_config(pipe.scheduler.config)
    found = ecodiff.check(pipe, PROMPTS, QUICK)
    assert not found.learns and "not differentiable" in found.problem and "Cannot be learned through" in str(found)


def restored_after_the_loop(pipe):
    """A pipeline whose loop changes the denoiser while it runs, and undoes the change as it ends (as PAG does)."""
    networks = {"scale": 1.0}
    forward = pipe.unet.forward

    def scaled(*args, **kwargs):
        output = forward(*args, **kwargs)
        return (output[0] * networks["scale"] ** 2, *output[1:])

    pipe.unet.forward = scaled
    inner = type(pipe).__call__

    def restoring(self, *args, **kwargs):
        networks["scale"] = 0.5
        try:
            return inner.__wrapped__(self, *args, **kwargs)
        finally:
            networks["scale"] = 1.0

    vars(restoring)["__signature__"] = inspect.signature(inner)
    pipe.__class__ = type("Restoring", (type(pipe),), {"__call__": torch.no_grad()(restoring)})
    return pipe


def test_what_a_loop_undoes_before_backward_makes_the_gradient_wrong_and_is_found():
    found = ecodiff.check(restored_after_the_loop(tiny_sd()), PROMPTS, QUICK)
    assert not found.learns and found.gradient > 0.1 and "off by" in str(found)


class ByPlace:
    """A scheduler that adds something else to each place of a batch."""

    def step(self, *args, **kwargs):
        result = super().step(*args, **kwargs)
        places = torch.arange(len(result[0])).view(-1, 1, 1, 1)
        return (result[0] + 3.0 * places, *result[1:])


def test_a_sample_that_depends_on_its_place_runs_alone():
    pipe = tiny_sd()
    pipe.scheduler.__class__ = type("ByPlaceScheduler", (ByPlace, type(pipe.scheduler)), {})
    with pytest.warns(UserWarning, match="depends on its place in the batch, so samples run one by one"):
        gates = quiet(pipe, config=replace(QUICK, updates=1, guidance_scale=1.0))
    assert gates.history[0]["reconstruction"] < 1


def test_a_loop_that_draws_without_a_generator_gets_the_noise_of_each_sample():
    pipe = tiny_sd()

    class Drawing(type(pipe.scheduler)):
        def step(self, *args, **kwargs):
            result = super().step(*args, **kwargs)
            return (result[0] + 3 * torch.randn_like(result[0]), *result[1:])

    pipe.scheduler = Drawing.from_config(pipe.scheduler.config)
    before = torch.get_rng_state()
    with pytest.warns(UserWarning, match="depends on its place"):
        gates = quiet(pipe, config=replace(QUICK, updates=1, log_alpha_start=12.0, weight=0.0))
    assert gates.history[0]["reconstruction"] == 0
    assert torch.equal(torch.get_rng_state(), before)
