"""How a pruned pipeline is retrained: the published settings as defaults."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from ecodiff.errors import EcoDiffError
from ecodiff.method.config import KINDS
from ecodiff.pipelines.checks import checked_call, checked_seed


@dataclass(frozen=True)
class RetrainConfig:
    """How a pruned pipeline is retrained. The defaults are those published for SDXL at 512x512 pixels.

    They need a full-size model and many hours. The authors' code for FLUX.1-dev has ``rank=256, steps=40_000``. A
    small model in few steps wants a learning rate of 1e-4 to 1e-3.
    """

    method: str = "lora"
    """lora (App. J): adapters beside the layers of attentions and feed-forwards, merged at the end; full: all weights
    of the denoiser; 2:4: all weights, of every four in a row two are zero, by SparseDM's straight-through estimator."""
    steps: int = 10_000
    """App. J. 0 gives the pipeline back as it was."""
    batch_size: int = 32
    """Images a step (authors' code)."""
    micro_batch_size: int | None = None
    """Images a call of the denoiser (None: all of a step): fewer need less memory."""
    lr: float | None = None
    """None: 1e-6 for lora, 1e-7 for full (authors' code) and 2:4."""
    rank: int = 16
    """Rank of the adapters (authors' code)."""
    alpha: float | None = None
    """Adapters are scaled by alpha / rank. None: as the rank (authors' code: 16 and 16)."""
    kinds: tuple[str, ...] = ("attention", "feed_forward")
    """Kinds of sites whose layers get adapters (authors' code)."""
    weight_decay: float = 1e-2
    """Of AdamW. This and the clipping are what diffusers' own training scripts do; the paper gives neither."""
    clip_grad_norm: float | None = 1.0
    call: Mapping = field(default_factory=dict)
    """Further arguments of the pipeline's call that the images were generated with (max_sequence_length, ...). A
    guidance_scale counts only for denoisers that read it; steps and size do not count."""
    mixed_precision: str = "no"
    """bf16 runs the denoiser under autocast; weights that are trained stay fp32 (authors' code: fp16)."""
    seed: int = 0

    def __post_init__(self):
        for name, choices in {"method": ("lora", "full", "2:4"), "mixed_precision": ("no", "bf16")}.items():
            if getattr(self, name) not in choices:
                raise EcoDiffError(f"RetrainConfig: {name}={getattr(self, name)!r} is not one of {', '.join(choices)}.")
        counts = {"steps": 0, "batch_size": 1, "rank": 1, "micro_batch_size": 1}
        for name, least in counts.items():
            value = getattr(self, name)
            if name == "micro_batch_size" and value is None:
                continue
            if not isinstance(value, int) or value < least:
                raise EcoDiffError(f"RetrainConfig: {name}={value!r} must be a whole number, at least {least}.")
        for name in ("lr", "alpha", "clip_grad_norm"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, (int, float)) and 0 < value < math.inf):
                raise EcoDiffError(f"RetrainConfig: {name}={value!r} must be a finite number above 0, or None.")
        if not (isinstance(self.weight_decay, (int, float)) and 0 <= self.weight_decay < math.inf):
            raise EcoDiffError(f"RetrainConfig: weight_decay={self.weight_decay!r} must be finite and at least 0.")
        if not isinstance(self.call, Mapping):
            raise EcoDiffError(f"RetrainConfig: call={self.call!r} must map names of the call's arguments to values.")
        checked_call(self.call, "RetrainConfig: call")
        # A frozen dataclass can be written to only in this way; the seed may come as a NumPy integer, say.
        object.__setattr__(self, "seed", checked_seed(self.seed, "RetrainConfig"))
        if not self.kinds or set(self.kinds) - set(KINDS):
            raise EcoDiffError(f"RetrainConfig: kinds={self.kinds!r} must be some of {', '.join(KINDS)}.")

    @property
    def learning_rate(self) -> float:
        """``lr``, or the published one of the method."""
        if self.lr is not None:
            return self.lr
        return 1e-6 if self.method == "lora" else 1e-7
