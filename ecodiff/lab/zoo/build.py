"""Models as a recipe starts them: tokenizers, text encoders, VAE, denoiser, scheduler; or the judge.

Everything is a class of diffusers or transformers; nothing here is needed to load the result.
"""

from __future__ import annotations

from pathlib import Path

import diffusers
import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from ecodiff.errors import EcoDiffError
from ecodiff.lab import openmoji
from ecodiff.metrics.clip import Judge
from ecodiff.pipelines.loading import align

from .recipes import VIDEO, trained_folder
from .stages import pixels
from .tokens import clip_tokenizer, t5_tokenizer


def build(recipe: dict, models: Path | None = None):
    """The model of a recipe before training, seeded by it: a pipeline, or an ``ecodiff.metrics.clip.Judge``.

    ``models`` is the folder with the trained models it starts from (left out: ``data/models``). Raises EcoDiffError
    where one of those is missing, or for a class that no recipe here knows how to assemble.
    """
    if recipe["pipeline"] not in _ASSEMBLE:
        known = ", ".join(_ASSEMBLE)
        raise EcoDiffError(f"Recipe {recipe['id']!r} asks for {recipe['pipeline']}: take one of {known}.")
    torch.manual_seed(recipe["seed"])
    model = _ASSEMBLE[recipe["pipeline"]](recipe, models)
    if isinstance(model, diffusers.DiffusionPipeline):
        model.set_progress_bar_config(disable=True)
    return model


def parameters(model) -> int:
    """Number of parameters of all parts of a pipeline or judge; each takes two bytes on disk."""
    total = 0
    for part in model.components.values():
        if isinstance(part, torch.nn.Module):
            total += sum(parameter.numel() for parameter in part.parameters())
    return total


def _clip_text(recipe: dict, key: str, tokenizer, models: Path | None = None):
    """A new text encoder, or a trained one of another model of the family, as published pipelines share theirs."""
    options = recipe[key]
    if "from" in options:
        return _borrowed_clip_text(recipe, options, tokenizer, models)
    config = CLIPTextConfig(**_clip_words(tokenizer), **options)
    if "projection_dim" in options:
        return CLIPTextModelWithProjection(config)
    return CLIPTextModel(config)


def _borrowed_clip_text(recipe: dict, options: dict, tokenizer, models: Path | None):
    """The text encoder of another model; it reads captions with the same tokenizer, and may keep only first layers."""
    changed = dict(options)
    lender, part = changed.pop("from"), changed.pop("part")
    folder = trained_folder(lender, recipe["id"], models)
    source = CLIPTextModelWithProjection.from_pretrained(folder, subfolder=part).text_model
    encoder = CLIPTextModel(CLIPTextConfig(**{**source.config.to_dict(), **changed})).eval()
    weights = source.state_dict()
    encoder.load_state_dict({name: weights[name] for name in encoder.state_dict()})
    if encoder.config.vocab_size != len(tokenizer):
        raise EcoDiffError(
            f"{recipe['id']} reads {len(tokenizer)} tokens, the text encoder of {lender} "
            f"{encoder.config.vocab_size}: give both recipes the same tokenizer, and train the lender again."
        )
    return encoder


def _clip_words(tokenizer) -> dict:
    """The entries of a CLIP text configuration that follow from the tokenizer."""
    return {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": tokenizer.model_max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _t5_encoder(recipe: dict, key: str, tokenizer):
    # Dropout would draw from the global random state, which a resumed run does not restore.
    return T5EncoderModel(T5Config(vocab_size=len(tokenizer), dropout_rate=0.0, **recipe[key]))


def _vae(recipe: dict, models: Path | None) -> diffusers.AutoencoderKL:
    """A new VAE, or the trained one of another model of the family, whose latents all its pipelines share."""
    if "from" in recipe["vae"]:
        folder = trained_folder(recipe["vae"]["from"], recipe["id"], models)
        vae = diffusers.AutoencoderKL.from_pretrained(folder, subfolder="vae").eval()
        align(vae)
        return vae
    config = recipe["vae"]["config"]
    levels = len(config["block_out_channels"])
    return diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        sample_size=openmoji.SIZE,
        force_upcast=False,
        **config,
    )


def _scheduler(recipe: dict):
    return getattr(diffusers, recipe["scheduler"]["class"])(**recipe["scheduler"]["config"])


def _sdxl(recipe: dict, models: Path | None):
    # SDXL's two tokenizers differ in their padding token, and so do these.
    tokenizer, tokenizer_2 = clip_tokenizer(recipe), clip_tokenizer(recipe, pad_token="!")
    return diffusers.StableDiffusionXLPipeline(
        vae=_vae(recipe, models),
        text_encoder=_clip_text(recipe, "text_encoder", tokenizer),
        text_encoder_2=_clip_text(recipe, "text_encoder_2", tokenizer_2),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=diffusers.UNet2DConditionModel(**recipe["denoiser"]["config"]),
        scheduler=_scheduler(recipe),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


def _sd(recipe: dict, models: Path | None):
    tokenizer = clip_tokenizer(recipe)
    return diffusers.StableDiffusionPipeline(
        vae=_vae(recipe, models),
        text_encoder=_clip_text(recipe, "text_encoder", tokenizer, models),
        tokenizer=tokenizer,
        unet=diffusers.UNet2DConditionModel(**recipe["denoiser"]["config"]),
        scheduler=_scheduler(recipe),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _flux(recipe: dict, models: Path | None):
    if "teacher" in recipe:
        return _flux_student(recipe, trained_folder(recipe["teacher"], recipe["id"], models))
    tokenizer, tokenizer_2, vae = clip_tokenizer(recipe), t5_tokenizer(recipe), _vae(recipe, models)
    if vae.config.shift_factor is None:  # FLUX subtracts the latents' mean, the other pipelines do not
        with torch.no_grad():
            mean = vae.encode(pixels(list(openmoji.scenes("train", 64)), "cpu")).latent_dist.mean.mean().item()
        vae.register_to_config(shift_factor=round(mean, 4))
    return diffusers.FluxPipeline(
        scheduler=_scheduler(recipe),
        vae=vae,
        text_encoder=_clip_text(recipe, "text_encoder", tokenizer, models),
        tokenizer=tokenizer,
        text_encoder_2=_t5_encoder(recipe, "text_encoder_2", tokenizer_2),
        tokenizer_2=tokenizer_2,
        transformer=diffusers.FluxTransformer2DModel(**recipe["denoiser"]["config"]),
    )


def _flux_student(recipe: dict, folder: Path):
    """All parts of the teacher; its transformer without the guidance embedding, which became part of a bias."""
    pipe = diffusers.FluxPipeline.from_pretrained(folder)
    for part in (pipe.vae, pipe.text_encoder, pipe.text_encoder_2):
        align(part)
    transformer = fold_guidance(pipe.transformer, recipe["denoiser"]["guidance"])
    pipe.register_modules(transformer=transformer, scheduler=_scheduler(recipe))
    return pipe


@torch.no_grad()
def fold_guidance(transformer, scale: float):
    """A transformer without guidance embedding that predicts what this one predicts at guidance ``scale``.

    The embedding of a fixed scale is a constant that is added to the embedding of the time: so it can be added once to
    that embedding's last bias. Exact, up to rounding.
    """
    folded = diffusers.FluxTransformer2DModel.from_config({**transformer.config, "guidance_embeds": False})
    embed = transformer.time_text_embed
    # FLUX's transformer, too, multiplies the guidance by 1000 before it embeds it.
    constant = embed.guidance_embedder(embed.time_proj(torch.tensor([1000.0 * scale])))[0]
    state = {k: v.clone() for k, v in transformer.state_dict().items() if ".guidance_embedder." not in k}
    state["time_text_embed.timestep_embedder.linear_2.bias"] += constant
    folded.load_state_dict(state)
    return folded.eval()


def _wan(recipe: dict, models: Path | None):
    tokenizer = t5_tokenizer(recipe)
    words = UMT5Config(vocab_size=len(tokenizer), dropout_rate=0.0, **recipe["text_encoder"])
    channels = recipe["vae"]["config"]["z_dim"]
    # Mean and standard deviation of the latents are known once the VAE is trained.
    unscaled = {"latents_mean": [0.0] * channels, "latents_std": [1.0] * channels}
    vae = diffusers.AutoencoderKLWan(**unscaled, **recipe["vae"]["config"])
    with torch.no_grad():  # a posterior as wide as at random would drown for long what the encoder begins to say
        vae.quant_conv.bias[channels:] = -6.0
        vae.decoder.conv_out.weight *= 0.1  # the decoder clamps to -1 … 1: a pixel beyond them would have no gradient
    return diffusers.WanPipeline(
        tokenizer=tokenizer,
        text_encoder=UMT5EncoderModel(words),
        vae=vae,
        transformer=diffusers.WanTransformer3DModel(**recipe["denoiser"]["config"]),
        scheduler=_scheduler(recipe),
    )


def _judge(recipe: dict, models: Path | None):
    tokenizer = clip_tokenizer(recipe)
    text = {**_clip_words(tokenizer), **recipe["text"]}
    vision = {"image_size": openmoji.SIZE, **recipe["vision"]}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=recipe["projection_dim"]))
    reader = CLIPImageProcessorPil(
        size={"shortest_edge": openmoji.SIZE},
        crop_size={"height": openmoji.SIZE, "width": openmoji.SIZE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return Judge(model, CLIPProcessor(image_processor=reader, tokenizer=tokenizer))


_ASSEMBLE = {
    "StableDiffusionPipeline": _sd,
    "StableDiffusionXLPipeline": _sdxl,
    "FluxPipeline": _flux,
    VIDEO: _wan,
    "CLIPModel": _judge,
}
