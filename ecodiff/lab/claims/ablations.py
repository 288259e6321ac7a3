"""Claims of the ablations: what the result depends on (App. G.2, K)."""

from __future__ import annotations

from ecodiff.lab.paper import row, table

from .on_embedded import BOTH, DEV, FLUX, LEARNED, ORIGINAL, SCHNELL, SDXL, better, kept, on, real
from .rules import Claim, printed, together


def middle_beta() -> Claim:
    def beats_ends(model: str):
        middle, ends = ("beta", "β = 2"), (("beta", "β = 0.5"), ("beta", "β = 8"))
        return together([better(model, middle, end) for end in ends], on(model))

    def best_of(name: str, column: str) -> tuple[bool, str]:
        entries = table(name)
        best = min(entries, key=lambda entry: entry[column])
        shown = f"lowest FID at β = {best['beta']:g}, tried {entries[0]['beta']:g} to {entries[-1]['beta']:g}"
        return best not in (entries[0], entries[-1]), shown

    return Claim(
        "App. G.2, K.3, Tables 4, 9",
        "β has a best value in the middle, such as 0.5; a much larger one fails, and FLUX behaves alike.",
        "Tables: the lowest FID is at neither end. On small models, whose loss has another scale: β = 2 in every "
        "update is better than 0.5 and than 8.",
        ("12_settings",),
        (
            printed("Table 4, SDXL", *best_of("table4", "coco_fid")),
            printed("Table 9, FLUX", *best_of("table9", "flickr_fid")),
            *(beats_ends(model) for model in (SDXL, SCHNELL)),
            real(SDXL, "beta", beats_ends),
        ),
    )


def a_hundred_prompts() -> Claim:
    def fewer_prompts(model: str, few: int, many: int):
        places = (("data_size", f"{number} prompts") for number in (few, many))
        return kept(model, *places, BOTH, f"{few} against {many}")

    def by_table(name: str, model: str, column: str):
        fid = {entry["size"]: entry[column] for entry in table(name)}
        rise = {size: fid[size] / fid[512] - 1 for size in (1, 100)}
        shown = ", ".join(f"{share:+.1%} with {size}" for size, share in rise.items())
        return printed(f"{name.replace('table', 'Table ')}, {model}", max(rise.values()) < 0.1, f"FID {shown}")

    return Claim(
        "App. G.2, K.3, Tables 5, 10",
        "A hundred prompts suffice for learning; even a single one costs little, for SDXL and for FLUX.",
        "Tables: FID with 1 and with 100 prompts within a tenth of that with 512. On small models: SSIM and right "
        "images are kept, against more prompts.",
        ("12_settings", "15_errata"),
        (
            by_table("table5", "SDXL", "coco_fid"),
            by_table("table10", "FLUX", "coco_fid"),
            *(fewer_prompts(model, few, many) for model in (SDXL, SCHNELL) for few, many in ((100, 512), (1, 100))),
            real(SDXL, "data_size", lambda model: fewer_prompts(model, 100, 512)),
        ),
    )


def any_prompts() -> Claim:
    return Claim(
        "App. G.2",
        "Which units are not needed hardly depends on the data.",
        "Masks learned on captions of held-out pairs of objects, minus those learned on the usual ones: SSIM and right "
        "images are kept.",
        ("12_settings",),
        tuple(kept(model, ("transfer", "learned on held-out pairs"), LEARNED, BOTH) for model in FLUX),
    )


def one_threshold() -> Claim:
    wide, narrow = (row("table11", scope=scope) for scope in ("global", "local"))
    fid = [(wide[c], narrow[c]) for c in ("coco_fid", "flickr_fid")]
    shown = ", ".join(f"{a:g} against {b:g}" for a, b in fid)
    return Claim(
        "App. K.2, Table 11, Fig. 12",
        "One threshold for all modules is better than one in each.",
        "Table 11: lower FID. On small models: one threshold a kind (the published code's global), and one for all, "
        "each better than one a module.",
        ("12_settings",),
        (
            printed("Table 11", all(a < b for a, b in fid), f"FID {shown}"),
            *(
                better(model, ("scope", scope), ("scope", "local"), label=words)
                for model in (SDXL, DEV)
                for scope, words in (("kind", "one a kind"), ("global", "one for all"))
            ),
            real(SDXL, "scope", lambda model: better(model, ("scope", "kind"), ("scope", "local"))),
        ),
    )


def one_kind_alone() -> Claim:
    def either_way(model: str):
        return [kept(model, ("kinds", name), ORIGINAL, label=name) for name in ("heads only", "neurons only")]

    return Claim(
        "App. K.1, Fig. 13",
        "Heads alone or neurons alone can be pruned, and pictures stay good either way.",
        "Right images at a fifth of the heads, and at a fifth of the neurons, minus the original's: above minus the "
        "smallest effect.",
        ("12_settings",),
        (
            *(decision for model in (SDXL, DEV) for decision in either_way(model)),
            real(SDXL, "kinds", lambda model: together(either_way(model), on(model))),
        ),
    )


def one_mask_for_all_ratios() -> Claim:
    modules = table("sdxl_lambda")
    nested = all(m["kept_20"] <= m["kept_10"] <= m["units"] for m in modules)
    gone = [sum(m["units"] - m[f"kept_{percent}"] for m in modules) for percent in (10, 20)]
    return Claim(
        "App. G.2, Fig. 7",
        "One learning gives masks of every ratio: only the threshold changes.",
        "The authors' published λ of SDXL, cut at 10 and 20 %: no module keeps more at 20 % than at 10 %.",
        ("05_a_smaller_model", "07_what_it_costs"),
        (printed("published λ of SDXL", nested, f"{len(modules)} modules; {gone[0]:,} and {gone[1]:,} units go"),),
    )


ABLATIONS = (middle_beta, a_hundred_prompts, any_prompts, one_threshold, one_kind_alone, one_mask_for_all_ratios)
