"""The pipeline's own loop with gradients: exact under checkpointing, for any scheduler, leaving the pipeline as it
was."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from tiny import TINY, arguments, latents, latents_and_gradient, tiny_flux, tiny_sd, tiny_sdxl

from ecodiff.errors import EcoDiffError
from ecodiff.method.gates import Gates
from ecodiff.method.hooks import apply_gates
from ecodiff.method.sites import find_sites
from ecodiff.method.trajectory import final_latents
from ecodiff.pipelines.parts import denoiser

SCHEDULERS = {
    "euler": EulerDiscreteScheduler,
    "ddim": DDIMScheduler,
    "dpm++": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
    "pndm": lambda: PNDMScheduler(skip_prk_steps=True),  # as Stable Diffusion configures it
    "heun": HeunDiscreteScheduler,
    "lms": LMSDiscreteScheduler,
    "euler ancestral": EulerAncestralDiscreteScheduler,
    "sde-dpm++": lambda: DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"),
}


def assert_exact(pipe, options, **same):
    plain, gradient = latents_and_gradient(pipe, checkpoint=False, **same)
    assert gradient.abs().max() > 0
    for option in options:
        result, checkpointed = latents_and_gradient(pipe, **option, **same)
        assert torch.equal(result, plain)
        assert torch.equal(checkpointed, gradient)


@pytest.mark.slow
@pytest.mark.parametrize("model", TINY)
def test_checkpointing_changes_no_bit(model):
    assert_exact(TINY[model](), [{}, {"keep_last": 0}, {"keep_last": 2}, {"keep_last": 99}])


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEDULERS)
def test_checkpointing_is_exact_with_first_order_multistep_and_stochastic_schedulers(name):
    pipe = tiny_sd()
    pipe.scheduler = SCHEDULERS[name]()
    assert_exact(pipe, [{"keep_last": 1}])


def test_flow_matching_with_several_samples_and_a_generator_each():
    pipe = tiny_flux()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
    generators = [[torch.Generator().manual_seed(seed) for seed in (3, 4)] for _ in range(2)]
    both = final_latents(pipe, gradients=False, **arguments(pipe, n=2, generator=generators[0]))
    second = arguments(pipe, n=2, generator=generators[1][1])
    second["prompt"] = second["prompt"][1:]
    assert torch.allclose(both[1:], final_latents(pipe, gradients=False, **second), atol=1e-5)


@pytest.mark.parametrize("model", TINY)
def test_latents_are_those_of_an_ordinary_call(model):
    pipe = TINY[model]()
    expected = latents(pipe, steps=2)
    assert torch.equal(
        final_latents(pipe, gradients=False, **arguments(pipe, steps=2, guidance_scale=pipe_default(pipe))), expected
    )


def pipe_default(pipe):
    import inspect

    return inspect.signature(type(pipe).__call__).parameters["guidance_scale"].default


def test_gradient_is_the_derivative_through_all_steps():
    pipe = tiny_sd().to(torch.float64)
    net = denoiser(pipe)
    name, site = next(iter(find_sites(net).items()))

    def loss(value, **options):
        with apply_gates(net, {name: value}):
            result = final_latents(pipe, **arguments(pipe), **options).square().mean()
            if result.requires_grad:
                result.backward()
            return result.item()

    value = torch.full((site.units,), 0.75, requires_grad=True)
    loss(value)
    step = torch.zeros(site.units)
    step[0] = 2**-9
    above, below = (loss(value.detach() + sign * step, gradients=False) for sign in (1, -1))
    assert value.grad[0].item() == pytest.approx((above - below) / 2**-8, rel=1e-2)


@pytest.mark.slow
def test_keep_last_counts_steps_and_saves_that_many_recomputations():
    pipe, calls = tiny_sd(), []
    pipe.scheduler = HeunDiscreteScheduler()  # 2T - 1 steps
    layer = denoiser(pipe).conv_in
    handle = layer.register_forward_pre_hook(lambda *_: calls.append(1))
    counts = []
    for keep_last in (0, 2, 5):
        calls.clear()
        latents_and_gradient(pipe, keep_last=keep_last)
        counts.append(len(calls))
    handle.remove()
    assert counts == [10, 8, 5]


@pytest.mark.slow
def test_gates_drawn_in_each_call_are_exact_when_random_states_are_restored_and_wrong_when_drawn_anew():
    pipe = tiny_sd()
    assert_exact(pipe, [{"keep_last": 0}, {"keep_last": 1}], draw="call")
    plain = latents_and_gradient(pipe, "call", checkpoint=False)
    redrawn = latents_and_gradient(pipe, "call", preserve_rng_state=False, keep_last=0)
    assert torch.equal(plain[0], redrawn[0])
    assert torch.cosine_similarity(plain[1], redrawn[1], dim=0) < 0.99


def test_a_tensor_that_checkpointing_does_not_know_is_refused_not_forgotten():
    pipe, scale = tiny_sd(), torch.ones((), requires_grad=True)
    handle = denoiser(pipe).mid_block.register_forward_hook(lambda module, args, output: output * scale)
    with pytest.raises(EcoDiffError, match="checkpointing does not know it"):
        latents_and_gradient(pipe)
    latents_and_gradient(pipe, checkpoint=False)
    assert scale.grad.abs() > 0
    handle.remove()

    gates = Gates.start(find_sites(denoiser(pipe)), 1.0)
    with apply_gates(denoiser(pipe), lambda name: gates.distribution.deterministic(gates.log_alpha[name]), gates.sites):
        with pytest.raises(EcoDiffError, match="learned="):
            final_latents(pipe, **arguments(pipe)).square().mean().backward()


@pytest.mark.slow
def test_gradients_reach_gates_and_arguments_through_autograd_grad_and_autocast():
    pipe = tiny_sdxl()
    net = denoiser(pipe)
    embeds = pipe.encode_prompt(arguments(pipe)["prompt"], device="cpu", do_classifier_free_guidance=True)
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    texts = {name: value.detach().requires_grad_() for name, value in zip(names, embeds, strict=True)}
    gates, flat = Gates.start(find_sites(net), 1.0), []
    for option in ({"checkpoint": False}, {}, {"keep_last": 0}):
        values = gates.sample(torch.Generator().manual_seed(1))
        with apply_gates(net, values, gates.sites), torch.autocast("cpu", torch.bfloat16):
            result = final_latents(pipe, **{**arguments(pipe), "prompt": None, **texts}, **option)
            found = torch.autograd.grad(result.float().square().mean(), [*gates.log_alpha.values(), *texts.values()])
        assert all(value.abs().max() > 0 for value in found[-4:])
        flat.append(torch.cat([value.flatten() for value in found]))
    assert torch.equal(flat[0], flat[1]) and torch.equal(flat[0], flat[2])


@pytest.mark.slow
def test_checkpoints_inside_the_denoiser_go_with_checkpoints_around_it():
    pipe = tiny_sd()
    plain = latents_and_gradient(pipe, checkpoint=False)
    denoiser(pipe).requires_grad_(True).enable_gradient_checkpointing()
    denoiser(pipe).train()
    before = [getattr(module, "_gradient_checkpointing_func", None) for module in denoiser(pipe).modules()]
    for options in ({"keep_last": 0}, {"keep_last": 1}, {"keep_last": 2}, {"checkpoint": False}):
        inner = latents_and_gradient(pipe, **options)
        assert torch.equal(plain[0], inner[0]) and torch.equal(plain[1], inner[1]), options
    assert before == [getattr(module, "_gradient_checkpointing_func", None) for module in denoiser(pipe).modules()]
    assert all(parameter.grad is None for parameter in denoiser(pipe).parameters())


def state(pipe):
    modules = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    return {
        "forward": "forward" in vars(denoiser(pipe)),
        "attributes": {key: value for key, value in vars(pipe).items() if key != "_internal_dict"},
        "config": dict(pipe.config),
        "scheduler": {key: repr(value) for key, value in vars(pipe.scheduler).items()},
        "requires_grad": [p.requires_grad for module in modules for p in module.parameters()],
        "training": [m.training for module in modules for m in module.modules()],
        # Of the denoiser only: transformers puts hooks of its own on text encoders that are asked for hidden states.
        "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in denoiser(pipe).modules()),
    }


@pytest.mark.slow
def test_pipeline_is_left_as_it_was_also_after_an_exception():
    pipe = tiny_sdxl()
    pipe.set_progress_bar_config(desc="mine")
    denoiser(pipe).mid_block.train()
    next(denoiser(pipe).parameters()).requires_grad_(False)
    before = state(pipe)
    latents_and_gradient(pipe)
    assert state(pipe) == before

    def fail(*_):
        raise KeyError("boom")

    handle = denoiser(pipe).mid_block.register_forward_hook(fail)
    before = state(pipe)
    with pytest.raises(EcoDiffError, match="boom"):
        latents_and_gradient(pipe)
    assert state(pipe) == before
    handle.remove()


def test_weights_get_no_gradient_and_no_bar_is_drawn(capfd):
    pipe = tiny_sd()
    latents_and_gradient(pipe)
    assert all(p.grad is None for p in denoiser(pipe).parameters())
    assert "it/s" not in capfd.readouterr().err


def test_a_loop_that_is_not_differentiable_says_so():
    class NoGrad(EulerDiscreteScheduler):
        @torch.no_grad()
        def step(self, *args, **kwargs):
            return super().step(*args, **kwargs)

    class Numpy(EulerDiscreteScheduler):
        def step(self, model_output, *args, **kwargs):
            return super().step(torch.from_numpy(model_output.numpy()), *args, **kwargs)

    for scheduler in (NoGrad(), Numpy()):
        pipe = tiny_sd()
        pipe.scheduler = scheduler
        with pytest.raises(
            EcoDiffError, match=f"StableDiffusionPipeline with {type(scheduler).__name__} is not differentiable"
        ):
            latents_and_gradient(pipe)


def test_clear_errors():
    pipe = tiny_sd()
    with pytest.raises(EcoDiffError, match="apply gates"):
        final_latents(pipe, **arguments(pipe))
    with pytest.raises(EcoDiffError, match="keep_last"):
        final_latents(pipe, keep_last=-1, **arguments(pipe))
    with pytest.raises(EcoDiffError, match="output_type"):
        final_latents(pipe, output_type="pil", **arguments(pipe))

    class NoLatents(type(pipe)):
        def __call__(self, prompt):
            self.unet(torch.zeros(1, 4, 8, 8), 1, torch.zeros(1, 12, 32))
            return ["a picture"]

    pipe.__class__ = NoLatents
    with pytest.raises(EcoDiffError, match="NoLatents with .* returned str.* calls no step of its scheduler"):
        final_latents(pipe, "a cat", gradients=False)

    class Failing(type(pipe)):
        def __call__(self, prompt):
            raise KeyError("size")

    pipe.__class__ = Failing
    with pytest.raises(EcoDiffError, match="The call of Failing fails .*KeyError"):
        final_latents(pipe, "a cat")
