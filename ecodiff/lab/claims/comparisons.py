"""Claims that compare with other methods, or combine with them (§3.2, App. I.2, J)."""

from __future__ import annotations

from functools import partial

from ecodiff.lab.errata import arithmetic
from ecodiff.lab.paper import claim, row, table
from ecodiff.lab.studies.plan import METHODS
from ecodiff.metrics.intervals import difference, nested_interval

from . import on_embedded, rules
from .on_embedded import BOTH, DEV, EQUAL, FAMILY, LEARNED, SD2, SDXL, better, kept, real
from .results import PAIRS, PAIRS_ORIGINAL, SETS
from .rules import NOT_REPRODUCED, REPRODUCED, UNDECIDED, Claim, Decision, contradicted, printed

DIFF_PRUNING = "diff-pruning"
EARLIER = tuple(method for method in METHODS if method not in ("learned", "gauss-newton"))  # those known elsewhere


def published() -> list[dict]:
    """Rows of Table 1 that are the paper's method."""
    return [entry for entry in table("table1") if entry["method"] == "EcoDiff"]


def beats_diff_pruning() -> Claim:
    cells = []
    for ours in published():
        theirs = row("table1", model=ours["model"], ratio=ours["ratio"], method="DiffPruning")
        cells += [ours[column] < theirs[column] for column in SETS]
    lower = f"FID is lower in {sum(cells)} of {len(cells)} cells"
    equal_parameters = partial(
        better, first=EQUAL, second=("parameters", f"{DIFF_PRUNING}, 20%"), label="equal parameters"
    )
    return Claim(
        "§3.2, Table 1, Fig. 6",
        "At equal ratio it is better than Diff-Pruning by most FIDs.",
        "Table 1: lower in more than half of the cells. On small models against Diff-Pruning's criterion for heads and "
        "neurons: more SSIM or more right images, less of neither, at a fifth of the units and of their parameters.",
        ("10_every_method",),
        (
            printed("Table 1", sum(cells) > len(cells) / 2, lower),
            *(_against_diff_pruning(model) for model in FAMILY),
            equal_parameters(SDXL),
            equal_parameters(DEV),
            real(SDXL, "main", _against_diff_pruning),
        ),
    )


def _against_diff_pruning(model: str) -> Decision:
    return better(model, LEARNED, ("main", f"{DIFF_PRUNING}, 20%"))


def best_of_all() -> Claim:
    return Claim(
        "§1, §4",
        "It improves on all earlier pruning of diffusion models and sets a new standard.",
        f"On small models better, by the same rule, than each other score: {', '.join(EARLIER)}; at a fifth of the "
        "units and of their parameters.",
        ("10_every_method",),
        (
            _against_all(SDXL),
            _against_all(DEV),
            _against_all(SDXL, EQUAL, "equal parameters"),
            _against_all(DEV, EQUAL, "equal parameters"),
            real(SDXL, "main", _against_all),
        ),
    )


def _against_all(model: str, ours: on_embedded.Place = LEARNED, label: str = "") -> Decision:
    """The decision on "learned masks are better than each earlier method", in the study of ``ours``."""
    study, _ = ours
    decisions = [better(model, ours, (study, f"{method}, 20%")) for method in EARLIER]
    return rules.together(decisions, on_embedded.on(model, label))


def no_mimicry() -> Claim:
    entries, limit = published(), claim("ssim_below")
    ssim = [entry["coco_ssim"] for entry in entries] + [entry["flickr_ssim"] for entry in entries]
    evidence = f"SSIM from {min(ssim):g} to {max(ssim):g}, below {limit:g}"
    return Claim(
        "§3.2, Table 1",
        "Pruned models generate good images unlike the original's: SSIM stays below 0.55, lower than Diff-Pruning's.",
        "Both statements against Table 1; on the small model the interval of SSIM at 20 % lies below 0.55.",
        ("10_every_method", "16_errata"),
        (
            printed("Table 1", max(ssim) < limit, evidence),
            contradicted(arithmetic.ssim_comparison()),
            _ssim_below(SDXL, limit),
        ),
    )


def _ssim_below(model: str, limit: float) -> Decision:
    values = on_embedded.recorded(model, LEARNED)
    if not values:
        return on_embedded.missing(model, "main")
    ssim = nested_interval([row["ssim"] for (row,) in values])
    verdict = UNDECIDED
    if ssim.high < limit:
        verdict = REPRODUCED
    elif ssim.low > limit:
        verdict = NOT_REPRODUCED
    evidence = f"SSIM {ssim.mean:.3f} ({ssim.low:.3f} to {ssim.high:.3f}); {on_embedded.number_of(values)}"
    return Decision(on_embedded.on(model), verdict, evidence)


def semantics() -> Claim:
    against = partial(better, first=PAIRS, second=("pairs", f"{DIFF_PRUNING}, 20%"), measures=("quality",))
    return Claim(
        "§3.2, Fig. 6",
        "Its images show what the prompt says more often than those of other methods.",
        "Two objects in pairs never seen, learned minus Diff-Pruning's criterion: images with all facts right by the "
        "judge (SSIM where there is no judge).",
        ("10_every_method",),
        (*(against(model) for model in (SDXL, SD2, DEV)), real(SDXL, "pairs", against)),
    )


def mends_semantics() -> Claim:
    return Claim(
        "§3.2, App. G.2, Fig. 7",
        "Pruning sometimes mends an image that the original got wrong, and may improve semantics.",
        "Two objects, 10 %: images that were wrong and are right, less those that were right and are wrong: above "
        "zero?",
        ("10_every_method",),
        (_mended(SDXL), _mended(DEV), real(SDXL, "pairs", _mended)),
    )


def _mended(model: str) -> Decision:
    places = ("pairs", "learned, 10%"), PAIRS_ORIGINAL
    values = on_embedded.recorded(model, *places)
    measure = on_embedded.quality(values)
    if not values or measure == "ssim":  # SSIM does not say which images are right
        return on_embedded.missing(model, "pairs")
    after = [pruned[measure] for pruned, _ in values]
    before = [original[measure] for _, original in values]
    mended = spoiled = 0
    for hits, hits_before in zip(after, before, strict=True):
        for hit, hit_before in zip(hits, hits_before, strict=True):
            mended += hit > hit_before
            spoiled += hit < hit_before
    d = difference(after, before)
    evidence = f"{mended} mended, {spoiled} spoiled; {on_embedded.in_words({measure: d}, values)}"
    fields = on_embedded.varied(model, *places)
    return Decision(on_embedded.on(model), rules.better([d]), evidence, varies=fields)


def with_deepcache() -> Claim:
    places = ("main", "learned+deepcache, 20%"), ("main", "deepcache")
    combined = partial(kept, first=places[0], second=places[1], measures=BOTH)
    return Claim(
        "App. I.2, Fig. 10",
        "It can be combined with feature reuse by DeepCache.",
        "On small models: mask and reuse together, minus reuse alone, keep SSIM and right images.",
        ("12_after_pruning", "10_every_method"),
        (combined(SDXL), combined(SD2), real(SDXL, "main", combined)),
    )


def light_retraining() -> Claim:
    fids = []
    for ratio in (0.25, 0.3):
        before = row("table8", ratio=ratio, retrained="no")
        after = row("table8", ratio=ratio, retrained="yes")
        fids += [(before[column], after[column]) for column in SETS]
    falls = all(after < before for before, after in fids)
    evidence = "FID " + ", ".join(f"{before:g} to {after:g}" for before, after in fids)
    return Claim(
        "App. J, Table 8, Fig. 11",
        "Retraining with LoRA on a hundred images of the original wins back much of what 25 and 30 % cost.",
        "Table 8: FID falls in all cells. On small models: retrained minus not retrained, paired, at equal ratio.",
        ("12_after_pruning", "07_a_smaller_model"),
        (
            printed("Table 8", falls, evidence),
            _retrained(SDXL, ratio=30),
            _retrained(SDXL, ratio=50),
            _retrained(DEV, ratio=30),
            _retrained(DEV, ratio=50),
            real(SDXL, "retraining", partial(_retrained, ratio=30)),
        ),
    )


def _retrained(model: str, ratio: int) -> Decision:
    before = f"learned, {ratio}%"
    return better(model, ("retraining", f"{before}, LoRA"), ("retraining", before), label=f"{ratio} %")


COMPARISONS = (
    beats_diff_pruning,
    best_of_all,
    no_mimicry,
    semantics,
    mends_semantics,
    with_deepcache,
    light_retraining,
)
