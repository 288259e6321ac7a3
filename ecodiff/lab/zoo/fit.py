"""The training loop that every stage of every recipe runs.

All randomness of a step comes from a generator seeded by (recipe seed, stage, step), and step ``s`` reads the scenes
``s * batch … (s + 1) * batch - 1``, counted from the stage's ``first_scene``. So a run that was killed goes on from its
last checkpoint to the same weights as one that was not, and no random state needs saving.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from ecodiff.errors import EcoDiffError
from ecodiff.lab import openmoji

SAVE_EVERY = 250  # steps between checkpoints, where a stage's options do not say ``save_every``
MEASURED = 5  # first steps whose time tells what the rest will cost


@cache
def fast_precision() -> str:
    """ "bf16" on a GPU, and on a CPU whose bf16 matrix product is at least 1.5 times as fast as fp32; else "no"."""
    if torch.cuda.is_available():
        return "bf16"
    if _seconds_a_product(torch.bfloat16) * 1.5 < _seconds_a_product(torch.float32):
        return "bf16"
    return "no"


def _seconds_a_product(dtype: torch.dtype) -> float:
    a = torch.ones(256, 256, dtype=dtype)
    a @ a  # warm-up
    turns = []
    for _ in range(20):
        start = time.perf_counter()
        a @ a
        turns.append(time.perf_counter() - start)
    return min(turns)  # the least disturbed one


def generator(*seed: int) -> torch.Generator:
    """The generator of one step: the same for the same numbers."""
    value = 0
    for part in seed:  # a fixed mixing of the parts into 63 bits
        value = (value * 6364136223846793005 + part + 1442695040888963407) % (1 << 63)
    return torch.Generator().manual_seed(value)


def estimate(name: str, left: int, took: list[float]) -> str:
    """What ``left`` more steps cost, in words, from the seconds of the first ones; the very first may have compiled."""
    seconds = statistics.median(took[1:])
    minutes = left * seconds / 60
    return f"{name}: {left} steps to go, about {minutes:.0f} minutes at the {seconds:.2f} s a step measured here."


def optimizers_of(
    modules: list[torch.nn.Module], options: dict, encoders: list[torch.nn.Module] = ()
) -> list[torch.optim.Optimizer]:
    """AdamW for all that learns; with ``optimizer: muon`` in the options linear layers' matrices have Muon instead.

    With ``encoder_lr`` the ``encoders`` among the modules have AdamW at that rate: T5's attention is not scaled, and
    at a denoiser's rate it soon looks at one token only and stops learning.

    Muon (Jordan et al. 2024) makes the momentum of a matrix orthogonal before it steps along it; its step has the
    root mean square of AdamW's (Liu et al. 2025), so that one learning rate serves both. Raises EcoDiffError for
    another name.
    """
    name = options.get("optimizer", "adamw")
    if name not in ("adamw", "muon"):
        raise EcoDiffError(f"There is no optimizer {name!r} in training: take adamw or muon.")
    slow = [module for module in modules if "encoder_lr" in options and module in encoders]
    rest = [module for module in modules if module not in slow]
    parameters, matrices = _learning(rest), []
    if name == "muon":
        layers = torch.nn.ModuleList(rest).modules()
        linear = {layer.weight for layer in layers if isinstance(layer, torch.nn.Linear)}
        matrices = [parameter for parameter in parameters if parameter in linear]
        parameters = [parameter for parameter in parameters if parameter not in linear]
    groups = [{"params": parameters}]
    if slow:
        groups.append({"params": _learning(slow), "lr": options["encoder_lr"]})
    optimizers = [torch.optim.AdamW(groups, lr=options["lr"], betas=(0.9, 0.99), weight_decay=0.01)]
    if name == "muon":
        optimizers.append(torch.optim.Muon(matrices, options["lr"], weight_decay=0.01, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def _attention(device: torch.device) -> contextlib.AbstractContextManager:
    """On a CPU, plain attention: there the fused one's backward in bf16 is several times slower (torch 2.13)."""
    if device.type == "cpu":
        return sdpa_kernel(SDPBackend.MATH)
    return contextlib.nullcontext()


def _learning(modules: Iterable[torch.nn.Module]) -> list[torch.nn.Parameter]:
    learning: list[torch.nn.Parameter] = []
    for module in modules:
        learning += [parameter for parameter in module.parameters() if parameter.requires_grad]
    return learning


def drawn_scenes(start: int, n: int) -> list[openmoji.Scene]:
    """``n`` training scenes from ``start`` on, with their images, which the scenes keep."""
    return _with(openmoji.images, undrawn_scenes(start, n))


def undrawn_scenes(start: int, n: int) -> list[openmoji.Scene]:
    """``n`` training scenes from ``start`` on, for a loss that reads captions alone."""
    return list(openmoji.scenes("train", n, start=start))


def drawn_clips(start: int, n: int) -> list[openmoji.Clip]:
    """``n`` training clips from ``start`` on, with their frames, which the clips keep."""
    return _with(openmoji.videos, undrawn_clips(start, n))


def undrawn_clips(start: int, n: int) -> list[openmoji.Clip]:
    """``n`` training clips from ``start`` on, for a loss that reads captions alone."""
    return list(openmoji.clips("train", n, start=start))


def _with(pictures: Callable, batch: list) -> list:
    """The batch, whose scenes or clips keep what is drawn of them."""
    pictures(batch)
    return batch


def fit(
    name: str,
    modules: list[torch.nn.Module],
    loss_of: Callable[[list, torch.Generator], torch.Tensor],
    options: dict,
    folder: Path,
    seed: int,
    encoders: list[torch.nn.Module] = (),
    draw: Callable[[int, int], list] = drawn_scenes,
) -> dict:
    """Train ``modules`` on ``loss_of(scenes, generator)`` and leave their moving averages in them.

    ``encoders`` are the text encoders among them, which may have a learning rate of their own. ``draw(start, n)`` gives
    the ``n`` scenes from number ``start`` on that a step reads; it runs in another thread, a step ahead.

    Training has the optimizers of the options (``optimizers_of``), warm-up and cosine decay, gradients clipped to norm
    1, and an exponential moving average of the weights. A checkpoint ``folder/name.pt`` is written every ``save_every``
    steps of the options, else every ``SAVE_EVERY`` (to a temporary name, then renamed) and picked up again. After the
    first ``MEASURED`` steps a line says how long the rest takes on this machine. Returns the seconds spent, the mean
    loss of the last hundred steps, and the precision. Raises EcoDiffError for a checkpoint of other options.
    """
    from accelerate import Accelerator

    path = folder / f"{name}.pt"
    saved = torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None
    if saved and saved["options"] != options:
        raise EcoDiffError(
            f"{path} was written with other training options, or started from other weights: delete it, or restore "
            "the recipe."
        )
    precision = saved["precision"] if saved else fast_precision()  # timed, and may come out otherwise another time
    accelerator = Accelerator(mixed_precision=precision)
    parameters = _learning(modules)
    optimizers = optimizers_of(modules, options, encoders)
    # A recipe may stop before its cosine has come down: the moving average makes up for much of the rest.
    length = options.get("schedule_steps", options["steps"])
    timing = {"num_warmup_steps": options["warmup"], "num_training_steps": length}
    schedules = [get_scheduler("cosine", optimizer, **timing) for optimizer in optimizers]
    ema = EMAModel(parameters, decay=options["ema"], use_ema_warmup=True, inv_gamma=1.0, power=3 / 4, foreach=True)
    for module in modules:
        module.to(accelerator.device).train()
    state = {"step": 0, "seconds": 0.0, "losses": []}
    if saved:
        with torch.no_grad():
            for parameter, value in zip(parameters, saved["parameters"], strict=True):
                parameter.copy_(value)
        for part, value in zip([*optimizers, *schedules], saved["optimizers"] + saved["schedules"], strict=True):
            part.load_state_dict(value)
        ema.load_state_dict(saved["ema"])
        state = saved["state"]
    ema.to(accelerator.device)

    def save() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        content = {
            "options": options,
            "precision": precision,
            "parameters": [p.detach() for p in parameters],
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "schedules": [schedule.state_dict() for schedule in schedules],
            "ema": ema.state_dict(),
            "state": state,
        }
        torch.save(content, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)

    def scenes_of(step: int) -> list:
        return draw(options.get("first_scene", 0) + step * options["batch_size"], options["batch_size"])

    bar = tqdm(total=options["steps"], initial=state["step"], desc=name, unit="step", mininterval=5)
    stage, took = sum(map(ord, name)), []  # a number for the stage, the same in every process: hash(name) is not
    # One thread draws the next batch while the model works on this one.
    with ThreadPoolExecutor(1) as pool:
        upcoming = pool.submit(scenes_of, state["step"])
        for step in range(state["step"], options["steps"]):
            start, batch = time.perf_counter(), upcoming.result()
            if step + 1 < options["steps"]:
                upcoming = pool.submit(scenes_of, step + 1)
            with accelerator.autocast(), _attention(accelerator.device):
                loss = loss_of(batch, generator(seed, stage, step))
            accelerator.backward(loss)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            for part in [*optimizers, *schedules]:
                part.step()
            for parameter in parameters:
                parameter.grad = None
            ema.step(parameters)
            state["losses"] = (state["losses"] + [loss.item()])[-100:]
            took.append(time.perf_counter() - start)
            state["seconds"] += took[-1]
            state["step"] = step + 1
            bar.update()
            bar.set_postfix(loss=f"{sum(state['losses']) / len(state['losses']):.4f}", refresh=False)
            if len(took) == MEASURED:
                bar.write(estimate(name, options["steps"] - step - 1, took))
            if (step + 1) % options.get("save_every", SAVE_EVERY) == 0 and step + 1 < options["steps"]:
                save()
    bar.close()
    save()
    ema.copy_to(parameters)
    for module in modules:
        module.eval()
    loss = sum(state["losses"]) / max(len(state["losses"]), 1)
    return {"seconds": round(state["seconds"], 1), "loss": loss, "precision": precision}
