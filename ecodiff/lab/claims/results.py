"""Claims about what can go without retraining, how much, and from which models (§3.2, App. G.2, H, I.1, J, M)."""

from __future__ import annotations

from functools import partial

from ecodiff.lab.errata import arithmetic
from ecodiff.lab.paper import row

from .on_embedded import DEV, FLUX, LEARNED, ORIGINAL, SCHNELL, SD2, SDXL, better, kept, lower_fid, real
from .rules import Claim, Decision, contradicted, printed

TENTH = ("main", "learned, 10%")
PAIRS, PAIRS_ORIGINAL = ("pairs", "learned, 20%"), ("pairs", "original")
SETS = {"coco_fid": "COCO", "flickr_fid": "Flickr"}
SMALL = 0.1
"""A rise of FID by less than this share of the original's is called slight."""


def fid_rises(name: str, model: str, ratio: float, limit: float, **more) -> Decision:
    """The decision by a table of the paper on "FID rises by less than ``limit`` of the original's, on both sets"."""
    original = row(name, model=model, method="Original")
    pruned = row(name, model=model, method="EcoDiff", ratio=ratio, **more)
    rises, evidence = rises_of_fid(original, pruned)
    return printed(f"Table {name.removeprefix('table')}: {model} at {ratio:.0%}", max(rises) < limit, evidence)


def rises_of_fid(original: dict, pruned: dict) -> tuple[list[float], str]:
    """By which shares of the original's the FID of each set rises, and the same as a text."""
    rises = [pruned[column] / original[column] - 1 for column in SETS]
    parts = [f"{rise:+.1%} on {name}" for rise, name in zip(rises, SETS.values(), strict=True)]
    return rises, f"FID {', '.join(parts)}"


def fifth_kept(model: str) -> Decision:
    """The decision on "a fifth of this model's units goes without loss"."""
    return kept(model, LEARNED, ORIGINAL)


def a_fifth_of_sdxl() -> Claim:
    return Claim(
        "Abstract, §1, §4, Table 1, Fig. 1",
        "A fifth of SDXL can go without retraining, with hardly any loss that one sees.",
        "Table 1: FID does not rise. On the small model: right images, learned mask minus original, above minus the "
        "smallest effect.",
        ("10_every_method", "07_a_smaller_model"),
        (
            fid_rises("table1", "SDXL", 0.2, 0.0),
            kept(SDXL, LEARNED, ORIGINAL, label="one object"),
            kept(SDXL, PAIRS, PAIRS_ORIGINAL, label="two objects"),
            real(SDXL, "main", fifth_kept),
        ),
    )


def a_fifth_of_flux() -> Claim:
    return Claim(
        "Abstract, §1, §3.2, Table 1",
        "Up to a fifth of FLUX can go without retraining; at 10 and 15 % FID rises only slightly.",
        "Is FLUX at 20 % in a table, and is every rise at 10 and 15 % slight (below a tenth)? On the small models as "
        "for SDXL.",
        ("10_every_method", "16_errata"),
        (
            contradicted(arithmetic.flux_at_twenty()),
            fid_rises("table1", "FLUX", 0.1, SMALL),
            fid_rises("table1", "FLUX", 0.15, SMALL),
            *(kept(model, LEARNED, ORIGINAL, label="one object") for model in FLUX),
            *(kept(model, PAIRS, PAIRS_ORIGINAL, label="two objects") for model in FLUX),
            real(SCHNELL, "main", fifth_kept),
        ),
    )


def no_loss() -> Claim:
    return Claim(
        "§4",
        "Nothing at all is lost at a fifth, on any model.",
        "No FID of Tables 1 and 6 rises at the largest ratio of each model.",
        ("16_errata",),
        (contradicted(arithmetic.without_loss()),),
    )


def pruned_draws_better() -> Claim:
    return Claim(
        "§3.2, Table 1",
        "SDXL's FID falls when it is pruned: the smaller model generates better images.",
        "Table 1: FID falls at 10 and 20 % on both sets. On the small model: difference of FID over seeds, below zero.",
        ("10_every_method",),
        (
            *(fid_rises("table1", "SDXL", ratio, 0.0) for ratio in (0.1, 0.2)),
            lower_fid(SDXL, TENTH, ORIGINAL, "10 %"),
            lower_fid(SDXL, LEARNED, ORIGINAL, "20 %"),
            real(SDXL, "main", partial(lower_fid, first=LEARNED, second=ORIGINAL)),
        ),
    )


def where_it_ends() -> Claim:
    least, tenth = ("ratios", "learned, 5%"), ("ratios", "learned, 10%")
    fifth, third = ("ratios", "learned, 20%"), ("ratios", "learned, 30%")
    return Claim(
        "App. G.2, M, Fig. 7, 9, 14, 15",
        "Quality holds up to a fifth and falls beyond: at 25 % for SDXL, at 20 % for FLUX.",
        "64 prompts: right images at 20 % (FLUX 10 %) minus those at 5 % above minus the smallest effect (holds); "
        "more at 5 % than at 30 % (FLUX 20 %; falls).",
        ("07_a_smaller_model",),
        (
            kept(SDXL, fifth, least, label="holds at 20 %"),
            better(SDXL, least, third, ("quality",), "falls at 30 %"),
            kept(DEV, tenth, least, label="holds at 10 %"),
            better(DEV, least, fifth, ("quality",), "falls at 20 %"),
            real(SDXL, "ratios", partial(kept, first=fifth, second=least)),
            real(SCHNELL, "ratios", partial(kept, first=tenth, second=least)),
        ),
    )


def drops_beyond_a_fifth() -> Claim:
    original = row("table8", ratio=0, method="Original")
    decisions = []
    for ratio in (0.25, 0.3):
        rises, evidence = rises_of_fid(original, row("table8", ratio=ratio, retrained="no"))
        decisions.append(printed(f"Table 8: SDXL at {ratio:.0%}", min(rises) > SMALL, evidence))
    return Claim(
        "App. J, Table 8",
        "Beyond a fifth, quality falls clearly unless the model is retrained.",
        "Table 8: without retraining FID rises by more than a tenth on both sets.",
        ("12_after_pruning", "07_a_smaller_model"),
        tuple(decisions),
    )


def distilled() -> Claim:
    return Claim(
        "Abstract, §1, App. I.1, Table 7",
        "A model distilled to a few steps can still be pruned.",
        "Table 7: FID of FLUX-schnell rises only slightly (by less than a tenth) at 10 and 15 %. On the small "
        "distilled model: right images, learned mask minus original, above minus the smallest effect.",
        ("12_after_pruning", "10_every_method"),
        (
            *(fid_rises("table7", "FLUX Schnell", ratio, SMALL) for ratio in (0.1, 0.15)),
            kept(SCHNELL, TENTH, ORIGINAL, label="10 %"),
            kept(SCHNELL, LEARNED, ORIGINAL, label="20 %"),
            real(SCHNELL, "main", fifth_kept),
        ),
    )


def stable_diffusion_2() -> Claim:
    return Claim(
        "App. H, Table 6",
        "Stable Diffusion 2 can be pruned in the same way, with nearly the same quality.",
        "Table 6: every rise of FID is slight (below a tenth). On the small model: right images above minus the "
        "smallest effect.",
        ("12_after_pruning", "10_every_method"),
        (
            *(fid_rises("table6", "SD2", ratio, SMALL) for ratio in (0.1, 0.2)),
            kept(SD2, TENTH, ORIGINAL, label="10 %"),
            kept(SD2, LEARNED, ORIGINAL, label="20 %"),
            real(SD2, "main", fifth_kept),
        ),
    )


RESULTS = (
    a_fifth_of_sdxl,
    a_fifth_of_flux,
    no_loss,
    pruned_draws_better,
    where_it_ends,
    drops_beyond_a_fifth,
    distilled,
    stable_diffusion_2,
)
