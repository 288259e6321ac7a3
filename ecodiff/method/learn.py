"""Learning a mask end to end (Alg. 1): one λ a unit, trained so that the final latents stay put (Eq. 2, 3).

Each update samples hard concrete gates, runs the whole gated trajectory from the same noise as the unmasked model,
compares the final latents and adds the price of open gates (Eq. 4). Two ways of doing it are configurations of the
same loop: *corrected* (``LearnConfig()``) and *faithful* to what was published (``LearnConfig.paper``).
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial, wraps
from operator import attrgetter
from pathlib import Path

import torch
from torch import Tensor, nn

from ecodiff import processes
from ecodiff.errors import EcoDiffError
from ecodiff.pipelines.batches import Form, form_of_samples, in_batches, joins
from ecodiff.pipelines.forward_hooks import Hooks, hooked, never_ran, replaced_forward
from ecodiff.pipelines.identity import Identity, describe_run
from ecodiff.pipelines.parts import denoiser as find_denoiser
from ecodiff.pipelines.prompts import NotJoined, checked_prompts, encoding_once, epoch_batch, mix
from ecodiff.pipelines.running import in_words, not_half, on_device
from ecodiff.progress import progress_bar, say

from . import resume
from .carried import refuse_elsewhere, refuse_streamed
from .checkpointing import undisturbed
from .config import RAMP, LearnConfig
from .exact import limits, measure
from .gates import Gates, fresh_gates
from .hooks import apply_gates
from .sites import Site, share_reached, sites_but, skipped_modules
from .surgery import check_prunable
from .trajectory import final_latents, prediction
from .trial import failing_sites


def learn(
    pipe,
    prompts: Sequence[str | Mapping],
    config: LearnConfig = LearnConfig(),  # noqa: B008 (frozen)
    *,
    resume_dir: str | Path | None = None,
    progress: bool = True,
    exclude: Collection[str] = (),
    check: bool = True,
) -> Gates:
    """Learn one λ a unit of the pipeline's denoiser (Alg. 1); ``pipe`` itself is not changed.

    Text encoders run once a prompt, the unmasked model once a sample. Everything random is a function of
    ``config.seed`` and the number of the update, so an interrupted run continues from ``resume_dir`` to the same λ,
    bit for bit.

    In a run of several processes (``accelerate launch``) each learns from its part of an update's samples, and all have
    the λ of one process, up to rounding. The first process alone reads and writes ``resume_dir``.

    Before that, one call of the denoiser shows of each kind of site whether its units can be removed
    (`ecodiff.method.trial`); sites that fail get no gates, and a warning names one. One sample and two steps show
    whether gradients through the loop are exact. Samples whose result depends on their place in a batch run one by one.

    Args:
        pipe: a diffusers pipeline; it runs on the device that accelerate chooses and moves back afterwards.
        prompts: prompts; or, for pipelines without a text encoder, mappings with the call's arguments for one sample
            (tensors with a leading dimension of 1, ``{"prompt_embeds": ...}``), or the number of samples where the call
            takes no prompt.
        config: see ``LearnConfig``.
        resume_dir: folder for teacher latents, λ, optimiser and history; a run already there is continued.
            ``save_every``, ``checkpoint`` and ``keep_last`` may change in between, and ``updates`` where
            ``target_open`` is None (else the line to it would be another).
        progress: show the expected cost, then a bar with loss, expected share of open gates and time left.
        exclude: names of sites that get no gates, such as those that this pipeline's call never reaches.
        check: False leaves out the trial of the gradient (that of `ecodiff.check`), which costs about as much as three
            samples of an update and needs the memory of all calls of two steps.

    Returns:
        Gates with λ (fp32, on the CPU), one ``history`` row an update (update, loss, reconstruction, regulariser,
        gradient_norm, seconds, open_<kind>) and ``snapshots`` {update: λ}.

    Raises:
        EcoDiffError: no prompts, no sites, a denoiser that `prune` would refuse (adapters, other layers than its class
            makes), one in float16, a site that the pipeline's call never reaches (see ``exclude``), a sampling loop
            that is not differentiable or whose gradient is not exact, a pipeline's call that fails, another run in
            ``resume_dir``, or a loss, gradient or λ that is not finite; the error's ``gates`` then holds the last λ
            that was good.
    """
    prompts = checked_prompts(prompts, "learn")
    network = find_denoiser(pipe)
    refuse_unfit(network, "learn")
    sites = sites_but(network, config.kinds, exclude)
    skipped = skipped_modules(network) if progress else {}
    if skipped:
        name, why = next(iter(skipped.items()))
        say(f"learn: no units in {len(skipped)} modules, such as {name} ({why})")
    if not sites:
        raise EcoDiffError(f"{type(pipe).__name__}: its denoiser has no sites of the kinds {', '.join(config.kinds)}.")
    for sentence in config.zero_at_start():
        warnings.warn(sentence, stacklevel=2)

    with ExitStack() as stack:
        device = stack.enter_context(on_device(pipe, "learn", many=True))
        stack.enter_context(undisturbed(device))
        task = Task(encoding_once(pipe), prompts, config, device)
        folder, learned = None, None
        if resume_dir is not None:
            run = describe_run(Identity.of(pipe, vae=False), prompts, config)
            if exclude:  # absent where nothing is excluded: the folders of runs older than this argument stay valid
                run = run | {"exclude": sorted(exclude)}
            folder = stack.enter_context(resume.Folder(resume_dir, run))
            learned = folder.site_names()
        if learned is None:
            sites = _removable(network, sites, partial(task.latents, [0], gradients=False))
        else:  # what was tried as the run began
            sites = {name: site for name, site in sites.items() if name in learned}
        if progress:
            share = share_reached(network, sites)
            say(f"learn: gates on units with {share:.0%} of the denoiser's parameters")
        gates = Gates.start(sites, config.log_alpha_start, config.distribution, device)
        optimizer = _optimizer(gates, config)
        done = 0
        if folder is not None:
            done = folder.load_state(gates, optimizer)
            if done > config.updates:
                raise EcoDiffError(
                    f"resume_dir {folder.path} holds {done} updates: ask for at least as many, or start anew."
                )
        if done < config.updates:
            task.compute_teacher(folder, progress, sites)
            if check and done == 0 and config.objective == "final":
                _refuse_inexact(task, sites)
            if progress:
                say(task.cost(config.updates - done))
            _descend(task, gates, optimizer, done, folder, progress)
        return _finished(gates)


def refuse_unfit(network: nn.Module, caller: str) -> None:
    """Raise EcoDiffError for a denoiser that cannot be learned on or pruned, whatever the mask."""
    refuse_elsewhere(network, caller)
    refuse_streamed(network, caller)
    check_prunable(network, caller)
    not_half(network, caller)


def _removable(network: nn.Module, sites: Mapping[str, Site], run: Callable) -> dict[str, Site]:
    """The sites without those of which a trial shows that their units cannot be removed; a warning names one of them.

    Raises EcoDiffError where none is left.
    """
    failing = processes.of_first(partial(failing_sites, network, sites, run))
    left = {name: site for name, site in sites.items() if name not in failing}
    if failing:
        name, why = next(iter(failing.items()))
        said = f"{len(failing)} of {len(sites)} sites cannot be pruned and get no gates, such as {name!r}: {why}."
        if not left:
            raise EcoDiffError(f"learn: {said}")
        warnings.warn(f"learn: {said}", stacklevel=3)
    return left


def _refuse_inexact(task: Task, sites: Mapping[str, Site]) -> None:
    """Raise EcoDiffError where the gradient through the loop is not that of the loss (`ecodiff.method.exact`)."""
    name, config = type(task.pipe).__name__, task.config
    try:
        found = processes.of_first(partial(measure, task, sites))
    except torch.OutOfMemoryError:
        warnings.warn("learn: no memory is left to try whether the gradient is exact; learning goes on.", stacklevel=3)
        return
    limit = limits(task)
    without = "Pass check=False to learn all the same."
    if config.checkpoint and config.recompute == "restore" and found["gradient"] > limit["gradient"]:
        raise EcoDiffError(
            f"learn: the gradient of {name} with time-step checkpointing is off by {found['gradient']:.0%}, since the "
            f"loop changes something that is not there again in backward: take checkpoint=False. {without}"
        )
    if found["open_loss"] > limit["open_loss"]:
        raise EcoDiffError(
            f"learn: with every gate open {name} makes other latents than without gates (loss "
            f"{found['open_loss']:.2g} in the place of 0), so the loss says nothing about its units. {without}"
        )
    if found["slope"] > limit["slope"]:
        raise EcoDiffError(
            f"learn: the gradient through the loop of {name} is off by {found['slope']:.0%} against a finite "
            'difference, since the loop cuts a part of it off: take objective="step", or a score that needs no '
            f"gradient (wanda, obs, occlusion). {without}"
        )


def _descend(task: Task, gates: Gates, optimizer, done: int, folder: resume.Folder | None, progress: bool) -> None:
    """Take the updates that follow the first ``done`` (the loop of Alg. 1); λ, history and snapshots go to ``gates``.

    Raises EcoDiffError for a loss, gradient or λ that is not finite.
    """
    config = task.config
    if done == 0:
        gates.snapshots[0] = _copy(gates)
    last_good = None
    bar = progress_bar(range(done, config.updates), initial=done, total=config.updates, desc="mask", progress=progress)
    with bar:
        for update in bar:
            row = task.update(gates, optimizer, update)
            if not (math.isfinite(row["loss"]) and math.isfinite(row["gradient_norm"])):
                raise _diverged(gates, last_good, update, row, folder)
            # A gradient that is finite can still overflow in the step, so λ is copied before and checked after it.
            last_good = {name: value.detach().clone() for name, value in gates.log_alpha.items()}
            optimizer.step()
            if not all(value.isfinite().all() for value in gates.log_alpha.values()):
                raise _diverged(gates, last_good, update, row, folder)

            shares = _open_share(gates)
            gates.history.append(row | shares)
            bar.set_postfix(loss=f"{row['loss']:.4g}", open=" ".join(f"{share:.0%}" for share in shares.values()))
            updates = update + 1
            is_last = updates == config.updates
            if is_last or updates % config.snapshot_every == 0:
                gates.snapshots[updates] = _copy(gates)
            if folder is not None and (is_last or updates % config.save_every == 0):
                folder.save_state(gates, optimizer)


@dataclass
class Seen:
    """How many samples of an update have been dealt out, and in how many parts."""

    samples: int = 0
    parts: int = 0


class Task:
    """The samples, their teacher latents, and the gradient of one update."""

    def __init__(self, pipe, prompts, config: LearnConfig, device: torch.device):
        self.pipe, self.config, self.device = pipe, config, device
        self.denoiser = find_denoiser(pipe)
        # A sample is a prompt with the seed of its noise; each prompt returns once for each of its noises.
        self.samples: list[tuple] = []
        for _ in range(config.noises_per_prompt):
            for prompt in prompts:
                number = 0 if config.fixed_noise else len(self.samples)
                self.samples.append((prompt, mix(config.seed, number)))
        self.prompts = prompts
        self.teacher: Tensor | None = None
        self.seconds_a_sample = 0.0
        self.drawn = 0
        """Random numbers drawn for gates so far, with gate_draw="call"."""
        self.drawn_a_sample: int | None = None
        """How many of them one sample takes in one update."""

    @cached_property
    def form(self) -> Form:
        """How samples are given to the pipeline: one by one where it treats a batch otherwise than single samples."""
        wanted = self.config.micro_batch_size or self.config.batch_size
        return form_of_samples(wanted, self.pipe, self.prompts, **self.call)

    @property
    def size_here(self) -> int:
        """How many samples run together in this process, at most: its part of those that run together in all."""
        return math.ceil(self.form.size / processes.count())

    @property
    def call(self) -> dict:
        """The arguments of the pipeline's call that all samples share."""
        config = self.config
        arguments: dict = {"num_inference_steps": config.num_inference_steps}
        if config.guidance_scale is not None:
            arguments["guidance_scale"] = config.guidance_scale
        return {**arguments, **config.call}

    def latents(self, indices: Sequence[int], gradients: bool) -> Tensor:
        """Final latents of these samples. Each has a noise generator of its own, so batching changes nothing."""
        config = self.config
        precision: AbstractContextManager = nullcontext()
        if config.mixed_precision == "bf16":
            precision = torch.autocast(self.device.type, torch.bfloat16)
        seeds = [self.samples[i][1] for i in indices]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        with precision:
            latents = final_latents(
                self.pipe,
                checkpoint=config.checkpoint,
                keep_last=config.keep_last,
                gradients=gradients,
                preserve_rng_state=config.recompute == "restore",
                noise_seed=seeds[0],
                **self.form.arguments([self.samples[i][0] for i in indices], generators),
                **self.call,
            ).float()
        if len(latents) == len(indices):
            return latents
        if len(indices) > 1:
            self.form = Form(1, self.form.bare)
            raise NotJoined("the loop's latents have other rows than samples")
        return latents.unsqueeze(0)  # frames, both halves of guidance, or several images of one sample

    def compute_teacher(self, folder, progress: bool, sites: Mapping[str, Site]) -> None:
        """Compute z_0 of the unmasked model for all samples (Alg. 1, line 3), or read it from the folder.

        Raises EcoDiffError where the first samples do not reach a site, whose λ could then not be learned.
        """
        stored = folder.load_teacher() if folder is not None else None
        fresh = stored is None
        if stored is None:
            stored = self._timed_teacher(progress, sites)
        self._check_finite(stored[0])
        again = processes.of_first(partial(self._comes_out_again, stored[0]))
        if not again and self.form.size > 1:
            warnings.warn(
                f"learn: what {type(self.pipe).__name__} makes of a sample depends on its place in the batch, so "
                "samples run one by one.",
                stacklevel=3,
            )
            self.form = Form(1, self.form.bare)
            if fresh:
                stored = self._timed_teacher(progress, sites)
            again = processes.of_first(partial(self._comes_out_again, stored[0]))
        if not again:
            raise EcoDiffError(
                f"learn: {type(self.pipe).__name__} makes something else of the same sample each time: pass what it "
                "draws by itself in `call`."
            )
        if folder is not None and fresh:
            folder.save_teacher(*stored)
        self.teacher, self.seconds_a_sample = stored[0].to(self.device), stored[1]
        self.scale = self.teacher.var().item() if self.config.normalize else 1.0

    def _timed_teacher(self, progress: bool, sites: Mapping[str, Site]) -> tuple[Tensor, float]:
        """z_0 of the unmasked model for all samples, and the seconds that one took."""
        started = time.perf_counter()
        latents = self._teacher_latents(progress, sites)
        return latents, (time.perf_counter() - started) / len(self.samples)

    def _check_finite(self, teacher: Tensor) -> None:
        scale = teacher.var().item() if self.config.normalize else 1.0
        if not (math.isfinite(scale) and scale > 0 and teacher.isfinite().all()):
            raise EcoDiffError(
                "The teacher's latents are constant or not finite: check the pipeline's weights, dtype and guidance."
            )

    def _comes_out_again(self, teacher: Tensor) -> bool:
        """Whether the first samples come out as before when they run together in another order.

        With every gate open the loss has to be zero. A loop that draws noise for a batch as a whole, or encodes an
        image for each generator, compares a student with the teacher of another noise. The difference is then of the
        size of the latents themselves, and rounding is far below a tenth of that.
        """
        size = min(self.form.size, max(2, self.size_here))
        numbers = list(range(len(self.samples)))[:size][::-1]
        parts: list[Tensor] = []
        in_batches(numbers, size, lambda part: parts.append(self.latents(part, gradients=False)))
        again = torch.cat(parts).to(teacher.device)
        difference = (again - teacher[numbers]).square().mean()
        return bool(difference <= 0.1 * teacher.var())

    def _teacher_latents(self, progress: bool, sites: Mapping[str, Site]) -> Tensor:
        """z_0 of the unmasked model, one row a sample."""
        parts: list[Tensor] = []

        def run(numbers: list[int]) -> None:
            with hooked(self.denoiser, "learn") as hooks:
                if not parts:  # all samples reach the same layers, so the first batch tells for all
                    _watch(hooks, sites)
                parts.append(self.latents(numbers, gradients=False))
            bar.update(len(numbers))

        numbers = processes.own(range(len(self.samples)))
        with progress_bar(total=len(numbers), desc="teacher", progress=progress) as bar:
            in_batches(numbers, self.size_here, run)
        if processes.count() == 1:
            return torch.cat(parts)
        # A process with few samples may not have seen that they run one by one.
        self.form = min(processes.gathered([self.form]), key=attrgetter("size"))
        rows = [row.cpu().clone() for part in parts for row in part]
        return torch.stack(processes.gathered(rows))

    def cost(self, updates: int) -> str:
        """One line that says how long so many updates will take, judging by the time that the teacher took."""
        config = self.config
        # In units of one forward pass: forward, backward (about as long with frozen weights), and recomputation.
        passes = 2.0
        if config.checkpoint:
            passes += 1 - min(config.keep_last / config.num_inference_steps, 1)
        seconds = self.seconds_a_sample * min(config.batch_size, len(self.samples)) * updates * passes
        work = f"{updates} updates of {config.batch_size} samples, {config.num_inference_steps} steps each"
        return f"{work}, on {self.device}: about {in_words(seconds)}"

    def update(self, gates: Gates, optimizer, update: int) -> dict:
        """Leave the gradient of update number ``update`` in λ and return its history row."""
        config, started = self.config, time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        batch = epoch_batch(len(self.samples), config.batch_size, config.seed, update)
        generator = torch.Generator().manual_seed(mix(config.seed, update))
        reconstruction, seen = 0.0, Seen()

        def add(part: list[int]) -> None:
            nonlocal reconstruction
            rows = self._rows_here(len(part), seen)
            if 1 < len(part) != len(rows) and not joins(self.pipe, self.form, self._prompts_of(part), self.call):
                self.gate_values(gates, generator, len(part), [])  # drawn as the process draws that has them all
                raise NotJoined("samples that do not run together do so in no process")
            if rows:
                reconstruction += self.gradient_of(part, rows, gates, generator, len(batch))
            else:
                self._pass_over(part, gates, generator)
            seen.samples += len(part)
            seen.parts += 1

        # Gates drawn inside the denoiser use torch's own random state, which checkpointing can restore.
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(mix(config.seed, update))
            in_batches(batch, self.form.size, add)

        if processes.count() > 1:
            _sum_gradients(gates)
            reconstruction = sum(processes.gathered([reconstruction]))

        # Eq. 2: the loss is the reconstruction plus β times the regulariser. Gradients of both add up in λ.
        prices = prices_of_open_gates(gates, config.regulariser)
        weights = self.weights(gates, update)
        if prices:
            sum(weights[kind] * price for kind, price in prices.items()).backward()
        regulariser = {kind: price.item() for kind, price in prices.items()}
        # Without a limit nothing is clipped; the norm is for the history.
        norm = torch.nn.utils.clip_grad_norm_(gates.log_alpha.values(), config.clip_grad_norm or math.inf)
        return {
            "update": update + 1,
            "loss": reconstruction + sum(weights[kind] * value for kind, value in regulariser.items()),
            "reconstruction": reconstruction,
            "regulariser": sum(regulariser.values()),
            "gradient_norm": norm.item(),
            "seconds": time.perf_counter() - started,
        }

    def gradient_of(
        self, part: list[int], rows: list[int], gates: Gates, generator: torch.Generator, samples: int
    ) -> float:
        """Add to λ the gradient of some samples that run together; returns their part of the update's loss.

        ``rows``: which of ``part`` run in this process, all where it is the only one; ``samples``: of the whole update.
        """
        here = [part[row] for row in rows]
        share = len(here) / samples
        before = self.drawn
        values = self.gate_values(gates, generator, len(part), rows)
        if self.config.objective == "step":
            loss = self.stepwise(here, values, gates, share)
            drawn = self.drawn - before
        else:
            # Backward runs checkpointed calls again, so it belongs inside, where the gates are still applied.
            with apply_gates(self.denoiser, values, gates.sites, gates.log_alpha.values()):
                student = self.latents(here, gradients=True)
                drawn = self.drawn - before
                assert self.teacher is not None
                total = self.reconstruction(student, self.teacher[here]) * len(here) / samples
                total.backward()
            loss = total.item()
            if self.config.recompute == "redraw":  # else what backward drew is not gone from the random state
                drawn = self.drawn - before
        a_sample = drawn // len(part)
        if processes.count() > 1 and self.drawn_a_sample not in (None, a_sample):
            raise EcoDiffError(
                f"learn: {type(self.pipe).__name__} calls its denoiser more often for some samples than for others, so "
                'gates cannot be dealt out to processes: take gate_draw="sample", or one process.'
            )
        self.drawn_a_sample = a_sample
        return loss

    def gate_values(
        self, gates: Gates, generator: torch.Generator | None, samples: int, rows: list[int]
    ) -> Mapping[str, Tensor] | Callable[[str], Tensor]:
        """The gates of samples that run together, as `apply_gates` takes them, in the form that ``gate_draw`` says.

        Gates are drawn for all ``samples``, and those of ``rows`` are returned.
        """
        if self.config.gate_draw == "call":  # as published: anew at each call of the denoiser
            draw = fresh_gates(gates, samples, None if len(rows) == samples else rows)

            def counted(name: str) -> Tensor:
                self.drawn += samples * gates.sites[name].units
                return draw(name)

            return counted
        if self.config.gate_draw == "trajectory":  # one draw for all samples and steps
            return gates.sample(generator)
        values = gates.sample(generator, samples)
        if len(rows) == samples:
            return values
        return {name: value[rows] for name, value in values.items()}

    def _rows_here(self, samples: int, seen: Seen) -> list[int]:
        """Which of so many samples that run together run in this process."""
        everywhere = list(range(samples))
        if self.config.objective == "step":  # its loss is relative to the variance of all that run together
            return everywhere if seen.parts % processes.count() == processes.rank() else []
        return [row for row in everywhere if (seen.samples + row) % processes.count() == processes.rank()]

    def _prompts_of(self, part: list[int]) -> list:
        return [self.samples[number][0] for number in part]

    def _pass_over(self, part: list[int], gates: Gates, generator: torch.Generator) -> None:
        """Leave the random numbers as they are after samples that run in other processes."""
        if self.config.gate_draw != "call":
            self.gate_values(gates, generator, len(part), [])
            return
        if self.drawn_a_sample is None:  # known once a sample has run, so one runs whose gradient goes nowhere
            copies = {name: value.detach().clone().requires_grad_() for name, value in gates.log_alpha.items()}
            with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
                self.gradient_of(part[:1], [0], Gates(gates.sites, copies, gates.distribution), generator, 1)
        assert self.drawn_a_sample is not None
        for _ in part:
            torch.rand(self.drawn_a_sample)

    def weights(self, gates: Gates, update: int) -> dict[str, float]:
        """β of each kind in update number ``update``.

        Without ``target_open`` it is the config's. With it, a straight line leads from the share of open gates at the
        start to the target: β is 0 up to the line, and grows to the config's at ``RAMP`` above it.
        """
        config = self.config
        if config.target_open is None:
            return {site.kind: config.weight for site in gates.sites.values()}
        start = gates.distribution.prob_open(torch.tensor(config.log_alpha_start)).item()
        line = start + (config.target_open - start) * (update + 1) / config.updates
        weights = {}
        for key, share in _open_share(gates).items():
            above = min(max((share - line) / RAMP, 0.0), 1.0)
            weights[key.removeprefix("open_")] = config.weight * above
        return weights

    def stepwise(self, part: Sequence[int], values, gates: Gates, share: float) -> float:
        """Leave the gradient of ``objective="step"`` in λ and return the loss.

        Each call of the denoiser is made twice, gated and not; its gradient is taken at once, so memory is that of one
        call. ``values``: as for ``apply_gates``; ``share``: of the update's samples that run here.
        """
        # Every call has a backward of its own, which would free the graph between λ and gates. So gradients are
        # gathered in copies, of λ for gates that are drawn in each call, else of the gates, and passed on at the end.
        sources = gates.log_alpha if callable(values) else values
        leaves = {name: value.detach().requires_grad_() for name, value in sources.items()}
        gated: Mapping[str, Tensor] | Callable[[str], Tensor] = leaves
        if callable(values):
            copies = Gates(gates.sites, leaves, gates.distribution)
            gated = self.gate_values(copies, None, len(part), list(range(len(part))))
        losses = []

        def wrap(forward):
            @wraps(forward)
            def both(*args, **kwargs):
                result = forward(*args, **kwargs)
                target = prediction(result).detach().float()
                scale = target.var() if self.config.normalize else 1.0
                # One call need not reach every site (some guidance skips layers); all calls together must, see below.
                with torch.enable_grad(), apply_gates(self.denoiser, gated, gates.sites, must_run=False):
                    loss = (prediction(forward(*args, **kwargs)).float() - target).square().mean() / scale
                    loss.backward()
                losses.append(loss.item())
                return result  # the unmasked model's, so that the loop goes on through its states

            return both

        with replaced_forward(self.denoiser, wrap):
            self.latents(part, gradients=False)
        idle = [name for name, leaf in leaves.items() if leaf.grad is None]
        if idle:
            raise never_ran("learn", idle, len(leaves), idle[0])
        factor = share / len(losses)
        torch.autograd.backward(list(sources.values()), [factor * leaves[name].grad for name in sources])
        return factor * sum(losses)

    def reconstruction(self, student: Tensor, teacher: Tensor) -> Tensor:
        """L_E of Eq. 3, in the configuration's form and scale."""
        if self.config.reconstruction == "mse":
            return (student - teacher).square().mean() / self.scale
        size = teacher[0].numel() if self.config.normalize else 1
        return torch.linalg.vector_norm((student - teacher).flatten(1), dim=1).mean() / math.sqrt(size * self.scale)


def _watch(hooks: Hooks, sites: Mapping[str, Site]) -> None:
    """Hooks that do nothing on all layers that will be gated, so that those that never run are named at once."""

    def seen(*what) -> None:
        pass

    for name, site in sites.items():
        for span in site.gated:
            hooks.before(span.layer, seen, site=name)


def _sum_gradients(gates: Gates) -> None:
    """Add up what the samples of each process left in λ; a process that had none left nothing."""
    tensors = list(gates.log_alpha.values())
    gradients = [torch.zeros_like(value) if value.grad is None else value.grad for value in tensors]
    total = processes.summed(torch.cat(gradients))
    for value, gradient in zip(tensors, total.split([len(value) for value in tensors]), strict=True):
        value.grad = gradient.clone()


def _by_kind(gates: Gates) -> dict[str, list[Tensor]]:
    """{kind: λ of its sites}."""
    tensors: dict[str, list[Tensor]] = {}
    for name, site in gates.sites.items():
        tensors.setdefault(site.kind, []).append(gates.log_alpha[name])
    return tensors


def prices_of_open_gates(gates: Gates, form: str) -> dict[str, Tensor]:
    """The price of open gates of each kind, scalars: Eq. 4 in closed form ("l0"), or the published stand-in ("l1")."""
    prices = {}
    for kind, tensors in _by_kind(gates).items():
        if form == "l0":
            prices[kind] = gates.distribution.prob_open(torch.cat(tensors)).mean()
        elif kind != "modulation":
            prices[kind] = torch.stack([value.abs().mean() for value in tensors]).mean()
    return prices


def _optimizer(gates: Gates, config: LearnConfig) -> torch.optim.Optimizer:
    """The config's optimiser, with the learning rate of its kind for each λ."""
    groups = [{"params": tensors, "lr": config.learning_rate(kind)} for kind, tensors in _by_kind(gates).items()]
    optimizers = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    return optimizers[config.optimizer](groups, weight_decay=config.weight_decay)


def _open_share(gates: Gates) -> dict[str, float]:
    """{"open_<kind>": expected share of open gates}."""
    shares = {}
    for kind, tensors in _by_kind(gates).items():
        parts = [gates.distribution.prob_open(value.detach()) for value in tensors]
        shares[f"open_{kind}"] = torch.cat(parts).mean().item()
    return shares


def _diverged(gates: Gates, last_good, update: int, row: dict, folder) -> EcoDiffError:
    """The error for a loss, gradient or λ that is not finite; it carries the last λ that was good."""
    if last_good is not None:
        gates.log_alpha = last_good
    gates = _finished(gates)
    what = f"loss {row['loss']:.4g}, gradient norm {row['gradient_norm']:.4g}"
    if math.isfinite(row["loss"]) and math.isfinite(row["gradient_norm"]):
        what = "λ after the optimiser's step"
    message = (
        f"Update {update + 1}: {what}: not finite, so learning stopped. Lower lr, clip gradients, or use fp32. "
        "The last good λ is in this error's .gates"
    )
    if folder is not None:
        if processes.is_first():
            gates.save(folder.path / "last_good.safetensors")
        message += f" and in {folder.path / 'last_good.safetensors'}"
    error = EcoDiffError(message + ".")
    vars(error)["gates"] = gates
    return error


def _copy(gates: Gates) -> dict[str, Tensor]:
    """λ as it is now, on the CPU."""
    return {name: value.detach().cpu().clone() for name, value in gates.log_alpha.items()}


def _finished(gates: Gates) -> Gates:
    """The gates with λ on the CPU, which no optimiser changes any more."""
    gates.log_alpha = {name: value.detach().cpu() for name, value in gates.log_alpha.items()}
    return gates
