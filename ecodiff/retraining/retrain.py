"""Light retraining of a pruned pipeline on images that the original one generated (App. J, Table 8, Fig. 11).

The denoiser learns its own training objective (`losses`) on a hundred images of the original model, either through
low-rank adapters (LoRA, Hu et al. 2021) beside the layers of its attentions and feed-forwards, or in all its weights;
or in all its weights while half of them are zero (SparseDM, `two_four`). Adapters are merged at the end, so that the
result is again an ordinary, equally small pipeline::

    pictures = ecodiff.generate(pipe, prompts, seeds=range(len(prompts)))
    better = ecodiff.retrain(ecodiff.prune(pipe, mask), pictures, prompts)

What the denoiser is told beside the noisy latents (text embeddings, sizes, ids, guidance) is what the pipeline's own
call passes to it, so no pipeline needs code of its own here.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext

import torch
from diffusers.utils import recurse_remove_peft_layers
from torch import Tensor, nn

from ecodiff.errors import EcoDiffError
from ecodiff.method.carried import refuse_elsewhere
from ecodiff.method.checkpointing import undisturbed
from ecodiff.method.emptied import is_emptied
from ecodiff.method.layers import is_depthwise
from ecodiff.method.sites import find_sites
from ecodiff.pipelines.batches import in_batches
from ecodiff.pipelines.conditioning import conditioning, encode, join, otherwise_trained, reads_as_said, rule_of_joining
from ecodiff.pipelines.endings import FAULTS
from ecodiff.pipelines.parts import one_denoiser, with_denoiser
from ecodiff.pipelines.prompts import checked_prompts, epoch_batch, mix
from ecodiff.pipelines.running import frozen, in_words, on_device, without_adapters
from ecodiff.progress import progress_bar, say

from . import two_four
from .config import RetrainConfig
from .losses import training_loss


def retrain(
    pipe,
    pictures: Tensor,
    captions: Sequence[str | Mapping],
    config: RetrainConfig = RetrainConfig(),  # noqa: B008 (frozen)
    *,
    history: list[dict] | None = None,
    progress: bool = True,
):
    """A pipeline like ``pipe`` whose denoiser was trained on these images (Table 8); ``pipe`` is not changed.

    All random draws are a function of ``config.seed`` and the number of the step. Nothing is kept on disk: a run that
    is interrupted starts anew. Training uses a copy of the denoiser in fp32 beside the pipeline itself.

    Args:
        pipe: a diffusers pipeline of images or clips, pruned or not; it runs on the device that accelerate chooses and
            moves back afterwards. Its scheduler says what the denoiser predicts: noise, velocity, latents, or a flow.
        pictures: images, uint8 [N, 3, height, width], or clips, uint8 [N, frames, 3, height, width], as ``generate``
            makes them with the original pipeline. N is 100 in the paper.
        captions: N captions, one an image (or N mappings with the call's arguments, see ``learn``).
        config: see ``RetrainConfig``.
        history: a list that gets one row a step: step, loss, gradient_norm (before clipping), seconds.
        progress: show the expected cost, then a bar with the loss and the time left.

    Returns:
        A pipeline of the same class, saved with the same shapes and dtypes. Only its denoiser is new; text encoders,
        VAE and scheduler are those of ``pipe``.

    Raises:
        EcoDiffError: pictures and captions that do not fit each other or the pipeline, a scheduler whose objective is
            not known, an offloaded pipeline or one with adapters, no layer for adapters, peft not installed, or a loss
            that is not finite.
    """
    captions = checked_prompts(captions, "retrain")
    _check_pictures(pictures, captions)
    original = one_denoiser(pipe, "retrain")
    _check_denoiser(pipe, original)
    training_loss(pipe.scheduler)  # an unknown objective is named before anything runs
    with ExitStack() as stack:
        device = stack.enter_context(on_device(pipe, "retrain"))
        stack.enter_context(undisturbed(device))
        # Adapters are initialised from the global generators, which are afterwards as they were.
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        torch.manual_seed(mix(config.seed))
        network = copy.deepcopy(original).float()  # small updates would be lost in the rounding of bf16
        task = Task(with_denoiser(pipe, network), pictures, captions, config, device)
        _check_loop(pipe, captions[0], _size(pictures), config, device)
        if config.method == "lora":
            add_adapters(network, config)
        else:
            network.requires_grad_(True)
        with ExitStack() as masked:
            if config.method == "2:4":
                masked.enter_context(two_four.trainable(network))
            _train(task, network, config, history, progress)
        weights = _merged(network, config)
    result = copy.deepcopy(original)  # its dtypes, flags and modes; load_state_dict rounds to them
    result.load_state_dict(weights)
    return with_denoiser(pipe, result)


class Task:
    """Latents of the images, the conditioning of each, and the loss of some of them."""

    def __init__(self, pipe, pictures: Tensor, captions: list, config: RetrainConfig, device: torch.device):
        self.config, self.device = config, device
        self.network = one_denoiser(pipe, "retrain")
        size = _size(pictures)
        self.conditions = [conditioning(pipe, caption, size, config.call) for caption in captions]
        self.rule = rule_of_joining(pipe, captions, self.conditions, size, config.call)
        first = self.conditions[0]
        self.latents = torch.cat([_latents(pipe, part, first.shape, device) for part in pictures.split(8)])
        if self.latents.shape[1:] != first.shape:
            raise EcoDiffError(
                f"{type(pipe).__name__}: these pictures become latents {list(self.latents.shape[1:])}, but its "
                f"denoiser reads {list(first.shape)}; give pictures of a size that the pipeline draws."
            )
        self.loss_of = training_loss(pipe.scheduler, first.full_time, time_dtype=first.time_dtype)

    def loss(self, indices: Sequence[int], generator: torch.Generator) -> Tensor:
        """The objective for these images, a scalar; noise and time steps come from the generator."""
        condition = join([self.conditions[i] for i in indices], self.rule)
        bf16 = self.config.mixed_precision == "bf16"
        try:
            with torch.autocast(self.device.type, torch.bfloat16) if bf16 else nullcontext():
                return self.loss_of(self.network, self.latents[list(indices)], condition, generator)
        except torch.OutOfMemoryError:
            raise
        except FAULTS as error:
            raise EcoDiffError(
                f"retrain: {type(self.network).__name__} cannot be trained by itself on the objective that its "
                f"scheduler names ({type(error).__name__}: {error}): leave it as it is pruned, or train it with its "
                "own script."
            ) from error

    def backward(self, step: int) -> float:
        """The loss of a step, whose gradient is left in the weights."""
        config, total = self.config, 0.0
        batch = epoch_batch(len(self.latents), config.batch_size, config.seed, step)
        generator = torch.Generator().manual_seed(mix(config.seed, step))

        def add(part: list[int]) -> None:
            nonlocal total
            # Weighted, so that the parts add up to the mean over the batch, however it is split.
            loss = self.loss(part, generator) * len(part) / len(batch)
            loss.backward()
            total += loss.item()

        in_batches(batch, config.micro_batch_size or len(batch), add)
        return total

    @torch.no_grad()
    def cost(self) -> str:
        """One line that says what the run will take, measured on one forward pass."""
        size = min(self.config.micro_batch_size or self.config.batch_size, len(self.latents))
        if self.rule is None:  # the conditions of several captions do not make a batch
            size = 1
        for _ in range(2):  # the first one warms up
            started = time.perf_counter()
            self.loss(range(size), torch.Generator().manual_seed(0)).item()
            seconds = time.perf_counter() - started
        # The backward pass takes about twice as long as the forward one, together three times.
        seconds *= 3 * self.config.batch_size / size * self.config.steps
        work = f"{self.config.steps} steps of {self.config.batch_size} pictures ({self.config.method})"
        return f"{work}, on {self.device}: about {in_words(seconds)}"


def _train(task: Task, network: nn.Module, config: RetrainConfig, history: list | None, progress: bool) -> None:
    """Take all steps; the weights that require gradients are changed in place."""
    # Layers that were pruned as a whole are left with parameters of no elements.
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad and parameter.numel()]
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=config.weight_decay)
    if progress and config.steps:
        say(task.cost())
    with progress_bar(range(config.steps), desc="retrain", progress=progress) as bar:
        for step in bar:
            started = time.perf_counter()
            optimizer.zero_grad(set_to_none=True)
            loss = task.backward(step)
            # Clipping to infinity changes nothing and still measures the norm.
            norm = torch.nn.utils.clip_grad_norm_(trained, config.clip_grad_norm or math.inf).item()
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise EcoDiffError(
                    f"Step {step + 1}: loss {loss:.4g}, gradient norm {norm:.4g}: not finite, so retraining stopped "
                    "and the pipeline is as it was. Lower lr, clip gradients, or use fp32."
                )
            optimizer.step()
            bar.set_postfix(loss=f"{loss:.4g}", refresh=False)
            if history is not None:
                seconds = time.perf_counter() - started
                history.append({"step": step + 1, "loss": loss, "gradient_norm": norm, "seconds": seconds})


def add_adapters(network: nn.Module, config: RetrainConfig) -> None:
    """LoRA beside every layer that writes or reads the units of a site; nothing else requires gradients then."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise EcoDiffError('retrain needs peft for method="lora": install it, or take method="full".') from error
    layers: list[str] = []
    for site in find_sites(network, config.kinds).values():
        for span in (*site.writers, *site.readers):
            # One layer may hold several spans, a fully pruned one has no weights to adapt, and a depthwise one few.
            layer = network.get_submodule(span.layer)
            if span.layer not in layers and not is_emptied(layer) and not is_depthwise(layer):
                layers.append(span.layer)
    if not layers:
        raise EcoDiffError(
            f"{type(network).__name__} has no layers of the kinds {', '.join(config.kinds)} left for adapters: take "
            'method="full".'
        )
    alpha = config.alpha
    if alpha is None:
        alpha = config.rank
    network.requires_grad_(False)
    # By peft itself: not every denoiser of diffusers has methods for adapters.
    inject_adapter_in_model(LoraConfig(r=config.rank, lora_alpha=alpha, target_modules=layers), network)


def _merged(network: nn.Module, config: RetrainConfig) -> dict[str, Tensor]:
    """The trained weights under the names that they had before there were adapters."""
    if config.method == "lora":
        from peft.tuners.tuners_utils import BaseTunerLayer

        for layer in network.modules():
            if isinstance(layer, BaseTunerLayer):
                layer.merge()
        recurse_remove_peft_layers(network)
    return network.state_dict()


def _latents(pipe, pictures: Tensor, shape: torch.Size, device: torch.device) -> Tensor:
    """Latents of uint8 images, in fp32. Raises EcoDiffError where there are none, or they are not finite."""
    pixels = pictures.to(device).float() / 127.5 - 1  # a VAE reads values from -1 to 1
    if pixels.ndim == 5:
        pixels = pixels.transpose(1, 2)  # and the frames of a clip after its colours
    try:
        latents = encode(pipe, pixels.to(pipe.vae.dtype), shape).float()
    except FAULTS as error:
        if len(pictures) > 1:  # a VAE may take one picture at a time, as that of HunyuanVideo 1.5 does
            return torch.cat([_latents(pipe, picture, shape, device) for picture in pictures.split(1)])
        # One of sound, or none.
        raise EcoDiffError(
            f"retrain: {type(pipe).__name__} does not encode these pictures by a VAE of images or videos ({error}), so "
            "it cannot be trained on them here: leave it as it is pruned, or train it with its own script."
        ) from error
    if not torch.isfinite(latents).all():
        raise EcoDiffError(f"{type(pipe).__name__}: its VAE gives latents that are not finite; give it a wider dtype.")
    return latents


def _size(pictures: Tensor) -> list[int]:
    """Height and width of images, and before them the number of frames of clips."""
    return [*pictures.shape[1:-3], *pictures.shape[-2:]]


def _check_loop(pipe, caption, size: Sequence[int], config: RetrainConfig, device: torch.device) -> None:
    """Raise EcoDiffError unless the pipeline's own loop does with latents and predictions what the loss supposes."""
    modules = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    try:
        with frozen(*modules), torch.random.fork_rng([device] if device.type == "cuda" else []):
            reason = otherwise_trained(pipe, caption, size, config.call)
            if reason is None and not reads_as_said(pipe, caption, size, config.call):
                reason = "it scales its latents otherwise than the config of its VAE says"
    except (EcoDiffError, torch.OutOfMemoryError):
        raise
    except FAULTS as error:
        reason = f"a call of two steps fails ({type(error).__name__}: {error})"
    if reason:
        raise EcoDiffError(
            f"retrain: {type(pipe).__name__} cannot be trained on pictures here, since {reason}: leave it as it is "
            "pruned, or train it with its own script."
        )


def _check_pictures(pictures: Tensor, captions: list) -> None:
    known = isinstance(pictures, Tensor) and pictures.dtype == torch.uint8 and pictures.ndim in (4, 5)
    if not known or pictures.shape[-3] != 3:
        raise EcoDiffError(
            "retrain needs pictures as a uint8 tensor [N, 3, height, width], or clips [N, frames, 3, height, width]: "
            "generate draws such."
        )
    if len(pictures) != len(captions):
        raise EcoDiffError(f"{len(pictures)} pictures but {len(captions)} captions: retrain needs one caption each.")


def _check_denoiser(pipe, denoiser: nn.Module) -> None:
    if getattr(pipe, "_all_hooks", None) or getattr(pipe, "hf_device_map", None):
        raise EcoDiffError("retrain trains on one device: load the pipeline without offloading or a device map.")
    without_adapters(denoiser, "retrain")
    refuse_elsewhere(denoiser, "retrain")
