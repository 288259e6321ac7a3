"""How a mask is learned: our defaults, and the published configurations (Tables 2 and 3) as presets."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ecodiff.errors import EcoDiffError
from ecodiff.pipelines.checks import checked_call, checked_guidance, checked_seed

from .hard_concrete import HardConcrete

KINDS = ("attention", "feed_forward", "modulation")
"""What sites are (`find_sites`): attentions lose heads, feed-forwards hidden neurons, modulations output channels."""

RAMP = 0.02  # share of open gates above the line to `target_open` at which β acts in full
_CHOICES = {
    "objective": ("final", "step"),
    "reconstruction": ("mse", "norm"),
    "regulariser": ("l0", "l1"),
    "optimizer": ("adam", "adamw"),
    "gate_draw": ("trajectory", "sample", "call"),
    "recompute": ("restore", "redraw"),
    "mixed_precision": ("no", "bf16"),
}
_COUNTS = ("updates", "batch_size", "num_inference_steps", "noises_per_prompt", "save_every", "snapshot_every")


@dataclass(frozen=True)
class LearnConfig:
    """How a mask is learned. The defaults are the *corrected* method; ``LearnConfig.paper`` is the published one.

    ``loss = reconstruction + weight * regulariser``. With ``normalize`` the reconstruction is relative to the teacher
    latents' variance (mse: squared error / variance; norm: per sample, ‖error‖ / sqrt(size * variance)): 0 is the
    unmasked model, an image of another seed about 2 (mse), for any model and latent scale; so one ``weight`` fits all
    models.
    """

    updates: int = 60
    batch_size: int = 6
    """Samples (prompt and noise) an update."""
    micro_batch_size: int | None = None
    """Samples that run together (None: all). Smaller needs less memory. It also changes which gates are drawn, and so
    λ: with gate_draw="call" (the default) all draws of an update come from one stream, in the order of the calls, and
    with gate_draw="trajectory" the gradient is averaged over more gate samples. gate_draw="sample" is not affected.
    Processes of a launcher share the samples that run together: of 8 on 4 processes each runs 2, with the gates that
    one process would draw, so their number does not change λ. With objective="step", whose loss is relative to the
    variance of samples that run together, these stay in one process, and a smaller size gives the others some."""
    num_inference_steps: int = 8
    guidance_scale: float | None = None
    """None: the pipeline's own default. Guidance runs both halves through the gated denoiser."""
    call: Mapping = field(default_factory=dict)
    """Further arguments of the pipeline's call (height, width, ...)."""
    kinds: tuple[str, ...] = ("attention", "feed_forward")
    objective: str = "final"
    """final: the trajectory's end (Eq. 3). step: what the paper argues against and never tabulates: at every state that
    the unmasked model visits, the gated denoiser's output against the unmasked one's, squared error over its variance
    (with ``normalize``), mean over calls; no gradient flows from step to step."""
    reconstruction: str = "mse"
    """mse: mean squared error of the final latents; norm: ‖ẑ_0 - z_0‖₂ of each sample (Eq. 3), averaged over
    samples."""
    normalize: bool = True
    regulariser: str = "l0"
    """l0: P(gate open) in closed form, mean over the units of a kind, summed over kinds (Eq. 4 before its
    approximation). l1: |λ|, mean over a site, then over sites, attention and feed-forward summed; modulation gets
    none (as published)."""
    weight: float = 4.0
    """β of Eq. 2."""
    target_open: float | None = 0.8
    """β acts on a kind only while its expected share of open gates is above the straight line that reaches this share
    with the last update (in full from ``RAMP`` above the line): so one β fits models that can spare much and models
    that can spare little. Take about 1 - ratio: 0.8 where a fifth will go. None: β acts in every update, as
    published."""
    lr: float | Mapping[str, float] = 0.15
    """One learning rate, or one a kind: {"attention": ..., "feed_forward": ..., "modulation": ...}."""
    optimizer: str = "adam"
    weight_decay: float = 0.0
    clip_grad_norm: float | None = None
    log_alpha_start: float = 3.0
    temperature: float = 0.83
    gamma: float = -0.1
    zeta: float = 1.1
    delta: float = 0.0
    gate_draw: str = "call"
    """call: each sample has gates of its own, drawn anew in each call of a module (as published); sample: of its own,
    kept through all steps; trajectory: one gate sample for the samples that run together, kept as well. All three
    have exact gradients, each of its own objective; more draws an update make a less noisy one."""
    recompute: str = "restore"
    """With gate_draw="call": restore the random state when a call is recomputed (exact gradient), or redraw, the
    published defect: the gradient then belongs to gates that the forward pass never saw. No effect on gates that are
    kept."""
    fixed_noise: bool = False
    """One z_T for all samples (Alg. 1, line 1), instead of one a sample (the expectation of Eq. 2)."""
    noises_per_prompt: int = 1
    seed: int = 0
    checkpoint: bool = True
    keep_last: int = 1
    mixed_precision: str = "no"
    """bf16 runs the denoiser under autocast; λ, gates and loss stay fp32. On a CPU without bf16 units it is slower. no:
    autocast is off, also where the caller has it on."""
    save_every: int = 10
    """Updates between two writes to resume_dir."""
    snapshot_every: int = 10
    """Updates between two copies of λ in ``Gates.snapshots``."""

    def __post_init__(self):
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise EcoDiffError(f"LearnConfig: {name}={getattr(self, name)!r} is not one of {', '.join(choices)}.")
        if self.objective == "step" and self.reconstruction != "mse":
            raise EcoDiffError("LearnConfig: objective='step' takes reconstruction='mse'; set it so.")
        for name in _COUNTS:
            if getattr(self, name) < 1:
                raise EcoDiffError(f"LearnConfig: {name}={getattr(self, name)} must be at least 1.")
        if self.micro_batch_size is not None and self.micro_batch_size < 1:
            raise EcoDiffError(f"LearnConfig: micro_batch_size={self.micro_batch_size} must be at least 1, or None.")
        numbers = {"weight": self.weight, "weight_decay": self.weight_decay, "keep_last": self.keep_last}
        numbers |= {f"lr[{kind!r}]": self.learning_rate(kind) for kind in self.kinds}
        for name, value in numbers.items():
            if not (math.isfinite(value) and value >= 0):
                raise EcoDiffError(f"LearnConfig: {name}={value} must be a finite number, at least 0.")
        if not math.isfinite(self.log_alpha_start):
            raise EcoDiffError(f"LearnConfig: log_alpha_start={self.log_alpha_start} must be finite.")
        if self.clip_grad_norm is not None and not self.clip_grad_norm > 0:
            raise EcoDiffError(f"LearnConfig: clip_grad_norm={self.clip_grad_norm} must be positive, or None.")
        if self.target_open is not None and not 0 < self.target_open < 1:
            raise EcoDiffError(f"LearnConfig: target_open={self.target_open} must lie between 0 and 1, or be None.")
        # The way to set a field of a frozen class: numpy's whole numbers become Python's, which JSON can hold.
        object.__setattr__(self, "seed", checked_seed(self.seed, "LearnConfig"))
        checked_guidance(self.guidance_scale, "LearnConfig")
        checked_call(self.call, "LearnConfig: call")
        self.distribution  # noqa: B018 (raises for constants that make no distribution)

    @property
    def distribution(self) -> HardConcrete:
        return HardConcrete(self.temperature, self.gamma, self.zeta, self.delta)

    def zero_at_start(self) -> list[str]:
        """What has exactly no gradient where λ starts, a sentence each; empty where all of the loss is alive there.

        Such a run is not wrong, but what is dead at its start says nothing: a regulariser without a gradient closes no
        gate, a reconstruction without one lets the regulariser alone move λ. The bounds are those of ``HardConcrete``.
        """
        start, gate = self.log_alpha_start, self.distribution
        sentences = []
        if start >= gate.saturation:
            sentences.append(
                f"λ starts at {start:g}, above {gate.saturation:.3f} where every gate is 1 for any noise "
                f"(δ={self.delta:g}): the reconstruction has exactly zero gradient until the regulariser alone has "
                "moved λ down. Start lower or lower δ."
            )
        if start <= gate.always_closed:
            sentences.append(
                f"λ starts at {start:g}, below {gate.always_closed:.3f} where every gate is 0 for any noise "
                f"(δ={self.delta:g}): nothing has a gradient there. Start higher or lower δ."
            )
        if self.regulariser == "l0" and start >= gate.l0_saturation:
            sentences.append(
                f"λ starts at {start:g}, above {gate.l0_saturation:.3f} where P(gate open) is 1 (δ={self.delta:g}): "
                "the L0 regulariser has exactly zero gradient there. Lower δ (0 has no such bound)."
            )
        elif self.regulariser == "l1" and start == 0:
            sentences.append(
                "λ starts at 0, where |λ| has no slope: the L1 regulariser has exactly zero gradient there."
            )
        return sentences

    def learning_rate(self, kind: str) -> float:
        """The learning rate of a kind; raises EcoDiffError where ``lr`` names none for it."""
        if not isinstance(self.lr, Mapping):
            return float(self.lr)
        if kind not in self.lr:
            raise EcoDiffError(
                f"LearnConfig: lr has no entry for kind {kind!r}: add it (0 keeps those gates as they start)."
            )
        return float(self.lr[kind])

    @classmethod
    def paper(cls, model: str, source: str = "paper", **changes) -> LearnConfig:
        """The published method for "sdxl" (Table 3) or "flux" (Table 2): L1 of raw λ, gates drawn anew in each call.

        ``source="paper"`` gives the numbers as printed, ``source="code"`` those of the authors' code where it differs:

        ================ ======================================= =========================================
        \\                paper (Tables 2, 3, App. E)             code
        ================ ======================================= =========================================
        λ start          5: every gradient of the reconstruction 3: alive for noise low enough (δ = 0.5
                         is exactly 0 until λ has drifted below  saturates at 3.089, δ = 0.1 at 4.388)
                         the bound; ``learn`` warns
        learning rates   SDXL .15/.15/0, FLUX .05/1/.5           SDXL .1/.1/0, FLUX .5/.1/.5
                         (attention/feed-forward/modulation)
        β                SDXL 0.5; FLUX 0.1, though Table 9      SDXL 0.5, FLUX 0.01
                         shows FID 87.5 there and Table 1's
                         43.25 near 0.01
        optimiser        Adam, weight decay 1e-2                 AdamW, weight decay 1e-2
        updates          400                                     100 (400 samples, an update each fourth)
        reconstruction   ‖·‖₂ of a sample (Eq. 3)                mean squared error
        ================ ======================================= =========================================

        Not reproduced: λ kept in bf16 (here fp32); FLUX's λ wrapped in a sigmoid before the L1; four samples run one
        by one and their gradients summed (here averaged, which Adam does not see). Alg. 1 prints ascent (line 6);
        both descend. Both draw one z_T for all prompts; the paper reads as one mask a trajectory, the code draws in
        each module call and again when it recomputes, which it does for every step (``gate_draw="call"``,
        ``recompute="redraw"``, ``keep_last=0`` here).
        """
        if model not in ("sdxl", "flux") or source not in ("paper", "code"):
            raise EcoDiffError(
                f"LearnConfig.paper({model!r}, {source!r}): take 'sdxl' or 'flux', and 'paper' or 'code'."
            )
        config = cls(
            batch_size=4,
            kinds=KINDS,
            normalize=False,
            regulariser="l1",
            target_open=None,
            weight_decay=1e-2,
            gate_draw="call",
            recompute="redraw",
            keep_last=0,
            fixed_noise=True,
            **_OF_MODEL[model],
            **_OF_SOURCE[source],
            **_OF_BOTH[model, source],
        )
        return replace(config, **changes)


# What `LearnConfig.paper` takes from the model, from the source, and from both.
_OF_MODEL: dict[str, dict] = {
    "sdxl": {"num_inference_steps": 50, "guidance_scale": 5.0, "delta": 0.5},
    "flux": {"num_inference_steps": 5, "guidance_scale": 3.5, "delta": 0.1},
}
_OF_SOURCE: dict[str, dict] = {
    "paper": {"updates": 400, "reconstruction": "norm", "optimizer": "adam", "log_alpha_start": 5.0},
    "code": {"updates": 100, "reconstruction": "mse", "optimizer": "adamw", "log_alpha_start": 3.0},
}
_OF_BOTH: dict[tuple[str, str], dict] = {
    ("sdxl", "paper"): {"weight": 0.5, "lr": {"attention": 0.15, "feed_forward": 0.15, "modulation": 0.0}},
    ("sdxl", "code"): {"weight": 0.5, "lr": {"attention": 0.1, "feed_forward": 0.1, "modulation": 0.0}},
    ("flux", "paper"): {"weight": 0.1, "lr": {"attention": 0.05, "feed_forward": 1.0, "modulation": 0.5}},
    ("flux", "code"): {"weight": 0.01, "lr": {"attention": 0.5, "feed_forward": 0.1, "modulation": 0.5}},
}
