"""What pruning costs and saves: parameters, operations and memory of a model, before and after, without its weights.

    cost("sdxl", batch=4, steps=50, ratio=0.2).update_peak()     # bytes

`trace` counts one denoiser call; the rest is arithmetic over a trajectory of ``n`` calls (§2.3, Fig. 8). With weights
``W`` of all components, ``h`` bytes held by a call for its backward and ``p`` the peak of one call's forward and
backward:

    plain                W + (n - 1) h + p
    checkpointed         W + p
    keep_last = k        W + (k - 1) h + p        (k = 1 is free: these activations are the first to be used)

and n inputs on top. Bytes are what PyTorch's allocator is asked for. In sizes such as "24GB" a GB is 10^9 bytes, a GiB
2^30.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, nn

from ecodiff.errors import EcoDiffError
from ecodiff.method.config import LearnConfig
from ecodiff.method.mask import make_mask
from ecodiff.method.sites import KINDS, Site, find_sites
from ecodiff.method.surgery import prune_denoiser
from ecodiff.pipelines.parts import Experts, experts
from ecodiff.pipelines.prompts import collate

from . import presets
from .capture import call_arguments
from .setting import Loop, Subject, geometry, loop_of, overridden, subject_of
from .trace import Backward, Trace, parameters, trace
from .units import gb, usable
from .watch import Flops

DEFAULT_KINDS = ("attention", "feed_forward")


@dataclass(frozen=True)
class Cost:
    """The cost of one model in one setting; bytes and parameters, not mega or giga anything."""

    model: str
    denoiser: str
    size: tuple[int, int]
    frames: int | None
    batch: int
    steps: int
    guidance: float
    dtype: str
    text_tokens: int
    calls: int  # of the denoiser, in a trajectory
    forwards: int  # samples the denoiser sees for one image: guidance doubles them
    parameters: dict[str, int]  # of the denoiser: by kind (all that units take with them), "other" and "total"
    units: dict[str, int]  # by kind of site
    flops: Flops  # one forward of one sample
    weights: int  # bytes of the denoiser, as those of the other components
    text_encoders: int
    largest_encoder: int  # of the text encoders, since offloading has one of them on the device at a time
    vae: int
    call: Trace  # one denoiser call with the whole batch
    decode: int  # bytes that decoding the latents needs beside the weights
    pruning: str | None = None  # how units were chosen
    pruned: Cost | None = None  # the same model after pruning, where that was asked for

    @property
    def picture_flops(self) -> Flops:
        """FLOPs of one image, guidance included; ``.paper`` and ``.total`` are the two conventions."""
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
        steps_kept = self.steps
        if checkpoint:
            steps_kept = min(keep_last, self.steps)
        # A step may be several calls, where guidance makes its own. One call's activations are needed in any case.
        calls_kept = max(steps_kept * self.calls // self.steps, 1)
        first_saves = 0
        if calls_kept == self.calls and not inner:
            # The first call's input needs no gradient, so it holds less; that matters only where every step is kept.
            first_saves = max(self._update.held - self.call.first_held, 0)
        weights = self.weights
        if not offload:
            weights += self.text_encoders + self.vae
        # The peak is in the backward of the last call, while all other calls that are kept hold theirs.
        return weights + self.calls * self.call.inputs + (calls_kept - 1) * call.held + call.peak - first_saves

    def max_keep_last(self, budget: int | str, *, inner: bool = False, offload: bool = False) -> int | None:
        """The most steps that can keep their activations within the budget; None where not even one fits."""
        room = usable(budget)
        for keep_last in range(self.steps, -1, -1):
            if self.update_peak(keep_last=keep_last, inner=inner, offload=offload) <= room:
                return keep_last
        return None

    def inference_peak(self, *, offload: bool = False) -> int:
        """Peak bytes of generating a batch of images.

        All components are on the device, or with ``offload`` one at a time (``pipe.enable_model_cpu_offload()``).

        Activations of text encoders, small beside their weights, are left out.
        """
        denoising = self.call.inputs + self.call.forward_peak
        if offload:
            return max(self.largest_encoder, self.weights + denoising, self.vae + self.decode)
        return self.weights + self.text_encoders + self.vae + max(denoising, self.decode)

    def to_dict(self) -> dict:
        """Everything as plain values, for JSON, with the peaks worked out."""
        plain = asdict(replace(self, pruned=None))  # the pruned one is added below, with its own peaks
        plain["picture_gflop"] = {"paper": self.picture_flops.paper / 1e9, "total": self.picture_flops.total / 1e9}
        plain["saved_bytes_a_call"] = self.saved
        plain["update_peak"] = {"plain": self.update_peak(checkpoint=False), "checkpointed": self.update_peak()}
        plain["update_peak"]["checkpointed_inner"] = self.update_peak(inner=True) if self.call.inner else None
        plain["inference_peak"] = {"all_on_device": self.inference_peak(), "offload": self.inference_peak(offload=True)}
        plain["pruned"] = self.pruned.to_dict() if self.pruned else None
        return plain

    @property
    def _update(self) -> Backward:
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
    round_to: int | str | Mapping[str, int | str] = 1,
    kinds: tuple[str, ...] = DEFAULT_KINDS,
    autocast: torch.dtype | None = None,
    inner: bool = True,
) -> Cost:
    """What a model costs; with ``ratio`` or ``mask`` also what it costs after pruning (``.pruned``).

    Args:
        model: a full-size preset (`presets.names()`: "sdxl", "flux-dev", ...) or its checkpoint's id, without weights;
            a loaded pipeline, pruned or not; or anything `ecodiff.load` takes.
        size: (height, width) in pixels, or one number for both. Here and below None is the pipeline's own default.
        frames, batch, steps, guidance, dtype, text_tokens: the call. Guidance above 1 doubles the work where the
            pipeline runs an unconditional half. dtype: "bf16", "fp16", "fp32" or a torch.dtype.
        call: further arguments of a loaded pipeline's call. They are needed where the denoiser's class is not known
            here, so that the pipeline's own loop has to show its arguments (`ecodiff.cost.capture`), and where that
            loop takes something else than a prompt (for ``batch`` images); elsewhere only the length of
            ``prompt_embeds`` counts.
        ratio: share of the units of each kind to remove (the paper's ratio), units chosen at random (seed 0).
        mask: {site: bool tensor, or number of units kept}, in the place of ``ratio``.
        round_to: see `make_mask`; with ``ratio`` only.
        kinds: kinds of sites that are gated, and pruned by ``ratio``.
        autocast: run the denoiser under autocast (its weights stay in ``dtype``).
        inner: also trace the denoiser's own activation checkpointing (a third of the time).

    Raises EcoDiffError, in one sentence, for anything that does not fit.
    """
    counter = Counter(
        model,
        batch,
        size=size,
        frames=frames,
        steps=steps,
        guidance=guidance,
        dtype=dtype,
        text_tokens=text_tokens,
        call=call,
        kinds=kinds,
        autocast=autocast,
        inner=inner,
    )
    if ratio is not None and mask is not None:
        raise EcoDiffError("cost: give a ratio or a mask, not both.")
    if ratio is not None:
        how = f"{ratio:.0%} of the units of each kind, chosen at random"
        return counter.with_pruned(counter.random_mask(ratio, round_to), how)
    if mask is not None:
        return counter.with_pruned(mask, "the given mask")
    return counter.original


class Counter:
    """A model in one setting: what it costs as it is, counted once, and what it costs with any mask."""

    def __init__(self, model, batch: int = 1, *, call=None, kinds=DEFAULT_KINDS, autocast=None, inner=True, **setting):
        setting = dict.fromkeys(("size", "frames", "steps", "guidance", "dtype", "text_tokens")) | setting
        self.subject = overridden(subject_of(model), **setting)
        if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
            raise EcoDiffError(f"cost: batch is the number of images generated together, at least 1, not {batch!r}.")
        explicit = {name: setting[name] for name in ("size", "frames", "text_tokens")}
        self.loop = loop_of(self.subject, batch, call_arguments(call), explicit)
        if self.loop.size is not None:
            self.subject = replace(self.subject, size=self.loop.size)
        self.batch, self.kinds, self.autocast, self.inner = batch, kinds, autocast, inner
        self.original = self._count(self.subject.network)

    def sites(self) -> dict[str, Site]:
        """The sites that a mask can name; raises EcoDiffError where there is none."""
        sites = find_sites(self.subject.network, self.kinds)
        if not sites:
            raise EcoDiffError(
                f"cost: {self.subject.title} has no sites of the kinds {', '.join(self.kinds)} to prune."
            )
        return sites

    def random_mask(self, ratio: float, round_to=1) -> dict[str, Tensor]:
        """A mask that removes this share of the units of each kind. Which ones does not matter: all cost the same."""
        sites = self.sites()
        generator = torch.Generator().manual_seed(0)
        scores = {name: torch.rand(site.units, generator=generator) for name, site in sites.items()}
        return make_mask(scores, sites, ratio, round_to=round_to)

    def with_pruned(self, mask: Mapping[str, Tensor | int], how: str) -> Cost:
        """The cost with, as ``pruned``, that of the model after pruning by the mask."""
        network = self.subject.network
        pruned = prune_denoiser(_skeleton(network), _as_bool(mask, network))
        # Pruning leaves the VAE as it is, so that it is not traced again.
        smaller = self._count(pruned, (self.original.vae, self.original.decode))
        return replace(self.original, pruned=replace(smaller, pruning=how))

    def _count(self, network: nn.Module, decoding: tuple | None = None) -> Cost:
        return _count(self.subject, network, self.loop, self.batch, self.kinds, self.autocast, self.inner, decoding)


def fit(pipe, config: LearnConfig, prompt: str | Mapping, budget: int | str) -> LearnConfig:
    """The configuration with which a mask update fits into a memory budget (§2.3).

    Its ``keep_last`` is the most last steps that can keep their activations. The other steps are checkpointed, which
    changes no gradient. All components count as being on the device, unless the pipeline is offloaded.

    Args:
        pipe: the loaded pipeline.
        config: how it is to learn; all but ``checkpoint`` and ``keep_last`` stays.
        prompt: one of those to learn from, whose length counts where it is given as embeddings.
        budget: bytes of the device, or text such as "24GB".

    Raises EcoDiffError where not even one step at a time fits, saying what would.
    """
    call = dict(config.call)
    # Of a size that is given in part, the pipeline has to find the rest: then its own default is counted.
    size = None
    if {"height", "width"} <= call.keys():
        size = (call["height"], call["width"])
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
    offload = bool(getattr(pipe, "_all_hooks", None))  # diffusers keeps there what moves components to and fro
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
    """The cost of one network in the subject's setting.  decoding: what `_decoding` gives, where that is known."""
    call = _traced(s, network, loop, kinds, autocast, inner)
    # All kinds, not only those that are gated: a table shows where a model's parameters are.
    units, removable = dict.fromkeys(KINDS, 0), dict.fromkeys(KINDS, 0)
    for site in find_sites(network, KINDS).values():
        units[site.kind] += site.units
        removable[site.kind] += site.units * site.params_per_unit
    total = parameters(network)
    buffers = sum(buffer.numel() for buffer in network.buffers())
    width = s.dtype.itemsize
    encoders = list(s.text_encoders.values())
    if s.pipe is None:
        encoders = [count * width for count in encoders]  # a preset gives parameters, a loaded pipeline bytes
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
        units=units,
        flops=call.flops * (1 / loop.samples),
        weights=width * (total + buffers),
        text_encoders=sum(encoders),
        largest_encoder=max(encoders, default=0),
        vae=vae_bytes,
        call=call,
        decode=decode,
    )


def _traced(s: Subject, network: nn.Module, loop: Loop, kinds, autocast, inner) -> Trace:
    """One call. Of several experts, the operations of their mean call in the loop, and the most bytes of any."""
    traces = []
    for part in experts(network):
        sites = find_sites(part, kinds)
        one = trace(
            part, loop.inputs, dtype=s.dtype, sites=sites, gradient_input=loop.latents, inner=inner, autocast=autocast
        )
        traces.append(one)
    if len(traces) == 1:
        return traces[0]
    flops = Flops(0, 0, 0)
    for each, calls in zip(traces, loop.shares, strict=True):
        flops += each.flops * (calls / loop.calls)
    return Trace(
        flops=flops,
        inputs=max(each.inputs for each in traces),
        forward_peak=max(each.forward_peak for each in traces),
        update=_largest([each.update for each in traces]),
        first_held=traces[0].first_held,  # the loop begins with the expert of the noisiest steps, which is the first
        inner=_largest([each.inner for each in traces]),
    )


def _largest(backwards: list[Backward | None]) -> Backward | None:
    """The most of each figure; None where no expert has them."""
    known = [each for each in backwards if each is not None]
    if not known:
        return None
    return Backward(
        held=max(each.held for each in known),
        saved=max(each.saved for each in known),
        peak=max(each.peak for each in known),
    )


def _decoding(s: Subject, batch: int, g: presets.Geometry) -> tuple[int, int]:
    """Bytes of the VAE's weights, and of decoding beside them."""
    if s.vae is None:
        return 0, 0
    dtype = s.dtype
    if dtype == torch.float16 and getattr(s.vae.config, "force_upcast", False):
        dtype = torch.float32  # the VAE of SDXL overflows in fp16, so its pipeline decodes in fp32
    channels = getattr(s.vae.config, "latent_channels", None) or s.vae.config.z_dim
    shape: tuple[int, ...] = (batch, channels, g.height, g.width)
    # Some images are frames of a video autoencoder (Qwen-Image).
    if s.frames is not None or "temperal_downsample" in s.vae.config:
        shape = (batch, channels, g.frames, g.height, g.width)
    decoded = trace(s.vae, {"z": shape, "return_dict": False}, dtype=dtype, method="decode")
    return parameters(s.vae) * dtype.itemsize, decoded.inputs + decoded.forward_peak


def _skeleton(network: nn.Module) -> nn.Module:
    """The same network on the meta device, pruned or not, without touching its weights."""
    if isinstance(network, Experts):

        def skeleton(part, _):
            return _skeleton(part)

        return network.each(skeleton)
    if all(parameter.is_meta for parameter in network.parameters()):
        return network
    with torch.device("meta"):
        return type(network).from_config(dict(network.config)).eval()


def _as_bool(mask: Mapping, network: nn.Module) -> dict[str, Tensor]:
    """The mask with a bool tensor for each number of units; the first units are kept, since all cost the same."""
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
