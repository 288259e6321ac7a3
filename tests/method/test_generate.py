"""A picture depends on its own prompt and seed only; the cache gives back what was drawn and nothing else."""

import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny import PROMPTS, TINY, TOKENS, tiny_sd, tiny_sdxl

import ecodiff
from ecodiff.errors import EcoDiffError
from ecodiff.method.generate import generate
from ecodiff.pipelines.contents import weights_hash
from ecodiff.storage.cache import cached
from ecodiff.storage.fingerprint import canonical

SEEDS = [3, 1, 4, 1]


def draw(pipe, prompts=PROMPTS, seeds=SEEDS, **more):
    extra = {"max_sequence_length": TOKENS} if hasattr(pipe, "transformer") else {}
    settings = {"num_inference_steps": 2, "guidance_scale": 3.0, "height": 16, "width": 16, "progress": False}
    return generate(pipe, prompts, seeds, **{**settings, **extra, **more})


def distance(a, b):
    return (a.int() - b.int()).abs().max().item()


@pytest.fixture(scope="module")
def sdxl():
    return tiny_sdxl()


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_batch_size_and_order_change_nothing(name):
    pipe = TINY[name]()
    together = draw(pipe)
    assert together.dtype == torch.uint8 and together.shape == (4, 3, 16, 16)
    assert distance(together[0], together[1]) > 10  # the pictures differ, so there is something to mix up
    for batch_size in (1, 3):
        assert distance(together, draw(pipe, batch_size=batch_size)) <= 1  # float rounding of another batch shape
    order = [2, 0, 3, 1]
    shuffled = draw(pipe, [PROMPTS[i] for i in order], [SEEDS[i] for i in order])
    assert torch.equal(shuffled, together[order])


def test_a_decoder_that_takes_no_batch_draws_one_by_one_and_one_that_fails_is_one_sentence():
    pipe, sizes = tiny_sd(), []
    expected, decode = draw(pipe), pipe.vae.decode

    def single(latents, *args, **kwargs):
        sizes.append(len(latents))
        if len(latents) > most:
            raise RuntimeError("output doesn't match the broadcast shape")
        return decode(latents, *args, **kwargs)

    pipe.vae.decode, most = single, 1
    with pytest.warns(UserWarning, match="one by one.*a call with 2 prompts fails .RuntimeError: output doesn't"):
        assert distance(draw(pipe, batch_size=2), expected) <= 1
    assert sizes == [2, 1, 1, 1, 1]  # what failed once is not tried again
    most = 0
    with pytest.warns(UserWarning), pytest.raises(EcoDiffError, match="The call of StableDiffusionPipeline fails"):
        draw(pipe)


def test_a_picture_is_what_the_pipeline_draws_by_itself(sdxl):
    alone = sdxl(
        PROMPTS[1],
        generator=torch.Generator().manual_seed(1),
        num_inference_steps=2,
        guidance_scale=3.0,
        height=16,
        width=16,
        output_type="pt",
    ).images[0]
    assert distance(draw(sdxl)[1], (alone * 255).round().to(torch.uint8)) <= 1


@pytest.mark.slow
def test_seed_and_settings_matter_and_equal_requests_are_drawn_once(sdxl):
    a, b, c = draw(sdxl, [PROMPTS[0]] * 3, [0, 0, 1])
    assert torch.equal(a, b) and distance(a, c) > 10
    assert distance(draw(sdxl), draw(sdxl, guidance_scale=1.0)) > 1


def test_each_different_prompt_is_encoded_once(sdxl):
    seen, encoder = [], sdxl.text_encoder
    handle = encoder.register_forward_hook(lambda module, args, output: seen.append(len(output[0])))
    try:
        draw(sdxl, [PROMPTS[0]] * 3 + [PROMPTS[1]], [0, 1, 2, 0], batch_size=2, guidance_scale=1.0)
    finally:
        handle.remove()
    assert seen == [1, 1, 2, 2]  # two at once, different and equal ones, show how encodings are joined


def test_prompts_can_be_mappings_of_embeddings():
    pipe = tiny_sd()
    embeds = [pipe.encode_prompt(prompt, "cpu", 1, False)[0] for prompt in PROMPTS]
    given = draw(pipe, [{"prompt_embeds": each} for each in embeds], guidance_scale=1.0)
    assert distance(given, draw(pipe, guidance_scale=1.0)) <= 1


def test_the_pipeline_is_left_as_it_was(sdxl):
    sdxl.set_progress_bar_config(desc="mine")
    sdxl.unet.train()
    timesteps, scheduler = sdxl.scheduler.timesteps.clone(), sdxl.scheduler
    try:
        draw(sdxl)
        assert sdxl._progress_bar_config == {"desc": "mine"} and sdxl.unet.training
        assert sdxl.scheduler is scheduler and torch.equal(scheduler.timesteps, timesteps)
        assert all(parameter.requires_grad for parameter in sdxl.unet.parameters())
    finally:
        sdxl.unet.eval()


def test_progress_shows_one_bar_on_a_terminal(sdxl, capfd, monkeypatch):
    draw(sdxl, progress=True)
    assert capfd.readouterr().err == ""  # a log stays quiet
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    draw(sdxl, progress=True)
    shown = capfd.readouterr().err
    assert "pictures" in shown and "4/4" in shown and "2/2" not in shown  # the pipeline's own bar would count steps
    draw(sdxl)
    assert capfd.readouterr().err == ""


def test_cache_gives_back_what_was_drawn(sdxl, tmp_path, monkeypatch):
    first = draw(sdxl, cache_dir=tmp_path)
    assert [file.suffix for file in tmp_path.iterdir()] == [".safetensors"]
    # Reversed and in other batches it is the same request; drawing is forbidden now.
    monkeypatch.setattr(type(sdxl), "__call__", lambda *args, **kwargs: pytest.fail("drawn again"))
    again = draw(sdxl, PROMPTS[::-1], SEEDS[::-1], cache_dir=tmp_path, batch_size=1)
    assert torch.equal(again, first.flip(0))


CHANGES = ["unet", "vae", "text_encoder", "tokenizer", "scheduler", "seed", "steps", "size", "prompt"]


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
def test_cache_knows_all_that_a_picture_depends_on(tmp_path, change):
    pipe, settings = tiny_sd(), {"num_inference_steps": 1, "guidance_scale": 1.0, "cache_dir": tmp_path}
    prompts, seeds = PROMPTS[:1], [0]
    draw(pipe, prompts, seeds, **settings)
    if change in ("unet", "vae", "text_encoder"):
        next(getattr(pipe, change).parameters()).data.view(-1)[0] += 1e-3  # does not raise the tensor's version counter
    elif change == "tokenizer":
        pipe.tokenizer.add_tokens(["another"])
    elif change == "scheduler":
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, beta_start=0.001)
    else:
        settings |= {"steps": {"num_inference_steps": 2}, "size": {"height": 32}}.get(change, {})
        seeds = [1] if change == "seed" else seeds
        prompts = PROMPTS[1:2] if change == "prompt" else prompts
    draw(pipe, prompts, seeds, **settings)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.slow
def test_masked_pictures_never_come_from_the_cache(sdxl, tmp_path):
    plain = draw(sdxl, cache_dir=tmp_path)
    sites = ecodiff.find_sites(sdxl.unet)
    closed = {name: torch.zeros(site.units) for name, site in sites.items()}
    with ecodiff.apply_gates(sdxl.unet, closed), pytest.warns(UserWarning, match="not cached"):
        masked = draw(sdxl, cache_dir=tmp_path)
    assert distance(plain, masked) > 1 and len(list(tmp_path.iterdir())) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(draw(sdxl, cache_dir=tmp_path), plain)


@pytest.mark.parametrize("damage", ["truncated", "other", "changed"])
def test_damaged_cache_is_a_clear_error(tmp_path, damage):
    compute = lambda: torch.arange(100, dtype=torch.uint8)  # noqa: E731
    cached(tmp_path, "x", {"a": 1}, compute)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    if damage == "truncated":
        file.write_bytes(whole[:-10])
    elif damage == "changed":
        file.write_bytes(whole[:-1] + b"\0")
    else:
        cached(tmp_path / "b", "x", {"a": 2}, compute)
        file.write_bytes(next((tmp_path / "b").iterdir()).read_bytes())
    with pytest.raises(EcoDiffError, match="delete it"):
        cached(tmp_path, "x", {"a": 1}, compute)


def test_a_cache_that_cannot_be_written_is_a_clear_error_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ecodiff.storage.cache.os.replace", full)
    with pytest.raises(EcoDiffError, match="could not be written"):
        cached(tmp_path, "x", {}, lambda: torch.zeros(1))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("prompts", "seeds", "more", "message"),
    [
        ([], [], {}, "at least one prompt"),
        (["a cat", " "], [0, 1], {}, "none may be empty"),
        ("a cat", [0], {}, "list of prompts"),
        (["a cat"], [0, 1], {}, "1 prompts but 2 seeds"),
        (["a cat"], 0, {}, "list of seeds"),
        (["a cat", {"prompt_embeds": 0}], [0, 1], {}, "one form"),
        (["a cat"], [0], {"batch_size": 0}, "batch_size=0"),
        (["a cat"], [0], {"generator": None}, "'generator' itself"),
    ],
)
def test_bad_input_is_a_clear_error(sdxl, prompts, seeds, more, message):
    with pytest.raises(EcoDiffError, match=message):
        draw(sdxl, prompts, seeds, **more)


def test_pictures_that_are_not_finite_are_an_error():
    pipe = tiny_sd()
    pipe.vae.decoder.conv_out.bias.data.fill_(float("nan"))
    with pytest.raises(EcoDiffError, match="not finite"):
        draw(pipe)


def test_weights_hash():
    torch.manual_seed(0)
    a, b = torch.nn.Linear(3, 4), torch.nn.Linear(3, 4)
    first = weights_hash(a)
    b.load_state_dict(a.state_dict())
    assert weights_hash(b) == first and len(first) == 64
    assert weights_hash(torch.nn.Sequential(a)) != first  # names count
    b.weight.data = b.weight.data.reshape(3, 4)
    assert weights_hash(b) != first  # shapes count
    a.weight.data[0, 0] += 1e-6
    assert weights_hash(a) != first
    with torch.device("meta"), pytest.raises(EcoDiffError, match="meta device"):
        weights_hash(torch.nn.Linear(2, 2))


def test_canonical_text_is_one_for_equal_settings():
    assert canonical({"b": (1, 2), "a": torch.ones(2)}) == canonical({"a": torch.ones(2), "b": [1, 2]})
    assert canonical(torch.ones(2)) != canonical(torch.ones(2, 1))
    for bad in (print, float("nan")):
        with pytest.raises(EcoDiffError):
            canonical({"a": bad})


@pytest.mark.slow
def test_threads_can_keep_the_same_result_at_the_same_time(tmp_path):
    compute = lambda: torch.arange(200_000)  # noqa: E731
    for turn in range(20):
        with ThreadPoolExecutor(4) as pool:
            results = [pool.submit(cached, tmp_path, "x", {"turn": turn}, compute) for _ in range(4)]
        assert all(torch.equal(result.result(), compute()) for result in results)
    assert {file.suffix for file in tmp_path.iterdir()} == {".safetensors"}
