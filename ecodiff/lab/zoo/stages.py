"""Training stages of the pipelines: VAE, denoiser with text encoders, the VAE's decoder again, T5 on captions alone.

A stage is a function ``(pipe, recipe, folder, name) -> log`` that trains parts of ``pipe`` in place, by the options
that the recipe has under the stage's name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import diffusers
import torch
from torch import Tensor

from ecodiff.lab import openmoji
from ecodiff.pipelines.conditioning import encode as encode_with_vae
from ecodiff.pipelines.parts import denoiser
from ecodiff.retraining import losses

from .fit import drawn_clips, drawn_scenes, fit, generator, undrawn_clips, undrawn_scenes
from .recipes import is_video


def pixels(scenes: list, device) -> Tensor:
    """Scenes as a VAE reads them, in -1 … 1: images float [N, 3, 64, 64], clips float [N, 3, 9, 32, 32]."""
    if isinstance(scenes[0], openmoji.Clip):
        drawn = openmoji.videos(scenes).movedim(1, 2)
    else:
        drawn = openmoji.images(scenes)
    return drawn.to(device).float() / 127.5 - 1


def train_vae(pipe, recipe: dict, folder: Path, name: str) -> dict:
    """Train the VAE by absolute plus squared error and a slight KL term; then set its scaling factor to 1/std.

    A VAE of clips states mean and standard deviation of each latent channel in the place of one factor.
    """
    vae, options, draw = pipe.vae, recipe[name]["train"], drawn_clips
    if not is_video(pipe):
        vae, draw = vae.to(memory_format=torch.channels_last), drawn_scenes

    def loss_of(scenes, generator):
        x = pixels(scenes, vae.device)
        posterior = vae.encode(x).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(x.device)
        error = vae.decode(posterior.mean + posterior.std * noise).sample - x
        return error.abs().mean() + error.square().mean() + options["kl"] * posterior.kl().mean()

    result = fit(name, [vae], loss_of, options, folder, recipe["seed"], draw=draw)
    with torch.no_grad():
        latents = vae.encode(pixels(draw(0, 256), vae.device)).latent_dist.mean
    if is_video(pipe):
        each = latents.transpose(0, 1).flatten(1)
        mean, std = each.mean(1).tolist(), each.std(1).tolist()
        vae.register_to_config(latents_mean=[round(x, 4) for x in mean], latents_std=[round(x, 4) for x in std])
    else:
        vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))
    return result


def train_decoder(pipe, recipe: dict, folder: Path, name: str) -> dict:
    """Train the VAE's decoder on by squared error alone, its encoder fixed, so that no latent changes.

    The published ``sd-vae-ft-mse`` went on from Stable Diffusion's VAE in this way.
    """
    vae = pipe.vae

    def loss_of(scenes, generator):
        x = pixels(scenes, vae.device)
        with torch.no_grad():
            latents = vae.encode(x).latent_dist.mean
        return torch.nn.functional.mse_loss(vae.decode(latents).sample, x)

    parts = [vae.post_quant_conv, vae.decoder]
    for part in parts:
        part.requires_grad_(True)
    return fit(name, parts, loss_of, recipe[name]["train"], folder, recipe["seed"])


def train_denoiser(pipe, recipe: dict, folder: Path, name: str) -> dict:
    """Train denoiser and text encoders together, on the objective of the scheduler, with dropped captions.

    The pipeline's own ``encode_prompt`` makes the conditioning, so that training and sampling cannot differ. With
    ``drop_pooled`` in the options that share of captions is given as a sequence of tokens alone: a pooled vector that
    says enough of a simple caption leaves the attention to its tokens unlearned.

    Of clips, ``pool`` in the options is how many there are: their latents are computed once. Their text encoder stays
    as the stage before has left it.
    """
    options, model = recipe[name]["train"], denoiser(pipe)
    pipe.vae.requires_grad_(False).eval()
    pipe.to(pipe.vae.device)
    if hasattr(pipe, "unet"):
        model.to(memory_format=torch.channels_last)  # convolutions are about a tenth faster so
    forward = compiled(model, options)
    # Pipelines tell the time in units of their own: FLUX in 0 … 1, Wan in 0 … 1000.
    time = 1000.0 if is_video(pipe) else 1.0
    loss = losses.training_loss(pipe.scheduler, time=time, shift=options.get("shift", 1.0))
    draw: Callable[[int, int], list] = drawn_scenes
    if is_video(pipe):
        pipe.text_encoder.requires_grad_(False).eval()
        draw = pooled(pipe, options, folder, recipe["seed"])

    def loss_of(scenes, generator):
        if is_video(pipe):
            latents = torch.stack([scene.latents for scene in scenes]).to(pipe.vae.device)
        else:
            latents = encode(pipe, scenes)
        keep = torch.rand(len(scenes), generator=generator) >= options["drop_condition"]
        pooled = keep
        if "drop_pooled" in options:
            pooled = keep & (torch.rand(len(scenes), generator=generator) >= options["drop_pooled"])
        condition = conditioning(pipe, [scene.caption for scene in scenes], keep, pooled)
        return loss(forward, latents, condition, generator)

    encoders = [getattr(pipe, part) for part in ("text_encoder", "text_encoder_2") if hasattr(pipe, part)]
    return fit(name, [model, *encoders], loss_of, options, folder, recipe["seed"], encoders, draw=draw)


@dataclass(frozen=True, eq=False)
class Encoded:
    """A caption and the latents of its clip, as the denoiser sees them."""

    caption: str
    latents: Tensor


def pooled(pipe, options: dict, folder: Path, seed: int) -> Callable[[int, int], list[Encoded]]:
    """What draws training samples from ``pool`` clips, in another order in each round; their latents are kept in
    ``folder``, named by the weights that made them, so that a run that goes on finds them."""
    number = options["pool"]
    path = folder / f"latents-{number}-{options['origin'][:16]}.pt"
    items = undrawn_clips(0, number)
    if path.is_file():
        latents = torch.load(path, weights_only=True)
    else:
        latents = torch.cat([encode(pipe, items[start : start + 32]).cpu() for start in range(0, number, 32)])
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(latents, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)

    @lru_cache(maxsize=2)
    def order(turn: int) -> list[int]:
        return torch.randperm(number, generator=generator(seed, turn)).tolist()

    def draw(start: int, n: int) -> list[Encoded]:
        drawn = []
        for position in range(start, start + n):
            turn, place = divmod(position, number)
            at = order(turn)[place]
            drawn.append(Encoded(items[at].caption, latents[at]))
        return drawn

    return draw


def train_words(pipe, recipe: dict, folder: Path, name: str) -> dict:
    """Train a new T5 encoder on captions alone: it restores the words of captions of which some are hidden.

    T5 itself was trained so (Raffel et al. 2020), with a decoder in the place of the linear layer here. Published
    pipelines, too, start from trained text encoders. The encoder sees padding where its pipeline shows it: FLUX does,
    Wan does not.
    """
    part, tokenizer, draw = "text_encoder_2", getattr(pipe, "tokenizer_2", None), undrawn_scenes
    if is_video(pipe):
        part, tokenizer, draw = "text_encoder", pipe.tokenizer, undrawn_clips
    options, config = recipe[name]["train"], getattr(pipe, part).config
    torch.manual_seed(recipe["seed"])
    encoder = type(getattr(pipe, part))(config)
    head = torch.nn.Linear(config.d_model, len(tokenizer))
    pipe.register_modules(**{part: encoder})

    def loss_of(scenes, generator):
        captions = [scene.caption for scene in scenes]
        words = tokenizer(captions, padding="max_length", return_tensors="pt").input_ids
        hidden = (torch.rand(words.shape, generator=generator) < options["hide"]) & (words != tokenizer.pad_token_id)
        shown = words.masked_fill(hidden, tokenizer.unk_token_id).to(pipe.vae.device)
        mask = (words != tokenizer.pad_token_id).to(shown.device) if is_video(pipe) else None
        logits = head(encoder(shown, attention_mask=mask).last_hidden_state)
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), words.flatten().to(logits.device))

    return fit(name, [encoder, head], loss_of, options, folder, recipe["seed"], draw=draw)


@torch.no_grad()
def encode(pipe, scenes: list) -> Tensor:
    """Latents [N, 4, 16, 16] as the denoiser sees them: shifted, scaled; for FLUX packed to [N, 64, 16]; for clips
    [N, 32, 3, 4, 4], each channel with mean 0 and standard deviation 1."""
    return encode_with_vae(pipe, pixels(scenes, pipe.vae.device))


def compiled(model, options: dict):
    """The model to call in training: compiled where a stage's options ask for it."""
    if options.get("compile"):
        return torch.compile(model)
    return model


def conditioning(pipe, captions: list[str], keep: Tensor, keep_pooled: Tensor | None = None) -> dict:
    """Keyword arguments of the denoiser for captions; where ``keep`` (bool [N]) is false the caption is dropped.

    A dropped caption is what the pipeline itself takes for none: zeros for SDXL, the empty caption otherwise.
    ``keep_pooled`` (left out: ``keep``) is the same for the pooled vector, where a pipeline has one.
    """
    device, n = pipe.vae.device, len(captions)
    if keep_pooled is None:
        keep_pooled = keep
    if isinstance(pipe, diffusers.StableDiffusionXLPipeline):
        embeds, _, pooled, _ = pipe.encode_prompt(captions, do_classifier_free_guidance=False)
        keep, keep_pooled = keep.float().to(device), keep_pooled.float().to(device)
        # Original size, offset of a crop, and size, as SDXL is told them: no image was cut or resized.
        sizes = [openmoji.SIZE, openmoji.SIZE, 0, 0, openmoji.SIZE, openmoji.SIZE]
        time_ids = torch.tensor([sizes], device=device).float()
        added = {"text_embeds": pooled * keep_pooled[:, None], "time_ids": time_ids.repeat(n, 1)}
        return {"encoder_hidden_states": embeds * keep[:, None, None], "added_cond_kwargs": added}

    def told(keep: Tensor) -> list[str]:
        return [caption if kept else "" for caption, kept in zip(captions, keep.tolist(), strict=True)]

    if is_video(pipe):
        length = pipe.tokenizer.model_max_length
        embeds, _ = pipe.encode_prompt(told(keep), do_classifier_free_guidance=False, max_sequence_length=length)
        return {"encoder_hidden_states": embeds}
    if not hasattr(pipe, "transformer"):
        embeds, _ = pipe.encode_prompt(told(keep), device, 1, do_classifier_free_guidance=False)
        return {"encoder_hidden_states": embeds}
    length = pipe.tokenizer_2.model_max_length
    embeds, pooled, text_ids = pipe.encode_prompt(told(keep_pooled), told(keep), max_sequence_length=length)
    side = openmoji.SIZE // pipe.vae_scale_factor // 2
    image_ids = pipe._prepare_latent_image_ids(n, side, side, device, embeds.dtype)
    return {
        "encoder_hidden_states": embeds,
        "pooled_projections": pooled,
        "txt_ids": text_ids,
        "img_ids": image_ids,
    }
