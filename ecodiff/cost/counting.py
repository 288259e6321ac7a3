"""What pruning costs and saves: parameters, operations and memory of a model, before and after, without its weights.

    cost("sdxl", batch=4, steps=50, ratio=0.2).update_peak()     # bytes

`trace` counts one denoiser call; the rest is arithmetic over a trajectory of ``n`` calls (§2.3, Fig. 8). With weights
``W`` of all components, ``h`` bytes held by a call for its backward and ``p`` the peak of one call's forward and
backward:

    plain                W + (n - 1) h + p
    checkpointed         W + p
    keep_last = k        W + (k - 1) h + p        (k = 1 is free: these activations are the first to be used)

and n inputs on top.
Bytes are what PyTorch's allocator is asked for. Sizes such as "24GB" are 10^9 bytes a GB, "24GiB" 2^30.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, astuple, dataclass, replace

import torch
from torch import Tensor, nn

from ecodiff.errors import EcoDiffError
from ecodiff.method.config import LearnConfig
from ecodiff.method.mask import make_mask
from ecodiff.method.sites import KINDS, find_sites
from ecodiff.method.surgery import prune_denoiser
from ecodiff.pipelines.parts import Experts, experts
from ecodiff.pipelines.prompts import collate

from . import presets
from .capture import call_arguments
from .setting import Loop, Subject, geometry, loop_of, overridden, subject_of
from .trace import Backward, Trace, parameters, trace
from .units import gb, usable
from .watch import Flops


@dataclass(frozen=True)
class Cost:
    """The cost of one model in one setting; bytes and parameters, not mega or giga anything.

    calls: denoiser calls of a trajectory.  forwards: samples the denoiser sees for one picture (guidance doubles it).
    parameters: of the denoiser, by kind of site (what all units of the kind take with them), "other" and "total".
    units: by kind.  flops: one forward of one sample.  weights, text_encoders, vae: bytes of the components.
    largest_encoder: bytes of the largest text encoder.  call: one denoiser call with the whole batch.
    decode: bytes that decoding the latents needs beside the weights.  pruning: how units were chosen, or None.
    pruned: the same model after pruning, where that was asked for.
    """

    model: str
    denoiser: str
    size: tuple[int, int]
    frames: int | None
    batch: int
    steps: int
    guidance: float
    dtype: str
    text_tokens: int
    calls: int
    forwards: int
    parameters: dict[str, int]
    units: dict[str, int]
    flops: Flops
    weights: int
    text_encoders: int
    largest_encoder: int
    vae: int
    call: Trace
    decode: int
    pruning: str | None = None
    pruned: Cost | None = None

    @property
    def picture_flops(self) -> Flops:
        """FLOPs of one picture, guidance included; ``.paper`` and ``.total`` are the two conventions."""
        return self.flops * self.forwards

    @property
    def saved(self) -> int:
        """Bytes that autograd saves for backward in one denoiser call of the whole batch, weights left out."""
        return self._update.saved

    def update_peak(
        self, *, checkpoint: bool = True, keep_last: int = 0, inner: bool = False, offload: bool = False
    ) -> int:
        """Peak bytes of one mask update.

        checkpoint: time-step checkpointing; without it all steps keep their activations, as with ``keep_last=steps``.
        keep_last: last steps that keep their activations (1 costs nothing where a step is one call).
        inner: activation checkpointing inside the denoiser as well (``denoiser.enable_gradient_checkpointing()``).
        offload: text encoders and VAE are elsewhere (``pipe.enable_model_cpu_offload()``).
        """
        call = self.call.inner if inner else self._update
        if call is None:
            raise EcoDiffError(f"{self.denoiser} has no activation checkpointing of its own.")
        steps = min(keep_last, self.steps) if checkpoint else self.steps
        kept = max(steps * self.calls // self.steps, 1)  # one call's activations are needed in any case
        # The first call's input needs no gradient, so it holds less; its share matters only where every step is kept.
        saving = max(self._update.held - self.call.first_held, 0) if kept == self.calls and not inner else 0
        weights = self.weights + (0 if offload else self.text_encoders + self.vae)
        return weights + self.calls * self.call.inputs + (kept - 1) * call.held + call.peak - saving

    def max_keep_last(self, budget: int | str, *, inner: bool = False, offload: bool = False) -> int | None:
        """The most steps that can keep their activations within the budget; None where not even one fits."""
        room = usable(budget)
        fits = [
            k for k in range(self.steps, -1, -1) if self.update_peak(keep_last=k, inner=inner, offload=offload) <= room
        ]
        return fits[0] if fits else None

    def inference_peak(self, *, offload: bool = False) -> int:
        """Peak bytes of drawing a batch: all components on the device, or one at a time (``enable_model_cpu_offload``).

        Activations of text encoders, small beside their weights, are left out.
        """
        denoising = self.call.inputs + self.call.forward_peak
        if offload:
            return max(self.largest_encoder, self.weights + denoising, self.vae + self.decode)
        return self.weights + self.text_encoders + self.vae + max(denoising, self.decode)

    def to_dict(self) -> dict:
        """Everything as plain values, for JSON, with the peaks worked out."""
        plain = asdict(replace(self, pruned=None))
        plain["picture_gflop"] = {"paper": self.picture_flops.paper / 1e9, "total": self.picture_flops.total / 1e9}
        plain["saved_bytes_a_call"] = self.saved
        plain["update_peak"] = {
            "plain": self.update_peak(checkpoint=False),
            "checkpointed": self.update_peak(),
            "checkpointed_inner": self.update_peak(inner=True) if self.call.inner else None,
        }
        plain["inference_peak"] = {"all_on_device": self.inference_peak(), "offload": self.inference_peak(offload=True)}
        plain["pruned"] = self.pruned.to_dict() if self.pruned else None
        return plain

    @property
    def _update(self):
        if self.call.update is None:
            raise EcoDiffError(f"{self.denoiser} has no sites to gate, so there is no mask update.")
        return self.call.update


def cost(
    model,
    *,
    size: tuple[int, int] | int | None = None,
    frames: int | None = None,
    batch: int = 1,
    steps: int | None = None,
    guidance: float | None = None,
    dtype: str | torch.dtype | None = None,
    text_tokens: int | None = None,
    call: Mapping | None = None,
    ratio: float | None = None,
    mask: Mapping[str, Tensor | int] | None = None,
    round_to: int | Mapping[str, int] = 1,
    kinds: tuple[str, ...] = ("attention", "feed_forward"),
    autocast: torch.dtype | None = None,
    inner: bool = True,
) -> Cost:
    """Count what a model costs; with ``ratio`` or ``mask`` also what it costs after pruning (``.pruned``).

    Args:
        model: a full-size preset (`fullsize.names()`: "sdxl", "flux-dev", ...) or its checkpoint's id, without weights;
            a loaded pipeline, pruned or not; or anything `ecodiff.load` takes.
        size: (height, width) in pixels, or one number for both. Here and below None is the pipeline's own default.
        frames, batch, steps, guidance, dtype, text_tokens: the call. Guidance above 1 doubles the work where the
            pipeline runs an unconditional half. dtype: "bf16", "fp16", "fp32" or a torch.dtype.
        call: further arguments of a loaded pipeline's call. They are needed where the denoiser's class is not known
            here, so that the pipeline's own loop has to show its arguments (`ecodiff.cost.capture`), and where that
            loop takes something else than a prompt (for ``batch`` pictures); elsewhere only the length of
            ``prompt_embeds`` counts.
        ratio: share of the units of each kind to remove (the paper's ratio), units chosen at random (seed 0).
        mask: {site: bool tensor, or number of units kept}, in the place of ``ratio``.
        round_to: see `make_mask`; with ``ratio`` only.
        kinds: kinds of sites that are gated, and pruned by ``ratio``.
        autocast: run the denoiser under autocast (its weights stay in ``dtype``).
        inner: also trace the denoiser's own activation checkpointing (a third of the time).

    Raises EcoDiffError, in one sentence, for anything that does not fit.
    """
    subject = subject_of(model)
    subject = overridden(
        subject, size=size, frames=frames, steps=steps, guidance=guidance, dtype=dtype, text_tokens=text_tokens
    )
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise EcoDiffError(f"cost: batch is the number of pictures drawn together, at least 1, not {batch!r}.")
    if ratio is not None and mask is not None:
        raise EcoDiffError("cost: give a ratio or a mask, not both.")
    network, sites = subject.network, find_sites(subject.network, kinds)
    if ratio is not None:
        if not sites:
            raise EcoDiffError(f"cost: {subject.title} has no sites of the kinds {', '.join(kinds)} to prune.")
        generator = torch.Generator().manual_seed(0)
        scores = {name: torch.rand(site.units, generator=generator) for name, site in sites.items()}
        mask, how = (
            make_mask(scores, sites, ratio, round_to=round_to),
            f"{ratio:.0%} of the units of each kind, chosen at random",
        )
    else:
        how = "the given mask"
    asked = {"size": size, "frames": frames, "text_tokens": text_tokens}
    loop = loop_of(subject, batch, call_arguments(call), asked)
    if loop.size is not None:
        subject = replace(subject, size=loop.size)
    original = _count(subject, network, loop, batch, kinds, autocast, inner)
    if mask is None:
        return original
    pruned = prune_denoiser(_skeleton(network), _as_bool(mask, network))
    smaller = _count(subject, pruned, loop, batch, kinds, autocast, inner, (original.vae, original.decode))
    return replace(original, pruned=replace(smaller, pruning=how))


def fit(pipe, config: LearnConfig, prompt: str | Mapping, budget: int | str) -> LearnConfig:
    """The configuration with which a mask update fits into a memory budget (§2.3): the most last steps, ``keep_last``,
    that can keep their activations. The other steps are checkpointed, which changes no gradient.

    prompt: one of those to learn from, whose length counts where it is given as embeddings. budget: bytes of the
    device, or text such as "24GB". Counts all components on the device, unless the pipeline is offloaded. Raises
    EcoDiffError where not even one step at a time fits, saying what would.
    """
    call = dict(config.call)
    size = (call["height"], call["width"]) if {"height", "width"} <= call.keys() else None
    batch = config.micro_batch_size or config.batch_size
    counted = cost(
        pipe,
        size=size,
        frames=call.get("num_frames"),
        batch=batch,
        call=call | collate([prompt] * batch),
        steps=config.num_inference_steps,
        guidance=config.guidance_scale,
        kinds=config.kinds,
        autocast=torch.bfloat16 if config.mixed_precision == "bf16" else None,
        inner=False,
    )
    offload = bool(getattr(pipe, "_all_hooks", None))
    keep_last = counted.max_keep_last(budget, offload=offload)
    if keep_last is None:
        need = counted.update_peak(offload=offload)
        raise EcoDiffError(
            f"A mask update of {counted.batch} samples needs {gb(need)} even with one step at a time, and {budget} "
            f"leaves {gb(usable(budget))}: lower micro_batch_size, call enable_gradient_checkpointing() on the "
            "denoiser, or offload."
        )
    return replace(config, checkpoint=True, keep_last=keep_last)


def _count(
    s: Subject, network: nn.Module, loop: Loop, batch: int, kinds, autocast, inner, decoding: tuple | None = None
) -> Cost:
    call = _traced(s, network, loop, kinds, autocast, inner)
    everything = find_sites(network, KINDS)
    removable = {
        kind: sum(site.units * site.params_per_unit for site in everything.values() if site.kind == kind)
        for kind in KINDS
    }
    total = parameters(network)
    width = s.dtype.itemsize
    encoders = [size if s.pipe is not None else size * width for size in s.text_encoders.values()]
    vae_bytes, decode = decoding or _decoding(s, batch, geometry(s, batch))
    return Cost(
        model=s.title,
        denoiser=" and ".join(type(part).__name__ for part in experts(network)),
        size=s.size,
        frames=s.frames,
        batch=batch,
        steps=s.steps,
        guidance=s.guidance,
        dtype=str(s.dtype).removeprefix("torch."),
        text_tokens=s.text_tokens,
        calls=loop.calls,
        forwards=loop.calls * loop.samples // batch,
        parameters={**removable, "other": total - sum(removable.values()), "total": total},
        units={kind: sum(site.units for site in everything.values() if site.kind == kind) for kind in KINDS},
        flops=call.flops * (1 / loop.samples),
        weights=width * (total + sum(buffer.numel() for buffer in network.buffers())),
        text_encoders=sum(encoders),
        largest_encoder=max(encoders, default=0),
        vae=vae_bytes,
        call=call,
        decode=decode,
    )


def _traced(s: Subject, network: nn.Module, loop: Loop, kinds, autocast, inner) -> Trace:
    """One call. Of several experts, the operations of their mean call in the loop, and the most bytes of any."""
    traces = [
        trace(
            part,
            loop.inputs,
            dtype=s.dtype,
            sites=find_sites(part, kinds),
            gradient_input=loop.latents,
            inner=inner,
            autocast=autocast,
        )
        for part in experts(network)
    ]
    if len(traces) == 1:
        return traces[0]
    flops = [each.flops * (calls / loop.calls) for each, calls in zip(traces, loop.shares, strict=True)]
    return Trace(
        flops=Flops(*(sum(values) for values in zip(*(astuple(each) for each in flops), strict=True))),
        inputs=max(each.inputs for each in traces),
        forward_peak=max(each.forward_peak for each in traces),
        update=_largest([each.update for each in traces]),
        first_held=traces[0].first_held,
        inner=_largest([each.inner for each in traces]),
    )


def _largest(backwards: list[Backward | None]) -> Backward | None:
    known = [astuple(each) for each in backwards if each is not None]
    return Backward(*(max(values) for values in zip(*known, strict=True))) if known else None


def _decoding(s: Subject, batch: int, g: presets.Geometry) -> tuple[int, int]:
    """Bytes of the VAE's weights, and of decoding beside them."""
    if s.vae is None:
        return 0, 0
    upcast = s.dtype == torch.float16 and getattr(s.vae.config, "force_upcast", False)
    dtype = torch.float32 if upcast else s.dtype
    channels = getattr(s.vae.config, "latent_channels", None) or s.vae.config.z_dim
    shape = (batch, channels, *((g.frames,) if s.frames is not None else ()), g.height, g.width)
    counted = trace(s.vae, {"z": shape, "return_dict": False}, dtype=dtype, method="decode")
    return parameters(s.vae) * dtype.itemsize, counted.inputs + counted.forward_peak


def _skeleton(network: nn.Module) -> nn.Module:
    """The same network on the meta device, pruned or not, without touching its weights."""
    if isinstance(network, Experts):
        return network.each(lambda part, _: _skeleton(part))
    if all(parameter.is_meta for parameter in network.parameters()):
        return network
    with torch.device("meta"):
        return type(network).from_config(dict(network.config)).eval()


def _as_bool(mask: Mapping, network: nn.Module) -> dict[str, Tensor]:
    sites = find_sites(network, KINDS)
    result = {}
    for name, keep in mask.items():
        if isinstance(keep, int) and not isinstance(keep, bool):
            if name not in sites or not 0 <= keep <= sites[name].units:
                raise EcoDiffError(
                    f"cost: mask: {name!r} cannot keep {keep} units; find_sites lists the sites and their units."
                )
            keep = torch.arange(sites[name].units) < keep
        result[name] = keep
    return result
