"""Errata that follow from printed numbers alone: sums, comparisons, and the same quantity printed twice."""

from __future__ import annotations

import math

from ecodiff.lab.paper import claim, row, setting, table

from .shown import Erratum, Line, number


def fid_differences() -> Erratum:
    """The eight differences of FID in the text against Table 1."""
    lines = []
    for model, ratios, sign, word in (("SDXL", (0.1, 0.2), -1, "drop"), ("FLUX", (0.1, 0.15), 1, "rise")):
        base = row("table1", model=model, method="Original")
        for data in ("coco", "flickr"):
            for ratio in ratios:
                pruned = row("table1", model=model, method="EcoDiff", ratio=ratio)[f"{data}_fid"]
                published = claim(f"{model.lower()}_{data}_fid_{word}_{ratio * 100:.0f}")
                digits = {8: 0, 6.7: 1}.get(published, 2)  # as many as the paper prints of this one
                computed = sign * (pruned - base[f"{data}_fid"])
                lines.append(number(f"{model} {ratio:.0%}, {data}: FID {word}", published, computed, digits))
    return Erratum("§3.2", "Two of eight differences are not those of Table 1.", tuple(lines))


def ssim_comparison() -> Erratum:
    """SSIM 'low compared to conventional pruning methods'."""
    lines = []
    for ours in table("table1"):
        if ours["method"] != "EcoDiff":
            continue
        theirs = row("table1", model=ours["model"], ratio=ours["ratio"], method="DiffPruning")
        for data in ("coco", "flickr"):
            a, b = ours[f"{data}_ssim"], theirs[f"{data}_ssim"]
            what = f"{ours['model']} {ours['ratio']:.0%}, {data}: SSIM against DiffPruning"
            lines.append(Line(what, "lower", f"{a:g} against {b:g}", a < b))
    return Erratum("§3.2", "EcoDiff's SSIM is higher than DiffPruning's everywhere in Table 1.", tuple(lines))


def memory() -> Erratum:
    """1400 GB in GPUs, and the factor that checkpointing saves."""
    plain, gpu = claim("sdxl_plain_memory"), claim("gpu_memory")
    measured = row("table12", model="SDXL")["vram_gb"]
    given, needed = claim("sdxl_plain_h100"), math.ceil(plain / gpu)
    factor, saving = claim("memory_factor"), plain / measured
    lines = (
        Line("1400 GB in the paper's 80 GB GPUs", f"{given:.0f}", f"{plain / gpu:.1f}, so {needed}", given == needed),
        Line("saving at Table 12's 22.9 GB", f"up to {factor:.0f}", f"{saving:.1f}", saving <= factor),
    )
    text = (
        "1400 GB need 18 of the 80 GB GPUs that the paper uses (15 would do with the 94 GB of an H100 NVL); "
        "by Table 12 the saving is 61 times."
    )
    return Erratum("§1, §4", text, lines)


def hours() -> Erratum:
    """Table 12: on one GPU, hours of training are GPU-hours."""
    lines = []
    for entry in table("table12"):
        gpu_hours, training_hours = entry["gpu_hours"], entry["training_hours"]
        what = f"{entry['model']}: GPU-hours on one GPU"
        same = math.isclose(gpu_hours, training_hours)
        lines.append(Line(what, f"{gpu_hours:g}", f"{training_hours:g}", same))
    return Erratum("Table 12", "Hours of training are 1.3 to 19 times the GPU-hours of the one GPU used.", tuple(lines))


def one_cell() -> Erratum:
    """SDXL at 20 %, COCO FID: one configuration in four tables."""
    main = row("table1", model="SDXL", method="EcoDiff", ratio=0.2)["coco_fid"]
    ablation = row("table4", beta=setting("table3", "beta"))["coco_fid"]
    lines = (
        number("Table 11, global against Table 1, 20 %", row("table11", scope="global")["coco_fid"], main),
        number("Table 4, β = 0.5 against Table 1, 20 %", ablation, main),
        number("Table 5, 100 prompts against Table 1, 20 %", row("table5", size=100)["coco_fid"], main),
    )
    return Erratum("Tables 4, 5", "SDXL's default at 20 % has COCO FID 33.74 here and 34.41 in Tables 1 and 11.", lines)


def bold() -> Erratum:
    """Table 5 prints the best FID in bold."""
    marked = next(entry for entry in table("table5") if "fid" in (entry["bold"] or ""))
    best = min(table("table5"), key=lambda entry: entry["coco_fid"])
    line = Line(
        "number of prompts with the lowest FID",
        f"{marked['size']} ({marked['coco_fid']})",
        f"{best['size']} ({best['coco_fid']})",
        marked["size"] == best["size"],
    )
    return Erratum("Table 5", "The FID in bold is not the lowest.", (line,))


def data_size() -> Erratum:
    """The FLUX ablation of data size is said to show what SDXL's shows: little dependence."""
    lines = []
    for model, name in (("SDXL", "table5"), ("FLUX", "table10")):
        fids = [entry["coco_fid"] for entry in table(name)]
        spread = max(fids) / min(fids)
        lines.append(Line(f"{model}: largest FID over smallest", "about 1", f"{spread:.2f}", spread < 1.2))
    one, hundred = row("table10", size=1)["coco_fid"], row("table10", size=100)["coco_fid"]
    lines.append(Line("FLUX: FID of 1 prompt against 100", "higher", f"{one} against {hundred}", one > hundred))
    text = "FLUX does not repeat SDXL's result: 256 prompts give FID 77.48, and one beats 100, unexplained."
    return Erratum("Table 10, App. K.3", text, tuple(lines))


def beta_of_flux() -> Erratum:
    """Table 2's β against the ablation that contains the main result."""
    main = row("table1", model="FLUX", method="EcoDiff", ratio=0.15)["flickr_fid"]
    used = setting("table2", "beta")
    lines = []
    for entry in table("table9"):
        if entry["beta"] in (used, 0.001, 0.01):
            beta, fid = entry["beta"], entry["flickr_fid"]
            what = f"FLUX 15 %, Flickr FID at β = {beta:g}"
            lines.append(Line(what, f"{main} (Table 1)", f"{fid} (Table 9)", abs(fid - main) < 0.1))
    text = "Table 1's FLUX has the FID of β = 0.01 or 0.001, not of the β = 0.1 in Table 2."
    return Erratum("Table 2", text, tuple(lines))


def weights_of_sdxl() -> Erratum:
    """Table 3 is the configuration of SDXL."""
    listed = setting("table3", "pretrained_weight")
    line = Line("pretrained weights of SDXL", listed, "an SDXL checkpoint", "xl" in listed.lower())
    return Erratum("Table 3", "SDXL's configuration names the weights of Stable Diffusion 2.", (line,))


def ssim_rises() -> Erratum:
    """Reusing or removing more should leave less of the original image."""
    lines = []
    for method in ("DeepCache", "EcoDiff"):
        tenth = row("table1", model="SDXL", method=method, ratio=0.1)
        fifth = row("table1", model="SDXL", method=method, ratio=0.2)
        for data in ("coco", "flickr"):
            low, high = tenth[f"{data}_ssim"], fifth[f"{data}_ssim"]
            what = f"{method}, {data}: SSIM at 20 % against 10 %"
            lines.append(Line(what, "not higher", f"{high:g} against {low:g}", high <= low))
    text = "In Table 1, DeepCache keeps more of the original image at the larger speed-up, without a word on why."
    return Erratum("Table 1", text, tuple(lines))


def flux_at_twenty() -> Erratum:
    """'Up to 20 %' for SDXL and FLUX."""
    promised = claim("ratio_without_retraining") / 100
    largest = {
        "SDXL": max(entry["ratio"] for entry in table("table1") if entry["model"] == "SDXL"),
        "FLUX": max(entry["ratio"] for entry in table("table1") + table("table7") if "FLUX" in entry["model"]),
    }
    lines = []
    for model, ratio in largest.items():
        what = f"{model}: largest ratio in a table"
        lines.append(Line(what, f"{promised:.0%}", f"{ratio:.0%}", ratio >= promised))
    degrades = claim("flux_degrades_at") / 100
    what = "FLUX: ratio at which it degrades (Fig. 9)"
    lines.append(Line(what, f"above {promised:.0%}", f"{degrades:.0%}", degrades > promised))
    text = "No table has FLUX beyond 15 %, and Figure 9 says that it degrades at 20 %."
    return Erratum("Abstract, §1, §4", text, tuple(lines))


def without_loss() -> Erratum:
    """'Up to 20 % of model parameters without performance loss': FID at the largest ratio of each model."""
    lines = []
    for name, model, ratio in (("table1", "SDXL", 0.2), ("table1", "FLUX", 0.15), ("table6", "SD2", 0.2)):
        original = row(name, model=model, method="Original", ratio=0.0)
        pruned = row(name, model=model, method="EcoDiff", ratio=ratio)
        coco, flickr = (pruned[column] - original[column] for column in ("coco_fid", "flickr_fid"))
        what = f"{model} {ratio:.0%}: change of FID, coco and flickr"
        lines.append(Line(what, "no loss", f"{coco:+.2f} and {flickr:+.2f}", max(coco, flickr) <= 0))
    return Erratum("§4", "By FID, FLUX and SD2 lose on both sets; SDXL does not.", tuple(lines))


def table_of_retraining() -> Erratum:
    """App. J names Table 7 for ratios beyond 20 %."""
    beyond = claim("quality_drops_beyond") / 100
    lines = []
    for name in ("table7", "table8"):
        most = max(entry["ratio"] for entry in table(name))
        lines.append(Line(f"{name}: largest ratio", f"above {beyond:.0%}", f"{most:.0%}", most > beyond))
    return Erratum("App. J", "The table that shows ratios beyond 20 % is Table 8, not Table 7.", tuple(lines))


ARITHMETIC = (
    fid_differences,
    ssim_comparison,
    memory,
    hours,
    one_cell,
    bold,
    data_size,
    beta_of_flux,
    weights_of_sdxl,
    ssim_rises,
    flux_at_twenty,
    without_loss,
    table_of_retraining,
)
