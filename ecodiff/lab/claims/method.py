"""Claims about the method: relaxation, regulariser, objective, checkpointing, and what it can be applied to."""

from __future__ import annotations

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
    closed, opened = (gates == 0).float().mean().item(), (gates == 1).float().mean().item()
    evidence = f"at λ = 0: {closed:.3f} of the draws are 0, {opened:.3f} are 1, {1 - closed - opened:.3f} lie between"
    return Claim(
        "§2.2, Fig. 4",
        "Hard concrete gates are exactly 0 or 1 with positive chance and can still be learned by gradients.",
        "Shares of draws at 0, at 1, and between (only there is a gradient), with Figure 4's constants: all positive.",
        ("01_hard_concrete",),
        (printed("formulas of §2.2", min(closed, opened, 1 - closed - opened) > 0, evidence),),
    )


def steeper_by_delta() -> Claim:
    return Claim(
        "§2.2, App. F, Fig. 5",
        "The larger δ, the more the gate is like a step.",
        "Slope of the mean gate and share of gates at 0 or 1, for small and large δ.",
        ("01_hard_concrete", "15_errata"),
        (contradicted(algebra.delta_as_steepness()),),
    )


def l1_against_l0(model: str) -> Decision:
    """L1 with the best β of several, chosen on captions of no table, against the closed form of our defaults."""
    places = ("choices", "L1 in place of L0"), ("choices", "corrected")
    return kept(model, *places, BOTH, label=f"β = {tuned_l1(model):g}")


def l1_for_l0() -> Claim:
    return Claim(
        "Eq. 4, App. D",
        "The expected number of open gates is about a multiple of the sum of |λ|, which can take its place.",
        "Appendix D's factor g is constant; masks learned with |λ|, at the best of several β (chosen on captions of no "
        "table), keep SSIM and right images of those learned with the closed form.",
        ("02_l0_to_l1", "12_settings"),
        (
            contradicted(algebra.constant_factor()),
            contradicted(algebra.log_of_lambda()),
            *(l1_against_l0(model) for model in (SDXL, DEV)),
        ),
    )


def start_at_five() -> Claim:
    def from_five(delta: str) -> Decision:
        three = f"L1, δ = {delta}"
        return kept(DEV, ("relaxation", f"{three}, λ starts at 5"), ("relaxation", three), BOTH, label=f"δ = {delta}")

    return Claim(
        "App. E",
        "Starting all λ at 5 makes training smooth.",
        "Some gate has a gradient at the start; with the paper's δ of 0.5 and 0.1, masks learned from 5 keep SSIM and "
        "right images of those learned from 3 (with L1 in every update, as published).",
        ("12_settings", "01_hard_concrete"),
        (contradicted(algebra.start_value()), from_five("0.5"), from_five("0.1")),
    )


def end_to_end() -> Claim:
    def ends(model: str):
        return better(model, ("choices", "corrected"), ("choices", "one step at a time"))

    return Claim(
        "§1, §2.1",
        "A mask learned from the final latents is better than one learned from the error of each step, which adds up.",
        "The same gates learned from the final latents, minus those learned from the error of single steps: more SSIM "
        "or more right pictures, less of neither.",
        ("12_settings", "04_learning_a_mask"),
        (*(ends(model) for model in (SDXL, DEV)), real(SDXL, "choices", ends)),
    )


def exact_gradient() -> Claim:
    return Claim(
        "§2.3, Alg. 2",
        "Time-step checkpointing computes the gradient of the whole trajectory.",
        "Algorithm 2 on a problem with a known derivative; on the model, gradients equal bit for bit at every T.",
        ("06_memory_and_time", "15_errata"),
        (contradicted(algebra.checkpointing()), _bit_equal()),
    )


def _bit_equal() -> Decision:
    found = {steps: variants["checkpointed"]["bit_equal"] for steps, variants in sorted(on_embedded.updates().items())}
    if not found:
        return Decision(on_embedded.on(SDXL), MISSING, command=on_embedded.command_of_updates())
    evidence = f"equal bit for bit at {sum(found.values())} of {len(found)} values of T ({', '.join(map(str, found))})"
    return Decision(on_embedded.on(SDXL), REPRODUCED if all(found.values()) else NOT_REPRODUCED, evidence)


def outer_widths() -> Claim:
    return Claim(
        "App. B, Eq. 9, 10",
        "Removing heads and neurons leaves what goes in and out of a module as wide as it was.",
        "Every second unit of every site removed from the real configurations: no outer width changes.",
        ("03_where_masks_go",),
        tuple(
            by_structure(f"{title}, built without weights", on_full_size.widths_stay, preset)
            for title, preset in (("Stable Diffusion 2", "sd2"), ("SDXL", "sdxl"), ("FLUX.1", "flux-schnell"))
        ),
    )


def any_architecture() -> Claim:
    def has_units(*found: dict) -> tuple[bool, str]:
        shown = [f"{c['units']['attention']:,} heads, {c['units']['feed_forward']:,} neurons" for c in found]
        return all(min(c["units"]["attention"], c["units"]["feed_forward"]) > 0 for c in found), "; ".join(shown)

    return Claim(
        "§1, §4, App. H",
        "One method, without code for each model, prunes U-Nets and diffusion transformers.",
        "The same function finds heads and neurons in SD2, SDXL and FLUX; the same call has learned masks on a U-Net "
        "and on a transformer.",
        ("03_where_masks_go",),
        (
            by_count("SD2, SDXL, FLUX.1, counted", has_units, SD2_UPDATE, ("sdxl", ONE), ("flux-schnell", ONE)),
            _learned_on_both(),
        ),
    )


def _learned_on_both() -> Decision:
    """One code path on a U-Net and a transformer: rows of learned masks of both are recorded."""
    nets = {"U-Net": (SDXL, SD2), "transformer": (DEV, SCHNELL)}
    done = {kind: [model for model in models if on_embedded.recorded(model, LEARNED)] for kind, models in nets.items()}
    evidence = "; ".join(f"learned on {', '.join(models)} ({kind})" for kind, models in done.items() if models)
    if all(done.values()):
        return Decision("the embedded models", REPRODUCED, evidence)
    lacking = next(nets[kind][0] for kind, models in done.items() if not models)
    return Decision("the embedded models", MISSING, evidence, on_embedded.command(lacking, "main"))


def deepcache_needs_a_unet() -> Claim:
    def refused(unet, transformer) -> tuple[bool, str]:
        from ecodiff.baselines.deepcache import deep_blocks

        deep = len(deep_blocks(unet, depth=1))
        try:
            deep_blocks(transformer, depth=1)
        except EcoDiffError:
            return True, f"SD2 has {deep} blocks inside its skip connections, FLUX.1 has no skip connections to reuse"
        return False, "FLUX.1 has blocks to reuse"

    return Claim(
        "§3.2, Table 1",
        "DeepCache fits only U-Nets, so it cannot be used on FLUX.",
        "The function that looks for the deep part finds one in SD2's denoiser and none in FLUX's.",
        ("11_every_method",),
        (by_structure("SD2 and FLUX.1, built without weights", refused, "sd2", "flux-schnell"),),
    )


def occlusion_is_slow() -> Claim:
    def compare(c: dict) -> tuple[bool, str]:
        units = c["units"]["attention"] + c["units"]["feed_forward"]
        updates = setting("table3", "training_steps") * setting("table3", "batch_size")
        passes = 3 * updates  # forward, recomputed, backward; the teacher's trajectories are fewer
        shown = f"{units:,} units to occlude, the work of {passes:,} trajectories to learn: {units / passes:.0f} times"
        return units > 10 * passes, shown

    return Claim(
        "App. A",
        "Scoring parts by leaving each out does not scale to many candidates.",
        "Trajectories that occluding each head and neuron of SDXL takes, against those of Table 3's 400 updates: over "
        "ten times.",
        ("11_every_method",),
        (by_count("SDXL, counted", compare, ("sdxl", ONE)),),
    )


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
