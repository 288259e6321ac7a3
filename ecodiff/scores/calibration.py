"""What the methods that look at a running model share: generating from prompts while something watches each call.

Nothing but final latents is kept. A method hooks the layers it wants to see, and adds up what it needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ecodiff.errors import EcoDiffError
from ecodiff.method.carried import refuse_elsewhere
from ecodiff.method.layers import channel_axis
from ecodiff.method.sites import Site, Span, sites_but
from ecodiff.pipelines.batches import form_of_samples, in_batches
from ecodiff.pipelines.checks import checked_call, checked_guidance, checked_seed
from ecodiff.pipelines.endings import Watch, count_steps, last_latents
from ecodiff.pipelines.forward_hooks import hooked
from ecodiff.pipelines.parts import denoiser, named_experts
from ecodiff.pipelines.prompts import checked_prompts, encoding_once, mix
from ecodiff.pipelines.running import frozen, private_copy, without_adapters
from ecodiff.progress import progress_bar

KINDS = ("attention", "feed_forward")


@dataclass(frozen=True)
class Sampling:
    """How calibration prompts are run. Prompt i has a noise of its own, made from ``seed`` and i, on the CPU."""

    seed: int = 0
    num_inference_steps: int = 8
    guidance_scale: float | None = None
    """None: the pipeline's own default. With guidance both halves of a call count as samples."""
    batch_size: int = 8
    call: Mapping = field(default_factory=dict)
    """Further arguments of the pipeline's call (height, width, ...)."""
    progress: bool = True
    exclude: tuple[str, ...] = ()
    """Names of sites that get no score, such as those that the pipeline's call never reaches."""

    def __post_init__(self):
        # The way to set a field of a frozen class: numpy's whole numbers become Python's, which JSON can hold.
        object.__setattr__(self, "seed", checked_seed(self.seed, "Sampling"))
        checked_guidance(self.guidance_scale, "Sampling")
        checked_call(self.call, "Sampling: call")
        for name in ("num_inference_steps", "batch_size"):
            if getattr(self, name) < 1:
                raise EcoDiffError(f"{name}={getattr(self, name)} must be at least 1.")


@dataclass
class Clock:
    """Where a running trajectory is: in scheduler step ``step`` of ``steps``, 0 the noisiest."""

    scheduler: Any = None
    watch: Watch = field(default_factory=Watch)

    @property
    def step(self) -> int:
        return self.watch.steps

    @property
    def steps(self) -> int:
        return len(self.scheduler.timesteps)


@dataclass(frozen=True)
class Call:
    """One call of the denoiser in a trajectory, made in scheduler step ``step``."""

    step: int
    args: tuple
    kwargs: dict
    output: Any
    network: nn.Module
    """That was called: the denoiser, or one of `Experts`."""


def draw(
    pipe,
    prompts: Sequence,
    sampling: Sampling,
    *,
    label: str = "trajectories",
    each_call: Callable[[Call], None] | None = None,
    each_batch: Callable[[Tensor, object], None] | None = None,
    clock: Clock | None = None,
) -> Tensor:
    """Final latents of all prompts, fp32 [N, ...] as the pipeline lays them out; ``pipe`` is left as it was.

    ``each_call`` sees every call of the denoiser after it ran; ``each_batch`` the final latents of a batch and the
    scheduler as the loop left it; ``clock`` is kept right for hooks that read it. Raises EcoDiffError for no or empty
    prompts, or a loop that returns no latents.
    """
    prompts = checked_prompts(prompts, label)
    runner = encoding_once(private_copy(pipe))
    modules = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    clock = clock or Clock()
    clock.scheduler, clock.watch = runner.scheduler, count_steps(runner.scheduler)

    parts: list[Tensor] = []
    bar = progress_bar(total=len(prompts), desc=label, progress=sampling.progress)
    settings: dict = {"num_inference_steps": sampling.num_inference_steps}
    if sampling.guidance_scale is not None:
        settings["guidance_scale"] = sampling.guidance_scale
    settings |= sampling.call

    def run(numbers: list[int]) -> None:
        # A generator for each, so that neither batch size nor order changes the noise of a prompt.
        generators = [torch.Generator().manual_seed(mix(sampling.seed, i)) for i in numbers]
        arguments = {**form.arguments([prompts[i] for i in numbers], generators), **settings}
        latents = last_latents(runner, clock.watch, type(pipe).__call__, arguments)
        if not torch.isfinite(latents).all():
            raise EcoDiffError(
                f"{type(pipe).__name__} returned no finite latents: check its weights, dtype and guidance."
            )
        parts.append(latents.float())
        if each_batch:
            each_batch(latents, runner.scheduler)
        bar.update(len(numbers))

    def see(args, kwargs, output, network: nn.Module) -> None:
        assert each_call
        each_call(Call(clock.step, args, kwargs, output, network))

    with torch.no_grad(), frozen(*modules), bar:
        form = form_of_samples(sampling.batch_size, runner, prompts, **settings)
        with hooked(denoiser(pipe), label) as hooks:
            if each_call:
                for name, network in named_experts(denoiser(pipe)).items():
                    hooks.after(name, partial(see, network=network), site=type(network).__name__)
            in_batches(range(len(prompts)), form.size, run)
    return torch.cat(parts)


def gates_of_samples(model: nn.Module, sites: Mapping[str, Site], samples: int) -> dict[str, Tensor]:
    """Open gates, one for each unit and sample of a batch, {site name: ones [samples, units]}.

    Gradients in them are those of every sample by itself.
    """
    device = next(model.parameters()).device
    return {name: torch.ones(samples, site.units, device=device, requires_grad=True) for name, site in sites.items()}


def sites_of(pipe, kinds: tuple[str, ...], readers: bool = False, exclude: Sequence[str] = ()) -> dict[str, Site]:
    """The sites of these kinds but the excluded ones, of a denoiser that has all its weights and no adapters.

    Raises EcoDiffError where there is none, an excluded name is no site or, with ``readers``, no layer reads one.
    """
    without_adapters(denoiser(pipe), "scores")
    refuse_elsewhere(denoiser(pipe), "scores")
    sites = sites_but(denoiser(pipe), kinds, exclude)
    if not sites:
        raise EcoDiffError(f"{type(pipe).__name__}: its denoiser has no sites of the kinds {', '.join(kinds)}.")
    for site in sites.values():
        if readers and not site.readers:
            raise EcoDiffError(f"{site.name}: no layer reads the units of kind {site.kind!r}, so leave this kind out.")
    return sites


@contextmanager
def reading(model: nn.Module, sites: Mapping[str, Site], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Inside, ``see(layer name, input [rows, channels])`` is called whenever a layer runs that reads units.

    Raises EcoDiffError on leaving where one of these layers never ran.
    """
    layers = {}  # a layer that two sites read is watched once
    for name, site in sites.items():
        for span in site.readers:
            layers[span.layer] = name

    def watch(x: Tensor, layer: str, axis: int) -> None:
        see(layer, x.detach().movedim(axis, -1).flatten(0, -2))

    with hooked(model, "scores") as hooks:
        for layer, name in layers.items():
            axis = channel_axis(model.get_submodule(layer))
            hooks.before(layer, partial(watch, layer=layer, axis=axis), name)
        yield


def columns(span: Span, units: int) -> slice:
    """The columns (or rows) of a layer that belong to all units of a span, in their order."""
    return slice(span.offset, span.offset + units * span.size)
