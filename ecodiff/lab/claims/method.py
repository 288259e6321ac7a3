"""Claims about the method: relaxation, regulariser, objective, checkpointing, and what it can be applied to."""

from __future__ import annotations

from functools import partial

from ecodiff.errors import EcoDiffError
from ecodiff.lab.errata import algebra
from ecodiff.lab.paper import setting
from ecodiff.lab.studies.plan import tuned_l1

from . import on_embedded, on_full_size
from .on_embedded import BOTH, DEV, LEARNED, SCHNELL, SD2, SDXL, better, kept, real
from .on_full_size import ONE, SD2_UPDATE, by_count, by_structure
from .rules import MISSING, NOT_REPRODUCED, REPRODUCED, Claim, Decision, contradicted, printed


def exact_gates() -> Claim:
    import torch

    gates = torch.tensor([algebra.gate(algebra.noise(u, 0.0)) for u in algebra.U])
    closed = (gates == 0).float().mean().item()
    opened = (gates == 1).float().mean().item()
    between = 1 - closed - opened
    evidence = f"at λ = 0: {closed:.3f} of the draws are 0, {opened:.3f} are 1, {between:.3f} lie between"
    return Claim(
        "§2.2, Fig. 4",
        "Hard concrete gates are exactly 0 or 1 with positive chance and can still be learned by gradients.",
        "Shares of draws at 0, at 1, and between (only there is a gradient), with Figure 4's constants: all positive.",
        ("03_hard_concrete",),
        (printed("formulas of §2.2", min(closed, opened, between) > 0, evidence),),
    )


def steeper_by_delta() -> Claim:
    return Claim(
        "§2.2, App. F, Fig. 5",
        "The larger δ, the more the gate is like a step.",
        "Slope of the mean gate and share of gates at 0 or 1, for small and large δ.",
        ("03_hard_concrete", "16_errata"),
        (contradicted(algebra.delta_as_steepness()),),
    )


def l1_against_l0(model: str) -> Decision:
    """The decision on "L1 loses nothing" against the closed form of L0, our default.

    L1 has the best β of several, chosen on captions of no table.
    """
    places = ("choices", "L1 in place of L0"), ("choices", "corrected")
    return kept(model, *places, BOTH, label=f"β = {tuned_l1(model):g}")


def l1_for_l0() -> Claim:
    return Claim(
        "Eq. 4, App. D",
        "The expected number of open gates is about a multiple of the sum of |λ|, which can take its place.",
        "Appendix D's factor g is constant; masks learned with |λ|, at the best of several β (chosen on captions of no "
        "table), keep SSIM and right images of those learned with the closed form.",
        ("04_l0_to_l1", "11_settings"),
        (
            contradicted(algebra.constant_factor()),
            contradicted(algebra.log_of_lambda()),
            l1_against_l0(SDXL),
            l1_against_l0(DEV),
        ),
    )


def start_at_five() -> Claim:
    return Claim(
        "App. E",
        "Starting all λ at 5 makes training smooth.",
        "Some gate has a gradient at the start; with the paper's δ of 0.5 and 0.1, masks learned from 5 keep SSIM and "
        "right images of those learned from 3 (with L1 in every update, as published).",
        ("11_settings", "03_hard_concrete"),
        (contradicted(algebra.start_value()), _from_five("0.5"), _from_five("0.1")),
    )


def _from_five(delta: str) -> Decision:
    from_three = f"L1, δ = {delta}"
    places = ("relaxation", f"{from_three}, λ starts at 5"), ("relaxation", from_three)
    return kept(DEV, *places, BOTH, label=f"δ = {delta}")


def end_to_end() -> Claim:
    by_final_latents = partial(better, first=("choices", "corrected"), second=("choices", "one step at a time"))
    return Claim(
        "§1, §2.1",
        "A mask learned from the final latents is better than one learned from the error of each step, which adds up.",
        "The same gates learned from the final latents, minus those learned from the error of single steps: more SSIM "
        "or more right images, less of neither.",
        ("11_settings", "05_learning_a_mask"),
        (by_final_latents(SDXL), by_final_latents(DEV), real(SDXL, "choices", by_final_latents)),
    )


def exact_gradient() -> Claim:
    return Claim(
        "§2.3, Alg. 2",
        "Time-step checkpointing computes the gradient of the whole trajectory.",
        "Algorithm 2 on a problem with a known derivative; on the model, gradients equal bit for bit at every T.",
        ("06_memory_and_time", "16_errata"),
        (contradicted(algebra.checkpointing()), _bit_equal()),
    )


def _bit_equal() -> Decision:
    updates = on_embedded.updates()
    if not updates:
        return Decision(on_embedded.on(SDXL), MISSING, command=on_embedded.command_of_updates())
    equal = [variants["checkpointed"]["bit_equal"] for variants in updates.values()]
    steps = ", ".join(str(number) for number in sorted(updates))
    evidence = f"equal bit for bit at {sum(equal)} of {len(equal)} values of T ({steps})"
    return Decision(on_embedded.on(SDXL), REPRODUCED if all(equal) else NOT_REPRODUCED, evidence)


def outer_widths() -> Claim:
    return Claim(
        "App. B, Eq. 9, 10",
        "Removing heads and neurons leaves what goes in and out of a module as wide as it was.",
        "Every second unit of every site removed from the real configurations: no outer width changes.",
        ("02_where_masks_go",),
        (
            by_structure("Stable Diffusion 2, built without weights", on_full_size.widths_stay, "sd2"),
            by_structure("SDXL, built without weights", on_full_size.widths_stay, "sdxl"),
            by_structure("FLUX.1, built without weights", on_full_size.widths_stay, "flux-schnell"),
        ),
    )


def any_architecture() -> Claim:
    return Claim(
        "§1, §4, App. H",
        "One method, without code for each model, prunes U-Nets and diffusion transformers.",
        "The same function finds heads and neurons in SD2, SDXL and FLUX; the same call has learned masks on a U-Net "
        "and on a transformer.",
        ("02_where_masks_go",),
        (
            by_count("SD2, SDXL, FLUX.1, counted", _has_units, SD2_UPDATE, ("sdxl", ONE), ("flux-schnell", ONE)),
            _learned_on_both(),
        ),
    )


def _has_units(*counts: dict) -> tuple[bool, str]:
    units = [count["units"] for count in counts]
    parts = [f"{one['attention']:,} heads, {one['feed_forward']:,} neurons" for one in units]
    return all(one["attention"] > 0 and one["feed_forward"] > 0 for one in units), "; ".join(parts)


def _learned_on_both() -> Decision:
    """The decision on one code path for a U-Net and a transformer: rows of learned masks of both are recorded."""
    evidence, lacking = [], []
    for kind, models in (("U-Net", (SDXL, SD2)), ("transformer", (DEV, SCHNELL))):
        learned = [model for model in models if on_embedded.recorded(model, LEARNED)]
        if learned:
            evidence.append(f"learned on {', '.join(learned)} ({kind})")
        else:
            lacking.append(models[0])
    if lacking:
        command = on_embedded.command(lacking[0], "main")
        return Decision("the embedded models", MISSING, "; ".join(evidence), command)
    return Decision("the embedded models", REPRODUCED, "; ".join(evidence))


def deepcache_needs_a_unet() -> Claim:
    return Claim(
        "§3.2, Table 1",
        "DeepCache fits only U-Nets, so it cannot be used on FLUX.",
        "The function that looks for the deep part finds one in SD2's denoiser and none in FLUX's.",
        ("10_every_method",),
        (by_structure("SD2 and FLUX.1, built without weights", _only_the_unet, "sd2", "flux-schnell"),),
    )


def _only_the_unet(unet, transformer) -> tuple[bool, str]:
    from ecodiff.baselines.deepcache import deep_blocks

    deep = len(deep_blocks(unet, depth=1))
    try:
        deep_blocks(transformer, depth=1)
    except EcoDiffError:
        return True, f"SD2 has {deep} blocks inside its skip connections, FLUX.1 has no skip connections to reuse"
    return False, "FLUX.1 has blocks to reuse"


def occlusion_is_slow() -> Claim:
    return Claim(
        "App. A",
        "Scoring parts by leaving each out does not scale to many candidates.",
        "Trajectories that occluding each head and neuron of SDXL takes, against those of Table 3's 400 updates: over "
        "ten times.",
        ("10_every_method",),
        (by_count("SDXL, counted", _occluding_against_learning, ("sdxl", ONE)),),
    )


def _occluding_against_learning(count: dict) -> tuple[bool, str]:
    units = count["units"]["attention"] + count["units"]["feed_forward"]
    trajectories = setting("table3", "training_steps") * setting("table3", "batch_size")
    work = 3 * trajectories  # forward, recomputed, backward; the teacher's trajectories are fewer
    evidence = f"{units:,} units to occlude, the work of {work:,} trajectories to learn: {units / work:.0f} times"
    return units > 10 * work, evidence


METHOD = (
    exact_gates,
    steeper_by_delta,
    l1_for_l0,
    start_at_five,
    end_to_end,
    exact_gradient,
    outer_widths,
    any_architecture,
    deepcache_needs_a_unet,
    occlusion_is_slow,
)
