"""A sample is the same alone and in any batch, whatever form a pipeline gives its encodings."""

import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionImg2ImgPipeline, UNet2DConditionModel
from PIL import Image
from tiny import PROMPTS, TINY, call_kwargs, tiny_sd, unet_config

import ecodiff
from ecodiff.errors import EcoDiffError
from ecodiff.method.trajectory import final_latents
from ecodiff.pipelines import conditioning
from ecodiff.pipelines.batches import form_of_samples, in_batches
from ecodiff.pipelines.prompt_files import read_prompts
from ecodiff.pipelines.prompts import NotJoined, checked_prompts, encoding_once
from ecodiff.pipelines.running import private_copy
from ecodiff.scores import METHODS
from ecodiff.storage import records

SETTINGS = {"num_inference_steps": 2, "progress": False}


class Tiny(DiffusionPipeline):
    """A sampling loop of a few lines, with text tensors [batch, tokens, width]."""

    model_cpu_offload_seq = "text_encoder->unet"

    def __init__(self, unet, text_encoder, tokenizer, scheduler):
        super().__init__()
        self.register_modules(unet=unet, text_encoder=text_encoder, tokenizer=tokenizer, scheduler=scheduler)

    def hidden(self, prompts, padding="max_length"):
        tokens = self.tokenizer(prompts, padding=padding, return_tensors="pt").input_ids
        return torch.stack(self.text_encoder(tokens, output_hidden_states=True).hidden_states)

    def encode_prompt(self, prompt):
        return self.hidden(prompt)[-1]

    def embeds(self, encoded):
        return encoded

    @torch.no_grad()
    def __call__(self, prompt, num_inference_steps=2, generator=None, output_type="pt", return_dict=False):
        embeds = self.embeds(self.encode_prompt(prompt=prompt))
        self.scheduler.set_timesteps(num_inference_steps)
        latents = self.noise(generator)
        for t in self.scheduler.timesteps:
            latents = self.step(t, latents, embeds)
        latents = torch.stack(latents) if isinstance(latents, list) else latents
        return (latents if output_type == "latent" else latents[:, :3].sigmoid(),)

    def noise(self, generator):
        return torch.stack([torch.randn(4, 8, 8, generator=each) for each in generator])

    def step(self, t, latents, embeds):
        prediction = self.unet(latents, t, embeds, return_dict=False)[0]
        return self.scheduler.step(prediction, t, latents, return_dict=False)[0]


class Stacked(Tiny):
    """As HiDream: hidden states of all layers, [layers, batch, tokens, width]."""

    def encode_prompt(self, prompt):
        return self.hidden(prompt)

    def embeds(self, encoded):
        return encoded.mean(0)


class OneStacked(Stacked):
    """The same where one layer is stacked: its leading size is 1, and yet no batch."""

    def encode_prompt(self, prompt):
        return self.hidden(prompt)[-1:]


class Lists(Tiny):
    """As Z-Image: lists of tensors, one a prompt and as long as it, also as arguments of the denoiser."""

    def encode_prompt(self, prompt):
        return [self.hidden([each], padding=False)[-1][0] for each in prompt]

    def noise(self, generator):
        return [torch.randn(4, 8, 8, generator=each) for each in generator]

    def step(self, t, latents, embeds):
        predictions = self.unet(latents, t, embeds)
        return [
            self.scheduler.step(prediction, t, each, return_dict=False)[0]
            for prediction, each in zip(predictions, latents, strict=True)
        ]


class ListUNet(UNet2DConditionModel):
    def forward(self, latents, t, embeds):
        calls = [super(ListUNet, self).forward(x[None], t, e[None]) for x, e in zip(latents, embeds, strict=True)]
        return [call.sample[0] for call in calls]


class Longest(Tiny):
    """Padded to the longest prompt of the batch."""

    def encode_prompt(self, prompt):
        return self.hidden(prompt, padding="longest")[-1]


class NegativesBetween(Tiny):
    """As AudioLDM 2: the negative and the positive one come encoded together."""

    def encode_prompt(self, prompt):
        return self.hidden(["a"] * len(prompt) + prompt)[-1]

    def embeds(self, encoded):
        negative, positive = encoded.chunk(2)
        return 3 * positive - 2 * negative


class Summed(Tiny):
    """What a prompt is told depends on the others."""

    def encode_prompt(self, prompt):
        encoded = self.hidden(prompt)[-1]
        return encoded + encoded.mean(0, keepdim=True)


class Counted(Tiny):
    """As HunyuanVideo 1.5: the number of prompts is an argument of its own."""

    def encode_prompt(self, prompt, batch_size=1):
        encoded = self.hidden(prompt)[-1]
        return encoded.view(batch_size, -1, encoded.shape[-1])

    @torch.no_grad()
    def __call__(self, prompt, **more):
        encode = self.encode_prompt
        runner = private_copy(self)
        runner.encode_prompt = lambda prompt: encode(prompt=prompt, batch_size=len(prompt))
        return Tiny.__call__.__wrapped__(runner, prompt, **more)


KINDS = [Tiny, Stacked, OneStacked, Lists, Longest, NegativesBetween, Summed, Counted]
ONE_BY_ONE = (Longest, NegativesBetween, Summed)


def made(kind):
    pipe = tiny_sd()
    unet = pipe.unet
    if kind is Lists:
        unet = ListUNet(**unet_config(attention_head_dim=(1, 2), transformer_layers_per_block=1)).eval()
        unet.load_state_dict(pipe.unet.state_dict())
    result = kind(unet, pipe.text_encoder, pipe.tokenizer, pipe.scheduler)
    result.set_progress_bar_config(disable=True)
    return result


def alone(pipe, prompt, seed, **more):
    """What the pipeline itself makes of one prompt."""
    return pipe([prompt], generator=[torch.Generator().manual_seed(seed)], **more)[0][0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_an_image_is_the_same_alone_and_in_a_batch(kind):
    pipe = made(kind)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        drawn = ecodiff.generate(pipe, PROMPTS, [0, 1, 2, 3], batch_size=3, **SETTINGS)
    for image, prompt, seed in zip(drawn, PROMPTS, range(4), strict=True):
        expected = (alone(pipe, prompt, seed) * 255).round()
        assert (image - expected).abs().max() <= 1
    one_by_one = [str(each.message) for each in said if "one by one" in str(each.message)]
    assert len(one_by_one) == (kind in ONE_BY_ONE)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*one by one")
@pytest.mark.parametrize("kind", [Stacked, Longest, Summed])
@pytest.mark.parametrize("objective", ["final", "step"])
def test_learning_in_a_batch_is_learning_one_by_one(kind, objective):
    pipe, found = made(kind), []
    for micro in (None, 1):
        config = ecodiff.LearnConfig(
            updates=2, batch_size=2, num_inference_steps=2, gate_draw="sample", micro_batch_size=micro,
            objective=objective, normalize=objective == "final",
        )  # fmt: skip
        found.append(ecodiff.learn(pipe, PROMPTS[:2], config, progress=False).log_alpha)
    for name, value in found[0].items():
        assert torch.allclose(value, found[1][name], atol=1e-3), name


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*one by one")
@pytest.mark.parametrize("method", ["wanda", "fisher", "gauss-newton", "obs"])
@pytest.mark.parametrize("kind", [Stacked, Longest])
def test_scores_do_not_depend_on_the_batch(kind, method):
    pipe = made(kind)
    scores = [METHODS[method](pipe, PROMPTS[:3], num_inference_steps=2, batch_size=n, progress=False) for n in (1, 3)]
    for name, value in scores[0].items():
        assert torch.allclose(value, scores[1][name], rtol=1e-2, atol=1e-6), name


@pytest.mark.parametrize("name", TINY)
def test_known_pipelines_run_together_without_a_word(name):
    pipe = TINY[name]()
    call = {k: v for k, v in call_kwargs(pipe).items() if k not in ("prompt", "generator")}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert form_of_samples(4, encoding_once(pipe), PROMPTS, **call).size == 4


def test_trying_calls_no_denoiser_and_encodes_one_pair_more():
    pipe, calls = tiny_sd(), []
    pipe.unet.register_forward_hook(lambda *args: calls.append("unet"))
    pipe.text_encoder.register_forward_hook(lambda *args: calls.append(len(args[2][0])))
    assert form_of_samples(4, encoding_once(pipe), PROMPTS, num_inference_steps=1, guidance_scale=1.0).size == 4
    assert calls == [1, 1, 2]


def test_one_picture_for_all_prompts_of_a_call():
    pipe = StableDiffusionImg2ImgPipeline(**tiny_sd().components, requires_safety_checker=False)
    pixels = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    settings = {**SETTINGS, "image": Image.fromarray(pixels), "strength": 1.0}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*one by one")
        drawn = ecodiff.generate(pipe, PROMPTS[:2], [0, 1], **settings)
    for image, prompt, seed in zip(drawn, PROMPTS, (0, 1), strict=False):
        expected = ecodiff.generate(pipe, [prompt], [seed], **settings)[0]
        assert (image.int() - expected.int()).abs().max() <= 1


def test_retraining_tells_the_denoiser_what_a_batch_of_the_pipeline_does():
    class Layers(UNet2DConditionModel):
        def forward(self, sample, timestep, encoder_hidden_states, **more):
            return super().forward(sample, timestep, encoder_hidden_states.mean(0), **more)

    class ToLayers(Stacked):
        def embeds(self, encoded):
            return encoded

        @torch.no_grad()
        def __call__(self, prompt, height, width, num_inference_steps, generator, output_type):
            generator = generator if isinstance(generator, list) else [generator]
            return Stacked.__call__.__wrapped__(self, prompt, num_inference_steps, generator, output_type)

        def step(self, t, latents, embeds):
            prediction = self.unet(latents, timestep=t, encoder_hidden_states=embeds, return_dict=False)[0]
            return self.scheduler.step(prediction, t, latents, return_dict=False)[0]

    tiny = tiny_sd()
    unet = Layers(**unet_config(attention_head_dim=(1, 2), transformer_layers_per_block=1)).eval()
    pipe = ToLayers(unet, tiny.text_encoder, tiny.tokenizer, tiny.scheduler)
    conditions = [conditioning.conditioning(pipe, prompt, (16, 16), {}) for prompt in PROMPTS[:3]]
    rule = conditioning.rule_of_joining(pipe, PROMPTS[:3], conditions, (16, 16), {})
    both = conditioning.join(conditions, rule)["encoder_hidden_states"]
    assert torch.allclose(both, pipe.encode_prompt(PROMPTS[:3]), atol=1e-5)


def test_mappings_whose_tensors_do_not_lead_with_the_batch():
    class Given(Stacked):
        @torch.no_grad()
        def __call__(self, prompt_embeds, **more):
            return Stacked.__call__.__wrapped__(Fixed(self, prompt_embeds), None, **more)

    class Fixed:
        def __init__(self, pipe, encoded):
            self.pipe, self.encoded = pipe, encoded

        def __getattr__(self, name):
            return getattr(self.pipe, name)

        def encode_prompt(self, prompt):
            return self.encoded

    pipe = made(Given)
    prompts = [{"prompt_embeds": made(Stacked).encode_prompt([prompt]).detach()} for prompt in PROMPTS[:2]]
    with pytest.warns(UserWarning, match="one by one"):
        drawn = ecodiff.generate(pipe, prompts, [0, 1], **SETTINGS)
    for image, prompt, seed in zip(drawn, PROMPTS, (0, 1), strict=False):
        assert (image - (alone(made(Stacked), prompt, seed) * 255).round()).abs().max() <= 1


def test_a_batch_that_cannot_be_joined_runs_one_by_one():
    ran = []

    def run(numbers):
        if 2 in numbers and len(numbers) > 1:
            raise NotJoined("other lengths")
        ran.append(list(numbers))

    in_batches(range(5), 2, run)
    assert ran == [[0, 1], [2], [3], [4]]


@pytest.mark.parametrize("form", [np.array, pd.Series, tuple, lambda prompts: pd.Series(prompts, index=[7, 8])])
def test_prompts_of_numpy_and_pandas_are_lists(form):
    assert checked_prompts(form(PROMPTS[:2]), "here") == PROMPTS[:2]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("a cat", "list of prompts, not str"),
        (np.array("a cat"), "list of prompts, not str"),
        (pd.DataFrame({"prompt": PROMPTS}), "list of prompts, not DataFrame"),
        ({"prompt": "a cat"}, "list of prompts, not dict"),
        (["a cat", None], "prompt 2 is None, not a string"),
        (pd.Series(["a cat", float("nan")]), "prompt 2 is nan"),
        ([["a cat"], ["a dog"]], r"prompt 1 is \['a cat'\]"),
        (np.arange(3), "prompt 1 is 0"),
        (np.array([]), "at least one"),
        ([{"a": 1}, {"b": 2}], "the same call arguments"),
        ([{"a": 1}, "a cat"], "one form"),
    ],
)
def test_what_is_no_list_of_prompts_is_a_clear_error(prompts, message):
    with pytest.raises(EcoDiffError, match=message):
        checked_prompts(prompts, "here")


@pytest.mark.parametrize("seeds", [[0.2, 0.7], [float("nan"), 1], ["a", "b"], 3])
def test_seeds_are_whole_numbers(seeds):
    with pytest.raises(EcoDiffError, match="is not a whole number|list of seeds, one whole number per prompt"):
        ecodiff.generate(made(Tiny), PROMPTS[:2], seeds, **SETTINGS)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_file_of_prompts_is_read_whatever_its_mark(tmp_path, encoding):
    path = tmp_path / "prompts.txt"
    path.write_bytes("a café\r\n\r\na cat\u2028on a mat\n".encode(encoding))
    assert read_prompts(path) == ["a café", "a cat\u2028on a mat"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a café".encode("latin-1"), "no UTF-8 text"),
        ("a cat".encode("utf-16-le"), "no UTF-8 text"),
        (b"", "holds no prompt"),
        (b"\xef\xbb\xbf\n \n", "holds no prompt"),
        (None, "cannot be read"),
    ],
)
def test_a_file_that_is_none_is_a_clear_error(tmp_path, content, message):
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(EcoDiffError, match=message):
        read_prompts(path)


def test_a_row_may_hold_any_line_separator(tmp_path):
    prompt = "a cat\u2028on\u2029a\x85mat\x0bor\x1cso"
    for number in range(2):
        records.measure({"prompt": prompt, "n": number}, lambda: {"said": prompt}, name="odd", folder=tmp_path)
    assert [row["values"]["said"] for row in records.rows("odd", tmp_path)] == [prompt, prompt]


def test_a_dtype_may_be_named(tmp_path):
    tiny_sd().save_pretrained(tmp_path)
    assert ecodiff.load(tmp_path, dtype="bfloat16").unet.dtype == torch.bfloat16
    with pytest.raises(EcoDiffError, match="dtype is one of bf16.*not 'float31'"):
        ecodiff.load(tmp_path, dtype="float31")
    with pytest.raises(EcoDiffError, match="not 16"):
        ecodiff.load(tmp_path, torch_dtype=16)


def test_no_guidance_scale_is_the_pipelines_own():
    pipe = tiny_sd()
    call = {"height": 16, "width": 16, "gradients": False}
    latents = [
        final_latents(pipe, PROMPTS[:1], generator=torch.Generator().manual_seed(0), **more, **call)
        for more in ({"guidance_scale": None, "num_inference_steps": 2}, {"num_inference_steps": 2})
    ]
    assert torch.equal(*latents)
