"""Empty (untrained) embedded pipelines from a recipe: tokenizers, text encoders, VAE, denoiser, scheduler.

Everything is a class of diffusers or transformers; nothing here is needed to load the result.
"""

from __future__ import annotations

import json
from importlib import resources

import diffusers
import torch
import yaml

from .. import data
from ..errors import EcoDiffError

FIRST_CAPTION = 10_000_000  # tokenizers read captions of scenes that no model is trained on


def recipe_ids() -> list[str]:
    """Ids of the embedded pipelines: one YAML file each under ``ecodiff/zoo/configs``."""
    folder = resources.files(__package__) / "configs"
    return sorted(path.name.removesuffix(".yaml") for path in folder.iterdir() if path.name.endswith(".yaml"))


def load_recipe(name: str, smoke: bool = False) -> dict:
    """Read a recipe; with ``smoke`` its own ``smoke`` section is laid over it (a few steps of everything)."""
    if name not in recipe_ids():
        raise EcoDiffError(f"There is no recipe {name!r} to train: take one of {', '.join(recipe_ids())}.")
    recipe = yaml.safe_load((resources.files(__package__) / "configs" / f"{name}.yaml").read_text(encoding="utf-8"))
    override = recipe.pop("smoke", {})
    return _merge(recipe, override) if smoke else recipe


def _merge(base: dict, override: dict) -> dict:
    merged = dict(base)
    for key, value in override.items():
        merged[key] = _merge(base[key], value) if isinstance(value, dict) and isinstance(base.get(key), dict) else value
    return merged


def clip_tokenizer(recipe: dict, pad_token: str = "<|endoftext|>"):
    """A byte-pair tokenizer of CLIP's class, learned on the captions' own words: one token a word, nearly always."""
    from tokenizers import Tokenizer, models, trainers
    from transformers import CLIPTokenizer

    options = recipe["tokenizer"]
    blank = CLIPTokenizer()
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    learner.normalizer = blank.backend_tokenizer.normalizer
    learner.pre_tokenizer = blank.backend_tokenizer.pre_tokenizer
    letters = "!,.'-abcdefghijklmnopqrstuvwxyz0123456789"
    # All letters are named beforehand: left to itself the trainer numbers them in another order at each run.
    first = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    trainer = trainers.BpeTrainer(
        vocab_size=options["vocab_size"], special_tokens=first, end_of_word_suffix="</w>", show_progress=False
    )
    # Every object and colour by name, then running captions for the small words and their frequencies.
    texts = [f"{row['article']} {name}" for name, row in data.object_table().items()] * 20 + list(data.COLOURS) * 20
    texts += data.prompts("train", options["captions"], start=FIRST_CAPTION)
    learner.train_from_iterator(texts, trainer)
    model = json.loads(learner.to_str())["model"]
    merges = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in model["merges"]]
    vocab = dict(sorted(model["vocab"].items(), key=lambda item: item[1]))
    return CLIPTokenizer(vocab=vocab, merges=merges, pad_token=pad_token, model_max_length=options["max_length"])


def _text_encoder(recipe: dict, key: str, tokenizer):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **recipe[key],
    )
    return (CLIPTextModelWithProjection if "projection_dim" in recipe[key] else CLIPTextModel)(config)


def _vae(recipe: dict) -> diffusers.AutoencoderKL:
    config = recipe["vae"]["config"]
    levels = len(config["block_out_channels"])
    return diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        sample_size=data.SIZE,
        force_upcast=False,
        **config,
    )


def build_pipeline(recipe: dict) -> diffusers.DiffusionPipeline:
    """The whole untrained pipeline of a recipe, seeded by it."""
    torch.manual_seed(recipe["seed"])
    scheduler = getattr(diffusers, recipe["scheduler"]["class"])(**recipe["scheduler"]["config"])
    if recipe["pipeline"] != "StableDiffusionXLPipeline":
        raise EcoDiffError(f"Recipe {recipe['id']!r} asks for {recipe['pipeline']}, which cannot be assembled yet.")
    # SDXL's two tokenizers differ in their padding token, and so do these.
    tokenizer, tokenizer_2 = clip_tokenizer(recipe), clip_tokenizer(recipe, pad_token="!")
    pipe = diffusers.StableDiffusionXLPipeline(
        vae=_vae(recipe),
        text_encoder=_text_encoder(recipe, "text_encoder", tokenizer),
        text_encoder_2=_text_encoder(recipe, "text_encoder_2", tokenizer_2),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=diffusers.UNet2DConditionModel(**recipe["denoiser"]["config"]),
        scheduler=scheduler,
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
