"""Claims that compare with other methods, or combine with them (§3.2, App. I.2, J)."""

from __future__ import annotations

from ecodiff.lab.errata import arithmetic
from ecodiff.lab.paper import claim, row, table
from ecodiff.lab.studies.plan import METHODS
from ecodiff.metrics.intervals import difference, nested_interval

from . import on_embedded, rules
from .on_embedded import DEV, EQUAL, FAMILY, LEARNED, SD2, SDXL, better, kept, real
from .results import PAIRS, PAIRS_ORIGINAL, SETS
from .rules import NOT_REPRODUCED, REPRODUCED, UNDECIDED, Claim, Decision, contradicted, printed

DIFF_PRUNING = "diff-pruning"
EARLIER = tuple(method for method in METHODS if method not in ("learned", "gauss-newton"))  # those known elsewhere


def published() -> list[dict]:
    """Rows of Table 1 that are the paper's method."""
    return [entry for entry in table("table1") if entry["method"] == "EcoDiff"]


def beats_diff_pruning() -> Claim:
    def against(model: str) -> Decision:
        return better(model, LEARNED, ("main", f"{DIFF_PRUNING}, 20%"))

    def at_equal_parameters(model: str) -> Decision:
        return better(model, EQUAL, (EQUAL[0], f"{DIFF_PRUNING}, 20%"), label="equal parameters")

    cells = []
    for ours in published():
        theirs = row("table1", model=ours["model"], ratio=ours["ratio"], method="DiffPruning")
        cells += [ours[column] < theirs[column] for column in SETS]
    return Claim(
        "§3.2, Table 1, Fig. 6",
        "At equal ratio it is better than Diff-Pruning by most FIDs.",
        "Table 1: lower in more than half of the cells. On small models against Diff-Pruning's criterion for heads and "
        "neurons: more SSIM or more right images, less of neither, at a fifth of the units and of their parameters.",
        ("11_every_method",),
        (
            printed("Table 1", sum(cells) > len(cells) / 2, f"FID is lower in {sum(cells)} of {len(cells)} cells"),
            *(against(model) for model in FAMILY),
            *(at_equal_parameters(model) for model in (SDXL, DEV)),
            real(SDXL, "main", against),
        ),
    )


def best_of_all() -> Claim:
    def against_all(model: str, ours: on_embedded.Place = LEARNED, label: str = "") -> Decision:
        study, _ = ours
        rivals = [better(model, ours, (study, f"{method}, 20%")) for method in EARLIER]
        return rules.together(rivals, on_embedded.on(model, label))

    return Claim(
        "§1, §4",
        "It improves on all earlier pruning of diffusion models and sets a new standard.",
        f"On small models better, by the same rule, than each other score: {', '.join(EARLIER)}; at a fifth of the "
        "units and of their parameters.",
        ("11_every_method",),
        (
            *(against_all(model) for model in (SDXL, DEV)),
            *(against_all(model, EQUAL, "equal parameters") for model in (SDXL, DEV)),
            real(SDXL, "main", against_all),
        ),
    )


def no_mimicry() -> Claim:
    ours = [entry[column] for entry in published() for column in ("coco_ssim", "flickr_ssim")]
    limit = claim("ssim_below")
    return Claim(
        "§3.2, Table 1",
        "Pruned models draw well without imitating the original: SSIM stays below 0.55, lower than Diff-Pruning's.",
        "Both statements against Table 1; on the small model the interval of SSIM at 20 % lies below 0.55.",
        ("11_every_method", "15_errata"),
        (
            printed("Table 1", max(ours) < limit, f"SSIM from {min(ours):g} to {max(ours):g}, below {limit:g}"),
            contradicted(arithmetic.ssim_comparison()),
            _ssim_below(SDXL, limit),
        ),
    )


def _ssim_below(model: str, limit: float) -> Decision:
    values = on_embedded.recorded(model, LEARNED)
    if not values:
        return on_embedded.missing(model, "main")
    i = nested_interval([seed["ssim"] for (seed,) in values])
    outcome = REPRODUCED if i.high < limit else NOT_REPRODUCED if i.low > limit else UNDECIDED
    evidence = f"SSIM {i.mean:.3f} ({i.low:.3f} to {i.high:.3f}); {on_embedded.number_of(values)}"
    return Decision(on_embedded.on(model), outcome, evidence)


def semantics() -> Claim:
    def against(model: str) -> Decision:
        return better(model, PAIRS, ("pairs", f"{DIFF_PRUNING}, 20%"), ("quality",))

    return Claim(
        "§3.2, Fig. 6",
        "Its pictures show what the caption says more often than those of other methods.",
        "Two objects in pairs never seen, learned minus Diff-Pruning's criterion: images with all facts right by the "
        "judge (SSIM where there is no judge).",
        ("11_every_method",),
        (*(against(model) for model in (SDXL, SD2, DEV)), real(SDXL, "pairs", against)),
    )


def mends_semantics() -> Claim:
    return Claim(
        "§3.2, App. G.2, Fig. 7",
        "Pruning sometimes mends a picture that the original got wrong, and may improve semantics.",
        "Two objects, 10 %: pictures that were wrong and are right, less those that were right and are wrong: above "
        "zero?",
        ("11_every_method",),
        (*(_mended(model) for model in (SDXL, DEV)), real(SDXL, "pairs", _mended)),
    )


def _mended(model: str) -> Decision:
    values = on_embedded.recorded(model, ("pairs", "learned, 10%"), PAIRS_ORIGINAL)
    if not values or (measure := on_embedded.quality(values)) == "ssim":
        return on_embedded.missing(model, "pairs")
    after, before = ([seed[i][measure] for seed in values] for i in (0, 1))
    flips = [a - b for xs, ys in zip(after, before, strict=True) for a, b in zip(xs, ys, strict=True)]
    d = difference(after, before)
    evidence = f"{flips.count(1)} mended, {flips.count(-1)} spoiled; {on_embedded.told({measure: d}, values)}"
    differs = on_embedded.varied(model, ("pairs", "learned, 10%"), PAIRS_ORIGINAL)
    return Decision(on_embedded.on(model), rules.better([d]), evidence, varies=differs)


def with_deepcache() -> Claim:
    def combined(model: str) -> Decision:
        return kept(model, ("main", "learned+deepcache, 20%"), ("main", "deepcache"), on_embedded.BOTH)

    return Claim(
        "App. I.2, Fig. 10",
        "It can be combined with feature reuse by DeepCache.",
        "On small models: mask and reuse together, minus reuse alone, keep SSIM and right images.",
        ("13_after_pruning", "11_every_method"),
        (*(combined(model) for model in (SDXL, SD2)), real(SDXL, "main", combined)),
    )


def light_retraining() -> Claim:
    no, yes = ([row("table8", ratio=ratio, retrained=word) for ratio in (0.25, 0.3)] for word in ("no", "yes"))
    fids = [(before[column], after[column]) for before, after in zip(no, yes, strict=True) for column in SETS]
    shown = ", ".join(f"{before:g} to {after:g}" for before, after in fids)
    return Claim(
        "App. J, Table 8, Fig. 11",
        "Retraining with LoRA on a hundred pictures of the original wins back much of what 25 and 30 % cost.",
        "Table 8: FID falls in all cells. On small models: retrained minus not retrained, paired, at equal ratio.",
        ("13_after_pruning", "05_a_smaller_model"),
        (
            printed("Table 8", all(after < before for before, after in fids), f"FID {shown}"),
            *(_retrained(model, ratio) for model in (SDXL, DEV) for ratio in (30, 50)),
            real(SDXL, "retraining", lambda model: _retrained(model, 30)),
        ),
    )


def _retrained(model: str, ratio: int) -> Decision:
    places = (("retraining", f"learned, {ratio}%{how}") for how in (", LoRA", ""))
    return better(model, *places, label=f"{ratio} %")


COMPARISONS = (
    beats_diff_pruning,
    best_of_all,
    no_mimicry,
    semantics,
    mends_semantics,
    with_deepcache,
    light_retraining,
)
