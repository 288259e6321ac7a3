"""Loops of every form: final latents that are not handed out, schedulers that are copied, settings that are undone."""

import copy
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DiffusionPipeline, UNet2DConditionModel, UNet2DModel
from tiny import QUICK, trained, unet_config

import ecodiff
from ecodiff import EcoDiffError, LearnConfig, find_sites, learn, prune
from ecodiff.method.trajectory import final_latents
from ecodiff.pipelines.parts import denoiser

PLAIN = replace(QUICK, updates=1, call={}, guidance_scale=None, log_alpha_start=12.0, weight=0.0)


class Loop(DiffusionPipeline):
    """A loop of a few lines whose one text is given as a tensor; ``output`` says what it makes of the latents."""

    def __init__(self, unet, scheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, texts, num_inference_steps=2, generator=None, output_type="pil", return_dict=True):
        latents = torch.stack([torch.randn(4, 8, 8, generator=each) for each in self.generators(generator)])
        self.scheduler.set_timesteps(num_inference_steps)
        with self.progress_bar(total=num_inference_steps) as bar:
            for t in self.scheduler.timesteps:
                latents = self.step(latents, t, texts)
                bar.update()
        return self.output(latents, output_type)

    def generators(self, generator):
        return generator

    def step(self, latents, t, texts):
        prediction = self.unet(latents, t, texts, return_dict=False)[0]
        return self.scheduler.step(prediction, t, latents, return_dict=False)[0]

    def output(self, latents, output_type):
        return (latents if output_type == "latent" else latents.numpy(),)


class Arrays(Loop):
    """It knows no latents, and makes an array of what it drew."""

    @torch.no_grad()
    def __call__(self, texts, num_inference_steps=2, generator=None, output_type="np"):
        return super().__call__.__wrapped__(self, texts, num_inference_steps, generator, output_type)


class Refusing(Loop):
    """It refuses every type of output but its own, after the loop."""

    def output(self, latents, output_type):
        if output_type != "pil":
            raise ValueError("only pil")
        return (latents.numpy(),)


class BareFrames(Loop):
    """It returns its frames themselves, and no tuple of them."""

    def output(self, latents, output_type):
        return latents


class OneBare(Loop):
    """It takes one generator and no list of them."""

    def generators(self, generator):
        assert isinstance(generator, torch.Generator), "no list of generators"
        return [generator]


class Sound(Loop):
    """It draws two modalities, the second with a copy of the scheduler."""

    @torch.no_grad()
    def __call__(self, texts, num_inference_steps=2, generator=None, output_type="pil", return_dict=True):
        latents = torch.stack([torch.randn(4, 8, 8, generator=each) for each in generator])
        sound = latents.flip(-1)
        self.scheduler.set_timesteps(num_inference_steps)
        second = copy.deepcopy(self.scheduler)
        for t in self.scheduler.timesteps:
            prediction = self.unet(latents + sound, t, texts, return_dict=False)[0]
            latents = self.scheduler.step(prediction, t, latents, return_dict=False)[0]
            sound = second.step(prediction, t, sound, return_dict=False)[0]
        return (latents, sound) if output_type == "latent" else None


class Undone(Loop):
    """It sets an attribute of a module of its denoiser while it runs, and sets it back as it ends."""

    def step(self, latents, t, texts):
        attention = next(module for module in self.unet.modules() if hasattr(module, "rescale_output_factor"))
        before, attention.rescale_output_factor = attention.rescale_output_factor, 0.25
        try:
            return super().step(latents, t, texts)
        finally:
            attention.rescale_output_factor = before


class Cache:
    def __init__(self, value):
        self.value = value


class Caching(Loop):
    """Its denoiser hands the loop an object with a tensor in it, for the next call."""

    def step(self, latents, t, texts):
        forward, held = self.unet.forward, vars(self).setdefault("held", [])

        def caching(*args, **kwargs):
            output = forward(*args, **kwargs)
            return output[0], Cache(output[0])

        self.unet.forward = caching
        try:
            prediction, cache = self.unet(latents, t, texts, return_dict=False)
        finally:
            self.unet.forward = forward
        extra = held[-1].value if held else 0.0
        held[:] = [cache] if t != self.scheduler.timesteps[-1] else []
        return self.scheduler.step(prediction + 0.5 * extra, t, latents, return_dict=False)[0]


class Detached(Loop):
    def step(self, latents, t, texts):
        return super().step(latents, t, texts).detach()


class Idle(Loop):
    """Nothing that the denoiser predicts has an effect."""

    def step(self, latents, t, texts):
        return 0 * super().step(latents, t, texts) + latents


def made(kind):
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**unet_config(attention_head_dim=(1, 2), transformer_layers_per_block=1))
    pipe = kind(trained(unet), DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def samples(count=2):
    generator = torch.Generator().manual_seed(0)
    return [{"texts": torch.randn(1, 3, 32, generator=generator)} for _ in range(count)]


@pytest.mark.parametrize("kind", [Loop, Arrays, Refusing, BareFrames, Sound, Undone])
@pytest.mark.filterwarnings("ignore:λ starts")
def test_open_gates_lose_nothing_and_gradients_are_exact(kind):
    pipe = made(kind)
    gates = learn(pipe, samples(), PLAIN, progress=False)
    assert gates.history[0]["reconstruction"] < 1e-9
    found = ecodiff.check(pipe, samples(), PLAIN)
    assert found.learns and found.gradient == 0, str(found)


def test_latents_of_other_outputs_are_what_the_loop_held_last():
    wanted = latents_of(made(Loop))
    for kind in (Arrays, Refusing, BareFrames):
        assert torch.equal(latents_of(made(kind)), wanted), kind
    both = latents_of(made(Sound))
    assert both.shape == (2, 2 * 4 * 8 * 8)


def latents_of(pipe):
    texts = torch.cat([sample["texts"] for sample in samples()])
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    return final_latents(pipe, texts=texts, generator=generators, num_inference_steps=2, gradients=False)


@pytest.mark.filterwarnings("ignore:λ starts")
def test_a_loop_that_takes_one_sample_runs_one_by_one_and_says_so():
    with pytest.warns(UserWarning, match="one by one.*one prompt a call"):
        gates = learn(made(OneBare), samples(), PLAIN, progress=False)
    assert gates.history[0]["reconstruction"] == 0


def test_a_call_that_hands_out_hidden_tensors_keeps_its_activations():
    found = ecodiff.check(made(Caching), samples(), PLAIN)
    assert found.learns and found.gradient == 0, str(found)


def test_a_loop_that_cuts_gradients_off_is_told_from_its_scheduler():
    with pytest.raises(EcoDiffError, match='the loop itself cuts gradients off.*objective="step"'):
        learn(made(Detached), samples(), PLAIN, progress=False)
    stepwise = learn(made(Detached), samples(), replace(PLAIN, objective="step", log_alpha_start=2.0), progress=False)
    assert stepwise.history[0]["gradient_norm"] > 0


@pytest.mark.filterwarnings("ignore:λ starts")
def test_arguments_with_which_no_gate_has_an_effect_are_refused_before_learning():
    with pytest.raises(EcoDiffError, match="No gate changes the final latents"):
        learn(made(Idle), samples(), PLAIN, progress=False)


@pytest.mark.filterwarnings("ignore:λ starts", "ignore:.*one by one")
def test_a_pipeline_without_prompts_takes_a_number_of_samples():
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        norm_num_groups=4,
    )
    pipe = DDPMPipeline(trained(unet), DDIMScheduler())
    gates = learn(pipe, 2, PLAIN, progress=False)
    assert gates.history[0]["reconstruction"] < 1e-9
    with pytest.raises(EcoDiffError, match="list of prompts"):
        learn(pipe, 0, PLAIN, progress=False)


def test_a_denoiser_of_another_name_can_be_named():
    class Net(Loop):
        def __init__(self, net, scheduler):
            DiffusionPipeline.__init__(self)
            self.register_modules(net=net, scheduler=scheduler)

        @property
        def unet(self):
            return self.components["net"] if "net" in self.config else None

    torch.manual_seed(0)
    net = trained(UNet2DConditionModel(**unet_config(attention_head_dim=(1, 2), transformer_layers_per_block=1)))
    pipe = type("Other", (Net,), {"unet": None})(net, DDIMScheduler())
    with pytest.raises(EcoDiffError, match=r"net \(UNet2DConditionModel\).*pipe.denoiser_name"):
        denoiser(pipe)
    pipe.denoiser_name = "net"
    assert denoiser(pipe) is net
    name, site = next(iter(find_sites(net).items()))
    keep = torch.ones(site.units, dtype=torch.bool)
    keep[0] = False
    pruned = prune(pipe, {name: keep})
    assert denoiser(pruned) is pruned.net and pruned.net is not net
    pipe.denoiser_name = "nothing"
    with pytest.raises(EcoDiffError, match="'nothing', which is no network"):
        denoiser(pipe)


def test_a_call_that_fails_is_told_in_a_sentence():
    with pytest.raises(EcoDiffError, match=r"The call of Loop fails .*TypeError"):
        learn(made(Loop), samples(), LearnConfig(updates=1, call={"wheight": 3}), progress=False)


def test_a_library_that_is_not_installed_is_named():
    class Needs(Loop):
        def __call__(self, *args, **kwargs):
            return not_installed.fix(args)  # noqa: F821 (as in pipelines that import it only where it is installed)

    with pytest.raises(EcoDiffError, match="Needs needs not_installed, which is not there"):
        learn(made(Needs), samples(), LearnConfig(updates=1), progress=False)
