"""Tokenizers and processors with a handful of tokens: whatever a pipeline asks for by class, made without a download.

Each letter of a prompt becomes a token or two. Weights are random, so that nothing is lost by this.
"""

from __future__ import annotations

import inspect
import string
from collections.abc import Sequence
from typing import Any

import transformers
from tokenizers.pre_tokenizers import ByteLevel

from ecodiff.errors import EcoDiffError

LONGEST = 77  # tokens of a prompt, as CLIP has them
# Tokens of chat templates and of places of images. Models find images by the numbers of these tokens.
SPECIAL = (
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<image>",
)
# A chat is its texts, one after the other.
CHAT = (
    "{% for message in messages %}{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{{ part.text if part.text else '<|image_pad|>' }}{% endfor %}"
    "{% endif %}{% endfor %}"
)


def tokenizer(name: str) -> Any:
    """A tokenizer of this class of transformers; raises EcoDiffError for a kind of tokenizer that is not known here."""
    cls = getattr(transformers, name, None)
    if name == "ByT5Tokenizer":
        return cls(model_max_length=LONGEST)  # its vocabulary is the 256 bytes
    taken = inspect.signature(cls.__init__).parameters if cls is not None else {}
    if cls is None or "vocab" not in taken:
        raise EcoDiffError(f"no tiny {name} can be made: it takes no vocabulary.")
    options = {"model_max_length": LONGEST}
    if name.startswith("CLIP"):
        letters = ["<|startoftext|>", "<|endoftext|>", *_letters(), *(f"{letter}</w>" for letter in _letters())]
        return cls(vocab=_numbered(letters), merges=[], **options)
    if name.startswith(("T5", "XLMRoberta", "MT5", "UMT5")):
        specials = ["<s>", "<pad>", "</s>", "<unk>"] if name.startswith("XLM") else ["<pad>", "</s>", "<unk>"]
        pieces = [(token, 0.0) for token in specials]
        pieces += [(piece, -2.0) for piece in ("▁", *_letters())]
        extra = {} if name.startswith("XLM") else {"extra_ids": 0}
        return cls(vocab=pieces, **extra, **options)
    if name.startswith("Bert"):
        pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        pieces += [*_letters(), *(f"##{letter}" for letter in _letters())]
        return cls(vocab=_numbered(pieces), **options)
    if name.startswith(("Gemma", "Llama")):
        begin, end = ("<bos>", "<eos>") if name.startswith("Gemma") else ("<s>", "</s>")
        pieces = ["<pad>", end, begin, "<unk>", "<mask>", "▁", *_letters(), *(f"<0x{byte:02X}>" for byte in range(256))]
        made = cls(vocab=_numbered(pieces), merges=[], **options)
    else:  # byte-level: Qwen, GPT-2, RoBERTa
        pieces = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "<|endoftext|>", *sorted(ByteLevel.alphabet())]
        made = cls(vocab=_numbered(pieces), merges=[], **options)
    if made.pad_token is None:
        made.pad_token = "<pad>"
    made.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    made.chat_template = CHAT
    return made


def _letters() -> list[str]:
    return list(string.ascii_lowercase + string.ascii_uppercase + string.digits + ".,:;!?'\"-<>|/_()[]\n")


def _numbered(tokens: Sequence[str]) -> dict[str, int]:
    return {token: number for number, token in enumerate(dict.fromkeys(tokens))}
