"""Training of an embedded pipeline: the VAE, the denoiser together with its text encoders, the VAE's decoder again.

All randomness of a step comes from generators seeded by (recipe seed, stage, step), and step ``s`` reads the scenes
``s * batch … (s + 1) * batch - 1``. So a run that was killed goes on from its last checkpoint to the same weights as
one that was not, and no random state needs saving.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import diffusers
import torch
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from .. import data
from ..errors import EcoDiffError
from ..records import commit, machine


@cache
def fast_precision() -> str:
    """"bf16" on a GPU, and on a CPU whose bf16 matrix product is at least 1.5 times as fast as fp32; else "no"."""
    if torch.cuda.is_available():
        return "bf16"
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(256, 256, dtype=dtype)
        a @ a
        turns = []
        for _ in range(20):
            start = time.perf_counter()
            a @ a
            turns.append(time.perf_counter() - start)
        seconds[dtype] = min(turns)  # the least disturbed one
    return "bf16" if seconds[torch.bfloat16] * 1.5 < seconds[torch.float32] else "no"


def _generator(*seed: int) -> torch.Generator:
    value = 0
    for part in seed:  # a fixed mixing of the parts into 63 bits
        value = (value * 6364136223846793005 + part + 1442695040888963407) % (1 << 63)
    return torch.Generator().manual_seed(value)


def fit(
    name: str,
    modules: list[torch.nn.Module],
    loss_of: Callable[[int, list[data.Scene], torch.Generator], torch.Tensor],
    options: dict,
    folder: Path,
    seed: int,
    save_every: int = 250,
) -> dict:
    """Train ``modules`` on ``loss_of(step, scenes, generator)`` and leave their moving averages in them.

    AdamW, warm-up and cosine decay, gradient norm clipped to 1, exponential moving average of the weights. A checkpoint
    ``folder/name.pt`` is written every ``save_every`` steps (to a temporary name, then renamed) and picked up again.
    Returns the seconds spent and the mean loss of the last hundred steps.
    """
    from accelerate import Accelerator

    accelerator = Accelerator(mixed_precision=fast_precision())
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=options["lr"], betas=(0.9, 0.99), weight_decay=0.01)
    # A recipe may stop before its cosine has come down: the moving average makes up for much of the rest.
    length = options.get("schedule_steps", options["steps"])
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=options["warmup"], num_training_steps=length)
    ema = EMAModel(parameters, decay=options["ema"], use_ema_warmup=True, inv_gamma=1.0, power=3 / 4, foreach=True)
    for module in modules:
        module.to(accelerator.device).train()
    ema.to(accelerator.device)
    state = {"step": 0, "seconds": 0.0, "losses": []}
    path = folder / f"{name}.pt"
    if path.exists():
        saved = torch.load(path, map_location=accelerator.device, weights_only=True)
        if saved["options"] != options:
            raise EcoDiffError(f"{path} was written with other training options: delete it, or restore the recipe.")
        with torch.no_grad():
            for parameter, value in zip(parameters, saved["parameters"], strict=True):
                parameter.copy_(value)
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        ema.load_state_dict(saved["ema"])
        state = saved["state"]

    def save() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        content = {
            "options": options,
            "parameters": [p.detach() for p in parameters],
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
            "ema": ema.state_dict(),
            "state": state,
        }
        torch.save(content, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)

    def scenes_of(step: int) -> list[data.Scene]:
        return list(data.scenes("train", options["batch_size"], start=step * options["batch_size"]))

    # On a CPU the fused attention's backward in bf16 is several times slower than plain matrix products (torch 2.13).
    plain = accelerator.device.type == "cpu"
    bar = tqdm(total=options["steps"], initial=state["step"], desc=name, unit="step", mininterval=5)
    stage = sum(map(ord, name))
    # One thread draws the next batch while the model works on this one.
    with ThreadPoolExecutor(1) as pool:
        upcoming = pool.submit(scenes_of, state["step"])
        for step in range(state["step"], options["steps"]):
            start, batch = time.perf_counter(), upcoming.result()
            if step + 1 < options["steps"]:
                upcoming = pool.submit(scenes_of, step + 1)
            with accelerator.autocast(), sdpa_kernel(SDPBackend.MATH) if plain else contextlib.nullcontext():
                loss = loss_of(step, batch, _generator(seed, stage, step))
            accelerator.backward(loss)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            ema.step(parameters)
            state["losses"] = (state["losses"] + [loss.item()])[-100:]
            state["seconds"] += time.perf_counter() - start
            state["step"] = step + 1
            bar.update()
            bar.set_postfix(loss=f"{sum(state['losses']) / len(state['losses']):.4f}", refresh=False)
            if (step + 1) % save_every == 0 and step + 1 < options["steps"]:
                save()
    bar.close()
    save()
    ema.copy_to(parameters)
    for module in modules:
        module.eval()
    return {"seconds": round(state["seconds"], 1), "loss": sum(state["losses"]) / max(len(state["losses"]), 1)}


def _pixels(scenes: list[data.Scene], device) -> torch.Tensor:
    return data.images(scenes).to(device).float() / 127.5 - 1


def train_vae(pipe, recipe: dict, folder: Path) -> dict:
    """Stage 1: the VAE, by absolute plus squared error and a slight KL term; then sets its scaling factor to 1/std."""
    vae, options = pipe.vae.to(memory_format=torch.channels_last), recipe["vae"]["train"]

    def loss_of(step, scenes, generator):
        x = _pixels(scenes, vae.device)
        posterior = vae.encode(x).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(x.device)
        error = vae.decode(posterior.mean + posterior.std * noise).sample - x
        return error.abs().mean() + error.square().mean() + options["kl"] * posterior.kl().mean()

    result = fit("vae", [vae], loss_of, options, folder, recipe["seed"])
    with torch.no_grad():
        latents = vae.encode(_pixels(list(data.scenes("train", 256)), vae.device)).latent_dist.mean
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))
    return result


def train_denoiser(pipe, recipe: dict, folder: Path) -> dict:
    """Stage 2: denoiser and text encoders together, on the velocity loss (Salimans & Ho 2022) with dropped captions.

    The pipeline's own ``encode_prompt`` makes the conditioning, so that training and sampling cannot differ.
    """
    options, vae, unet = recipe["denoiser"]["train"], pipe.vae, pipe.unet
    noising = diffusers.DDPMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    vae.requires_grad_(False).eval()
    pipe.to(vae.device)
    unet.to(memory_format=torch.channels_last)  # convolutions are about a tenth faster so
    forward = torch.compile(unet) if options.get("compile") else unet

    def loss_of(step, scenes, generator):
        n = len(scenes)
        with torch.no_grad():
            latents = vae.encode(_pixels(scenes, vae.device)).latent_dist.mean * vae.config.scaling_factor
        embeds, _, pooled, _ = pipe.encode_prompt([s.caption for s in scenes], do_classifier_free_guidance=False)
        keep = (torch.rand(n, generator=generator) >= options["drop_condition"]).float().to(latents.device)
        embeds, pooled = embeds * keep[:, None, None], pooled * keep[:, None]
        noise = torch.randn(latents.shape, generator=generator).to(latents.device)
        t = torch.randint(noising.config.num_train_timesteps, (n,), generator=generator).to(latents.device)
        time_ids = torch.tensor([[data.SIZE, data.SIZE, 0, 0, data.SIZE, data.SIZE]], device=latents.device).float()
        predicted = forward(
            noising.add_noise(latents, noise, t),
            t,
            encoder_hidden_states=embeds,
            added_cond_kwargs={"text_embeds": pooled, "time_ids": time_ids.repeat(n, 1)},
        ).sample
        return torch.nn.functional.mse_loss(predicted.float(), noising.get_velocity(latents, noise, t))

    encoders = [pipe.text_encoder, pipe.text_encoder_2]
    return fit("denoiser", [unet, *encoders], loss_of, options, folder, recipe["seed"])


def train_decoder(pipe, recipe: dict, folder: Path) -> dict:
    """Stage 3: the VAE's decoder goes on by squared error alone, its encoder fixed, so that no latent changes.

    (As the published ``sd-vae-ft-mse`` went on from Stable Diffusion's VAE.)
    """
    vae = pipe.vae

    def loss_of(step, scenes, generator):
        x = _pixels(scenes, vae.device)
        with torch.no_grad():
            latents = vae.encode(x).latent_dist.mean
        return torch.nn.functional.mse_loss(vae.decode(latents).sample, x)

    parts = [vae.post_quant_conv, vae.decoder]
    for part in parts:
        part.requires_grad_(True)
    return fit("decoder", parts, loss_of, recipe["decoder"]["train"], folder, recipe["seed"])


def train(recipe: dict, folder: Path):
    """Run the stages of a recipe, with checkpoints in ``folder``; returns the trained pipeline and a log."""
    from .build import build_pipeline

    pipe = build_pipeline(recipe)
    stages = {"vae": train_vae, "denoiser": train_denoiser, "decoder": train_decoder}
    log = {name: stage(pipe, recipe, folder) for name, stage in stages.items()}
    pipe.to("cpu")
    return pipe, {**log, "machine": machine(), "commit": commit()}
