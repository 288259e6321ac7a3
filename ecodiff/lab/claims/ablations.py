"""Claims of the ablations: what the result depends on (App. G.2, K)."""

from __future__ import annotations

from functools import partial

from ecodiff.lab.paper import row, table

from .on_embedded import BOTH, DEV, FLUX, LEARNED, ORIGINAL, SCHNELL, SDXL, better, kept, on, real
from .rules import Claim, Decision, printed, together


def middle_beta() -> Claim:
    return Claim(
        "App. G.2, K.3, Tables 4, 9",
        "β has a best value in the middle, such as 0.5; a much larger one fails, and FLUX behaves alike.",
        "Tables: the lowest FID is at neither end. On small models, whose loss has another scale: β = 2 in every "
        "update is better than 0.5 and than 8.",
        ("11_settings",),
        (
            printed("Table 4, SDXL", *_lowest_in_the_middle("table4", "coco_fid")),
            printed("Table 9, FLUX", *_lowest_in_the_middle("table9", "flickr_fid")),
            _middle_beats_ends(SDXL),
            _middle_beats_ends(SCHNELL),
            real(SDXL, "beta", _middle_beats_ends),
        ),
    )


def _lowest_in_the_middle(name: str, column: str) -> tuple[bool, str]:
    """Whether the lowest FID of a table, whose rows are in the order of β, is at neither end."""
    entries = table(name)
    fids = [entry[column] for entry in entries]
    best = fids.index(min(fids))
    betas = [entry["beta"] for entry in entries]
    evidence = f"lowest FID at β = {betas[best]:g}, tried {betas[0]:g} to {betas[-1]:g}"
    return 0 < best < len(entries) - 1, evidence


def _middle_beats_ends(model: str) -> Decision:
    middle = ("beta", "β = 2")
    decisions = [better(model, middle, ("beta", "β = 0.5")), better(model, middle, ("beta", "β = 8"))]
    return together(decisions, on(model))


def a_hundred_prompts() -> Claim:
    return Claim(
        "App. G.2, K.3, Tables 5, 10",
        "A hundred prompts suffice for learning; even a single one costs little, for SDXL and for FLUX.",
        "Tables: FID with 1 and with 100 prompts within a tenth of that with 512. On small models: SSIM and right "
        "images are kept, against more prompts.",
        ("11_settings", "16_errata"),
        (
            _fid_with_fewer("table5", "SDXL"),
            _fid_with_fewer("table10", "FLUX"),
            _fewer_prompts(SDXL, few=100, many=512),
            _fewer_prompts(SDXL, few=1, many=100),
            _fewer_prompts(SCHNELL, few=100, many=512),
            _fewer_prompts(SCHNELL, few=1, many=100),
            real(SDXL, "data_size", partial(_fewer_prompts, few=100, many=512)),
        ),
    )


def _fid_with_fewer(name: str, model: str) -> Decision:
    fid = {entry["size"]: entry["coco_fid"] for entry in table(name)}
    one, hundred = fid[1] / fid[512] - 1, fid[100] / fid[512] - 1
    evidence = f"FID {one:+.1%} with 1, {hundred:+.1%} with 100"
    return printed(f"{name.replace('table', 'Table ')}, {model}", max(one, hundred) < 0.1, evidence)


def _fewer_prompts(model: str, few: int, many: int) -> Decision:
    places = ("data_size", f"{few} prompts"), ("data_size", f"{many} prompts")
    return kept(model, *places, BOTH, f"{few} against {many}")


def any_prompts() -> Claim:
    return Claim(
        "App. G.2",
        "Which units are not needed hardly depends on the data.",
        "Masks learned on captions of held-out pairs of objects, minus those learned on the usual ones: SSIM and right "
        "images are kept.",
        ("11_settings",),
        tuple(kept(model, ("transfer", "learned on held-out pairs"), LEARNED, BOTH) for model in FLUX),
    )


def one_threshold() -> Claim:
    wide, narrow = row("table11", scope="global"), row("table11", scope="local")
    fids = [(wide["coco_fid"], narrow["coco_fid"]), (wide["flickr_fid"], narrow["flickr_fid"])]
    evidence = "FID " + ", ".join(f"{ours:g} against {theirs:g}" for ours, theirs in fids)
    one_a_kind = partial(better, first=("scope", "kind"), second=("scope", "local"))
    one_for_all = partial(better, first=("scope", "global"), second=("scope", "local"))
    return Claim(
        "App. K.2, Table 11, Fig. 12",
        "One threshold for all modules is better than one in each.",
        "Table 11: lower FID. On small models: one threshold a kind (the published code's global), and one for all, "
        "each better than one per module.",
        ("11_settings",),
        (
            printed("Table 11", all(ours < theirs for ours, theirs in fids), evidence),
            one_a_kind(SDXL, label="one a kind"),
            one_for_all(SDXL, label="one for all"),
            one_a_kind(DEV, label="one a kind"),
            one_for_all(DEV, label="one for all"),
            real(SDXL, "scope", one_a_kind),
        ),
    )


def one_kind_alone() -> Claim:
    return Claim(
        "App. K.1, Fig. 13",
        "Heads alone or neurons alone can be pruned, and images stay good either way.",
        "Right images at a fifth of the heads, and at a fifth of the neurons, minus the original's: above minus the "
        "smallest effect.",
        ("11_settings",),
        (
            *_either_way(SDXL),
            *_either_way(DEV),
            real(SDXL, "kinds", _both_ways),
        ),
    )


def _either_way(model: str) -> list[Decision]:
    return [kept(model, ("kinds", name), ORIGINAL, label=name) for name in ("heads only", "neurons only")]


def _both_ways(model: str) -> Decision:
    return together(_either_way(model), on(model))


def one_mask_for_all_ratios() -> Claim:
    modules = table("sdxl_lambda")
    nested = all(module["kept_20"] <= module["kept_10"] <= module["units"] for module in modules)
    gone_10 = sum(module["units"] - module["kept_10"] for module in modules)
    gone_20 = sum(module["units"] - module["kept_20"] for module in modules)
    evidence = f"{len(modules)} modules; {gone_10:,} and {gone_20:,} units go"
    return Claim(
        "App. G.2, Fig. 7",
        "One learning gives masks of every ratio: only the threshold changes.",
        "The authors' published λ of SDXL, cut at 10 and 20 %: no module keeps more at 20 % than at 10 %.",
        ("07_a_smaller_model", "13_what_it_costs"),
        (printed("published λ of SDXL", nested, evidence),),
    )


ABLATIONS = (middle_beta, a_hundred_prompts, any_prompts, one_threshold, one_kind_alone, one_mask_for_all_ratios)
