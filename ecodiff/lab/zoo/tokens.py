"""Tokenizers of CLIP's and T5's classes, learned on the captions' own words: one token a word, nearly always."""

from __future__ import annotations

import json
import math
import string
from collections import Counter

from tokenizers import Tokenizer, models, trainers
from transformers import CLIPTokenizer, T5TokenizerFast

from ecodiff.lab import openmoji

from .recipes import VIDEO

FIRST_CAPTION = 10_000_000  # tokenizers read captions of scenes that no model is trained on


def _texts(recipe: dict) -> list[str]:
    """Every object and colour by name, then running captions for the small words and their frequencies."""
    if recipe["pipeline"] == VIDEO:  # captions of clips name few objects and are soon complete
        return [clip.caption for clip in openmoji.clips("train", recipe["tokenizer"]["captions"], start=FIRST_CAPTION)]
    names = [f"{row['article']} {name}" for name, row in openmoji.object_table().items()]
    captions = openmoji.prompts("train", recipe["tokenizer"]["captions"], start=FIRST_CAPTION)
    return names * 20 + list(openmoji.COLOURS) * 20 + captions


def clip_tokenizer(recipe: dict, pad_token: str = "<|endoftext|>"):
    """A byte-pair tokenizer of CLIP's class."""
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
    learner.train_from_iterator(_texts(recipe), trainer)
    model = json.loads(learner.to_str())["model"]
    # Versions of tokenizers write a merge as a pair or as one text.
    merges = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in model["merges"]]
    vocab = dict(sorted(model["vocab"].items(), key=lambda item: item[1]))
    return CLIPTokenizer(vocab=vocab, merges=merges, pad_token=pad_token, model_max_length=options["max_length"])


def t5_tokenizer(recipe: dict):
    """A unigram tokenizer of T5's class: whole words with their log frequency, single characters for all else."""
    counts: Counter[str] = Counter()
    for text in _texts(recipe):
        counts.update(text.replace(",", "").split())
    total = sum(counts.values())
    words = [(f"▁{word}", math.log(n / total)) for word, n in sorted(counts.items())]
    characters = [(letter, -20.0) for letter in string.ascii_letters + string.digits + string.punctuation]

    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *words, *characters]
    return T5TokenizerFast(vocab=vocab, extra_ids=0, model_max_length=recipe["tokenizer"]["max_length"])
