"""Claims of the published version (ICLR 2026) that the preprint does not make, or makes with the other sign.

Its tables are second-hand, and each decision on them says so. What the change does to the verdicts on the preprint's
claims is in ``CHANGES``.
"""

from __future__ import annotations

from functools import partial

from ecodiff.lab.errata import versions
from ecodiff.lab.paper import claim, row, setting, table

from . import on_full_size
from .cost import UPDATE_OF, command_of_update, learn_sdxl, update_on_gpu
from .on_embedded import BOTH, DEV, LEARNED, ORIGINAL, SCHNELL, SDXL, better, kept, real
from .page import anchor
from .results import PAIRS, PAIRS_ORIGINAL, SETS, SMALL, fifth_kept, rises_of_fid
from .rules import CHECKPOINT, MISSING, UNDECIDED, Claim, Decision, contradicted, printed

MAIN = "published version, main table (second-hand)"
RECOVERY = "published version, recovery table (second-hand)"


def rise_of_fid(model: str, limit: float = SMALL) -> Decision:
    """The decision by the published main table on "FID rises by less than ``limit`` of the original's"."""
    original = row("published/main", model=model, method="Original")
    pruned = row("published/main", model=model, method="EcoDiff")
    rises, evidence = rises_of_fid(original, pruned)
    return printed(f"{MAIN}: {model} at {pruned['ratio']:.0%}", max(rises) < limit, evidence)


def minimal_loss_of_sdxl() -> Claim:
    return Claim(
        "Published version: abstract, main table",
        "A fifth of SDXL's parameters can go without retraining, with minimal loss; FID now rises where the preprint's "
        "fell.",
        "Published table: FID rises by less than a tenth on both sets. On the small model: right images, learned mask "
        "minus original, above minus the smallest effect.",
        ("17_versions", "10_every_method"),
        (
            rise_of_fid("SDXL"),
            kept(SDXL, LEARNED, ORIGINAL, label="one object"),
            kept(SDXL, PAIRS, PAIRS_ORIGINAL, label="two objects"),
            real(SDXL, "main", fifth_kept),
        ),
    )


def a_fifth_of_both_flux() -> Claim:
    return Claim(
        "Published version: main table",
        "A fifth of FLUX-dev and of FLUX-schnell can go without retraining; the preprint's tables end at 15 %, for "
        "schnell alone.",
        "Published table: FID rises by less than a tenth on both sets, and its numbers for schnell at 20 % are not the "
        "preprint's for 15 %. On the small models: right images, learned mask minus original.",
        ("17_versions", "10_every_method"),
        (
            rise_of_fid("FLUX-dev"),
            rise_of_fid("FLUX-schnell"),
            contradicted(versions.schnell_twice()),
            kept(DEV, LEARNED, ORIGINAL, label="one object"),
            kept(SCHNELL, LEARNED, ORIGINAL, label="one object"),
            kept(DEV, PAIRS, PAIRS_ORIGINAL, label="two objects"),
            kept(SCHNELL, PAIRS, PAIRS_ORIGINAL, label="two objects"),
            real(DEV, "main", fifth_kept),
            real(SCHNELL, "main", fifth_kept),
        ),
    )


def ten_hours() -> Claim:
    return Claim(
        "Published version: abstract",
        "A mask is learned in 10 GPU-hours of an A100, with 100 samples.",
        "The 400 updates of four samples of Tables 2 and 3, by the time of one checkpointed update measured on another "
        "GPU: more than 10 hours there contradicts it; less leaves it open how much slower an A100 is.",
        ("17_versions", "13_what_it_costs"),
        (
            _hours("SDXL"),
            _hours("FLUX"),
            Decision("SDXL on an A100", CHECKPOINT, command=learn_sdxl(400)),
        ),
    )


def _hours(model: str) -> Decision:
    """Hours of learning a mask by the longest recorded update of this model on a GPU, against the printed budget."""
    preset, samples, steps = UPDATE_OF[model]
    title = f"{model}, random weights, measured on a GPU"
    measured = update_on_gpu(model)
    if measured is None:
        return Decision(title, MISSING, command=command_of_update(preset, samples))
    seconds, device = measured
    settings = "table2" if model == "FLUX" else "table3"
    updates, batch = setting(settings, "training_steps"), setting(settings, "batch_size")
    hours = updates * batch * seconds / 3600
    fewer = claim("mask_steps", "published/claims")
    budget = claim("budget", "published/claims")
    evidence = f"{hours:.2f} hours for {updates} updates, {hours * fewer / updates:.2f} for {fewer:g} "
    evidence += f"({device}, T = {steps}, random weights)"
    if hours > budget:
        return on_full_size.decided(title, False, f"{evidence}; {budget:g} printed (second-hand)")
    evidence += f"; {updates} updates are within {budget:g} hours (second-hand) if an A100 takes at most "
    evidence += f"{budget / hours:.1f} times as long"
    return Decision(title, UNDECIDED, evidence)


def half_with_recovery() -> Claim:
    original = row("published/main", model="SDXL", method="Original")["coco_fid"]
    decisions = []
    for ratio in (0.25, 0.4, 0.5):
        fid = row("published/recovery", ratio=ratio, recovery="full")["coco_fid"]
        rise = fid / original - 1
        evidence = f"FID {rise:+.1%} of the original's on COCO"
        decisions.append(printed(f"{RECOVERY}: SDXL at {ratio:.0%}, full recovery", rise < SMALL, evidence))
    falls = []
    for ratio in (0.25, 0.4, 0.5):
        without = row("published/recovery", ratio=ratio, recovery="none")["coco_fid"]
        falls += [entry["coco_fid"] < without for entry in _recovered(ratio)]
    evidence = f"FID is lower after recovery in {sum(falls)} of {len(falls)} rows"
    return Claim(
        "Published version: recovery table",
        "With recovery a quarter to a half of SDXL can go.",
        "Published table: after full recovery FID is at most a tenth above the original's; recovery lowers FID "
        "everywhere. On small models: all weights trained again minus the original treated alike, and minus no "
        "training.",
        ("17_versions", "12_after_pruning"),
        (
            *decisions,
            printed(f"{RECOVERY}: recovery lowers FID", all(falls), evidence),
            *(_wins_back(model, ratio) for model in (SDXL, DEV) for ratio in (30, 50)),
            *(_as_the_original(model, ratio) for model in (SDXL, DEV) for ratio in (30, 50)),
            real(SDXL, "retraining", partial(_wins_back, ratio=50)),
        ),
    )


def _recovered(ratio: float) -> list[dict]:
    return [entry for entry in table("published/recovery") if entry["ratio"] == ratio and entry["recovery"] != "none"]


def _wins_back(model: str, ratio: int) -> Decision:
    before = f"learned, {ratio}%"
    places = ("retraining", f"{before}, all weights"), ("retraining", before)
    return better(model, *places, label=f"{ratio} %, against no training")


def _as_the_original(model: str, ratio: int) -> Decision:
    """The control: the unpruned model, trained in the same way, may change as well."""
    places = ("retraining", f"learned, {ratio}%, all weights"), ("retraining", "original, all weights")
    return kept(model, *places, label=f"{ratio} %, against the original trained alike")


def per_step_loss() -> Claim:
    against = partial(better, first=("choices", "corrected"), second=("choices", "one step at a time"))
    return Claim(
        "Published version: main table",
        "Masks learned from the final latents are better than masks learned from the loss of single steps.",
        "Published table: lower FID on both sets at 20 %. On small models: more SSIM or more right images, less of "
        "neither.",
        ("11_settings", "17_versions"),
        (_lower_than("per-step loss"), against(SDXL), against(DEV), real(SDXL, "choices", against)),
    )


def hand_chosen_blocks() -> Claim:
    against = partial(better, first=LEARNED, second=("main", "blocks, 20%"), label="against whole blocks by score")
    return Claim(
        "Published version: main table",
        "Learned masks are better than the removal of blocks chosen by hand, as BK-SDM does.",
        "Published table: lower FID on both sets at 20 %. On small models, whose blocks are chosen by a score and not "
        "by hand: more SSIM or more right images, less of neither.",
        ("10_every_method", "17_versions"),
        (
            _lower_than("BK-SDM"),
            against(SDXL),
            against(DEV),
            Decision("BK-SDM's own blocks", MISSING, "no study removes the blocks that BK-SDM names; only scored ones"),
        ),
    )


def _lower_than(method: str) -> Decision:
    """The decision by the published main table on "EcoDiff's FID of SDXL is lower than this method's"."""
    ours = row("published/main", model="SDXL", method="EcoDiff")
    theirs = row("published/main", model="SDXL", method=method)
    holds = all(ours[column] < theirs[column] for column in SETS)
    pairs = [f"{ours[column]:g} against {theirs[column]:g} on {name}" for column, name in SETS.items()]
    return printed(f"{MAIN}: SDXL, {method}", holds, "FID " + ", ".join(pairs))


def still_no_mimicry() -> Claim:
    limit = claim("ssim_below", "published/claims")
    evidence = "the published tables that are known here have no SSIM, so nothing printed can contradict it"
    return Claim(
        "Published version: text",
        f"SSIM to the original's images stays below {limit:g}; the preprint says 0.55.",
        "Nothing that is known of the published version could contradict it.",
        ("17_versions", "10_every_method"),
        (Decision("published version (second-hand)", UNDECIDED, evidence),),
    )


PUBLISHED = (
    minimal_loss_of_sdxl,
    a_fifth_of_both_flux,
    ten_hours,
    half_with_recovery,
    per_step_loss,
    hand_chosen_blocks,
    still_no_mimicry,
)

CHANGES: dict[str, tuple[str, str]] = {
    "a_fifth_of_sdxl": (
        "FID rises from {sdxl:.2f} to {sdxl_pruned:.2f} on COCO; the original was evaluated anew.",
        "Table 1 supports the preprint's claim, and the published table does not. Verdicts of small models stay.",
    ),
    "a_fifth_of_flux": (
        "FLUX-dev and schnell at 20 %, with schnell's numbers of 15 %.",
        "The verdict on the preprint stays. The published claim is decided apart, as P2.",
    ),
    "no_loss": (
        '"Minimal loss" in the place of "no loss".',
        "The preprint's claim failed by its own tables; the published wording gives it up.",
    ),
    "pruned_draws_better": (
        "FID rises by {rise:.2f} at 20 %.",
        "The sign has changed: what Table 1 supports, the published table contradicts.",
    ),
    "drops_beyond_a_fifth": (
        "SDXL without recovery: {none_25:.2f} at 25 %, {none_40:.2f} at 40 %, {none_50:.2f} at 50 %.",
        "The published table agrees: FID rises by more than a tenth at each of these ratios.",
    ),
    "light_retraining": (
        "LoRA at 50 % leaves {lora_50:.2f}; training all weights leaves {full_50:.2f}.",
        "LoRA still lowers FID. The recovery that carries the published claim trains all weights, which is not light.",
    ),
    "beats_diff_pruning": (
        "DiffPruning has {diff_sdxl:.2f} on SDXL (404.87 before).",
        "The verdict stays, by a smaller distance: the baseline was rebuilt.",
    ),
    "no_mimicry": (
        "SSIM below 0.65 in the place of 0.55.",
        "The verdict on the preprint's limit stays; no SSIM of the published version is known here.",
    ),
    "end_to_end": (
        "A row with the per-step loss: FID {per_step:.2f} against {sdxl_pruned:.2f}.",
        "The published table supports the claim, which the preprint had no row for. Small models decide as before.",
    ),
    "l1_for_l0": (
        "The L0 term is given in closed form before the step to L1.",
        "The verdict on the step stays: the closed form was right, and the step from it to L1 is the same.",
    ),
    "faster": (
        "Speed-ups of 1.25, 1.49 and 8.75, which equal 1 / (1 - ratio), times 7 for schnell.",
        "The verdict stays: it rests on measured times, and the printed speed-ups follow from the ratio.",
    ),
    "hours": (
        "10 GPU-hours of an A100; Table 12 has 1.24 GPU-hours for SDXL.",
        "The verdict on Table 12 stays. The new budget is decided apart, as P3.",
    ),
}
"""For claims of the preprint: what the published version has in their place, and what that does to the verdict."""


def changes(checked: list[Claim]) -> list[dict[str, str]]:
    """A line for each of the preprint's claims that the published version changes; numbers are looked up."""
    main = {
        name: row("published/main", model=model, method=method)["coco_fid"]
        for name, model, method in (
            ("sdxl", "SDXL", "Original"),
            ("sdxl_pruned", "SDXL", "EcoDiff"),
            ("diff_sdxl", "SDXL", "DiffPruning"),
            ("per_step", "SDXL", "per-step loss"),
        )
    }
    numbers = {**main, "rise": main["sdxl_pruned"] - main["sdxl"]}
    for entry in table("published/recovery"):
        numbers[f"{entry['recovery'].lower()}_{100 * entry['ratio']:.0f}"] = entry["coco_fid"]
    lines = []
    for number, one in enumerate(checked, 1):
        if one.name in CHANGES:
            later, effect = CHANGES[one.name]
            lines.append(
                {
                    "number": str(number),
                    "claim": one.says,
                    "name": one.name,
                    "anchor": anchor(one),
                    "later": later.format(**numbers),
                    "effect": effect,
                }
            )
    return lines


def changed_recipes(model: str) -> list[Decision]:
    """Decisions on "this other recipe at a fifth loses nothing against the usual one", on a small model.

    They say which differences between two protocols can turn a small loss into a large one in this kind of network.
    """
    recipes = {
        "one threshold in each module": (("scope", "local"), ("scope", "kind")),
        "one threshold for all": (("scope", "global"), ("scope", "kind")),
        "heads only": (("kinds", "heads only"), ("kinds", "both")),
        "neurons only": (("kinds", "neurons only"), ("kinds", "both")),
        "learned from single steps": (("choices", "one step at a time"), ("choices", "corrected")),
        "learned on other prompts": (("transfer", "learned on held-out pairs"), LEARNED),
    }
    if model == DEV:
        recipes["as the authors' code learns"] = (("choices", "as the published code"), ("choices", "corrected"))
    decisions = []
    for label, (first, second) in recipes.items():
        decisions.append(kept(model, first, second, BOTH, label))
    return decisions
