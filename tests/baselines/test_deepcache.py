"""Feature reuse: interval 1 changes no bit, the right steps run the deep part, and the pipeline is left as it was."""

import pytest
import torch
from diffusers import HeunDiscreteScheduler, PNDMScheduler
from tiny import PROMPTS, call_kwargs, latents, tiny_flux, tiny_sd, tiny_sdxl

from ecodiff.baselines.deepcache import deepcache
from ecodiff.errors import EcoDiffError
from ecodiff.method.sites import find_sites
from ecodiff.method.surgery import prune
from ecodiff.method.trajectory import final_latents
from ecodiff.pipelines.parts import denoiser
from ecodiff.scores.calibration import Sampling, draw


@pytest.mark.slow
@pytest.mark.parametrize("make", [tiny_sd, tiny_sdxl])
def test_interval_one_is_the_original_bit_for_bit(make):
    pipe = make()
    expected = latents(pipe, n=2, steps=3)
    with deepcache(pipe, 1) as reuse:
        assert torch.equal(latents(pipe, n=2, steps=3), expected)
    assert (reuse.calls, reuse.reused) == (3, 0)


@pytest.mark.slow
def test_alone_and_on_a_pruned_pipeline():
    pipe = tiny_sdxl()
    small = prune(pipe, {name: torch.arange(site.units) > 0 for name, site in find_sites(denoiser(pipe)).items()})
    for each in (pipe, small):
        expected = latents(each, steps=5)
        with deepcache(each, 2) as reuse:
            reused = latents(each, steps=5)
        assert (reuse.calls, reuse.reused) == (5, 2)
        assert torch.isfinite(reused).all() and not torch.equal(reused, expected)
        assert (reused - expected).norm() < expected.norm()
        assert torch.equal(latents(each, steps=5), expected)  # all is as before


def test_the_deep_part_runs_in_every_third_step_of_each_picture():
    pipe = tiny_sd()
    ran = {"deep": [], "outer": []}
    resnets = {"deep": pipe.unet.mid_block.resnets[0], "outer": pipe.unet.down_blocks[0].resnets[0]}
    handles = [
        module.register_forward_hook(lambda *_, name=name: ran[name].append(len(steps)))
        for name, module in resnets.items()
    ]
    steps = []
    handles.append(pipe.unet.register_forward_hook(lambda *_: steps.append(0)))
    with deepcache(pipe, 3) as reuse:
        latents(pipe, steps=4)
        latents(pipe, steps=4)  # a new schedule: counted from 0 again, nothing is left from the picture before
    assert ran["deep"] == [0, 3, 4, 7] and ran["outer"] == list(range(8))
    assert (reuse.calls, reuse.reused) == (8, 4)
    for handle in handles:
        handle.remove()


def test_what_is_reused_is_the_deep_feature_of_the_last_full_step():
    pipe = tiny_sd()
    seen, full = [], []
    handles = [
        pipe.unet.up_blocks[-1].register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["hidden_states"].clone()), with_kwargs=True
        ),
        pipe.unet.up_blocks[-2].resnets[-1].register_forward_hook(lambda *_: full.append(len(seen))),
    ]
    with deepcache(pipe, 2):
        latents(pipe, steps=4)
    for handle in handles:
        handle.remove()
    assert full == [0, 2]
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[2], seen[3]) and not torch.equal(seen[1], seen[2])


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", [PNDMScheduler, HeunDiscreteScheduler])
def test_schedules_that_repeat_a_time_step_are_counted_in_steps(scheduler):
    pipe = tiny_sd()
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    with deepcache(pipe, 2) as reuse:
        latents(pipe, steps=4)
        steps = len(pipe.scheduler.timesteps)
    assert len(pipe.scheduler.timesteps.unique()) < steps
    assert (reuse.calls, reuse.reused) == (steps, steps // 2)


def test_works_in_our_own_loops_and_refuses_gradients():
    pipe = tiny_sd()
    call = {"height": 16, "width": 16}
    sampling = Sampling(num_inference_steps=4, batch_size=1, call=call, progress=False)
    with deepcache(pipe, 2) as reuse:
        draw(pipe, PROMPTS[:3], sampling)
        assert (reuse.calls, reuse.reused) == (12, 6)
        arguments = {key: value for key, value in call_kwargs(pipe).items() if key != "output_type"}
        with pytest.raises(EcoDiffError, match="kept features have no gradient"):
            final_latents(pipe, **arguments)


def test_everything_is_given_back_after_an_error():
    pipe = tiny_sd()
    cls, own = type(pipe.scheduler), [dict(module.__dict__) for module in pipe.unet.modules()]
    with pytest.raises(RuntimeError), deepcache(pipe, 2):
        raise RuntimeError
    assert type(pipe.scheduler) is cls
    assert [module.__dict__.keys() for module in pipe.unet.modules()] == [before.keys() for before in own]
    assert not pipe.unet._forward_pre_hooks


@pytest.mark.parametrize(
    "make, wrong, message",
    [
        (tiny_flux, {}, "FluxTransformer2DModel has no skip connections"),
        (tiny_sd, {"interval": 0}, "interval=0 must be a whole number"),
        (tiny_sd, {"depth": 2}, "depth=2 must be from 1 to 1 for a U-Net of 2 blocks"),
    ],
)
def test_bad_input_is_named(make, wrong, message):
    with pytest.raises(EcoDiffError, match=message), deepcache(make(), **wrong):
        pass
