"""The loss that EcoDiff learns by (Eq. 2), expanded to second order in the gates: nothing is learned.

With gates m the denoising process ends in ẑ_0(m), and ẑ_0(1) = z_0. At m = 1 the loss is at its minimum, zero, so its
value and its slope say nothing, and its curvature is the Gauss-Newton matrix of the whole process F:

    ‖z_0 - ẑ_0(m)‖² ≈ (1 - m)ᵀ JᵀJ (1 - m),        J = ∂ẑ_0/∂m at m = 1.

The score of a unit is the root of its diagonal entry, ‖J_j‖: how far final latents move as that gate alone closes. It
is optimal brain damage (LeCun et al., 1990) for gates and a process in the place of weights and a network. The
derivative goes through all steps, as in learning (`trajectory.final_latents`, time-step checkpointing included).

For random signs v, vᵀ J_j has mean 0 and variance ‖J_j‖² (Hutchinson, 1990), and one backward pass gives vᵀ J for all
units and samples at once. It is a sum of many terms, so about normal, and its mean modulus is √(2/π) ‖J_j‖. Moduli are
averaged, not squares: images differ a hundredfold in ‖J‖², and a mean of squares would be that of very few of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ecodiff.errors import EcoDiffError
from ecodiff.method.hooks import apply_gates
from ecodiff.method.trajectory import final_latents
from ecodiff.pipelines.batches import form_of_samples, in_batches
from ecodiff.pipelines.parts import denoiser
from ecodiff.pipelines.prompts import checked_prompts, encoding_once, mix
from ecodiff.pipelines.running import not_half, placed
from ecodiff.progress import progress_bar

from .calibration import KINDS, Sampling, gates_of_samples, sites_of


@placed
def scores(
    pipe, prompts: Sequence, *, kinds: tuple[str, ...] = KINDS, probes: int = 1, keep_last: int = 1, **sampling
) -> dict[str, Tensor]:
    """``‖∂z_0/∂m_j‖``, its mean over prompts, for the gate of each unit, {site name: fp32 [units]}.

    Args:
        probes: vectors of random signs for each prompt, each a backward pass. More prompts are worth more than more
            probes at the same cost.
        keep_last: steps whose activations are kept, as in ``final_latents``; time and memory only.
        sampling: fields of ``Sampling``. Memory is that of one denoiser call with gradients for ``batch_size`` prompts.

    Raises EcoDiffError for fewer than one probe, a denoiser in float16, and a loop that does not pass gradients on.
    """
    if probes < 1:
        raise EcoDiffError(f"gauss-newton: probes={probes}: at least one backward pass is needed.")
    model, settings = denoiser(pipe), Sampling(**sampling)
    sites = sites_of(pipe, kinds, exclude=settings.exclude)
    not_half(model, "gauss-newton")
    prompts = checked_prompts(prompts, "gauss-newton")
    call = {"num_inference_steps": settings.num_inference_steps, **settings.call}
    if settings.guidance_scale is not None:
        call["guidance_scale"] = settings.guidance_scale
    pipe = encoding_once(pipe)
    totals = {name: torch.zeros(site.units) for name, site in sites.items()}

    def add(numbers: list[int]) -> None:
        gates = gates_of_samples(model, sites, len(numbers))
        generators = [torch.Generator().manual_seed(mix(settings.seed, i)) for i in numbers]
        with apply_gates(model, gates, sites):
            latents = final_latents(
                pipe,
                keep_last=keep_last,
                **form.arguments([prompts[i] for i in numbers], generators),
                **call,
            ).float()
            for probe in range(probes):
                signs = torch.stack([random_signs(latents.shape[1:], mix(settings.seed, probe, i)) for i in numbers])
                # Each sample has gates of its own, so one backward pass of the sum gives vᵀJ of every sample.
                product = (latents * signs.to(latents.device)).sum()
                is_last = probe == probes - 1
                slopes = torch.autograd.grad(product, gates.values(), retain_graph=not is_last, allow_unused=True)
                for total, slope in zip(totals.values(), slopes, strict=True):
                    if slope is not None:
                        total += slope.abs().sum(0).cpu()
        bar.update(len(numbers))

    with progress_bar(total=len(prompts), desc="gauss-newton", progress=settings.progress) as bar:
        form = form_of_samples(settings.batch_size, pipe, prompts, **call)
        in_batches(range(len(prompts)), form.size, add)
    # √(π/2) turns the mean modulus into ‖J_j‖, see above.
    return {name: math.sqrt(math.pi / 2) * total / (len(prompts) * probes) for name, total in totals.items()}


def random_signs(shape: Sequence[int], seed: int) -> Tensor:
    """Random signs, fp32 of this shape; the same for the same seed, whatever runs in the same batch."""
    return torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed)) * 2.0 - 1.0
