"""What does not fit between the preprint and the published version, or inside the latter: arithmetic on both.

The numbers of the published version are second-hand (``ecodiff.lab.paper``), and each place says so.
"""

from __future__ import annotations

from ecodiff.lab.paper import claim, row, table

from .shown import Erratum, Line, number

MAIN = "Published version (read second-hand), main table"
SETS = {"coco_fid": "COCO FID", "flickr_fid": "Flickr FID"}


def schnell_twice() -> Erratum:
    """FLUX-schnell: the same three numbers for 15 % in the preprint and for 20 % in the published version."""
    before = row("table1", model="FLUX", method="EcoDiff", ratio=0.15)
    after = row("published/main", model="FLUX-schnell", method="EcoDiff")
    lines = []
    for column, word in (*SETS.items(), ("coco_clip", "COCO CLIP score")):
        lines.append(number(f"FLUX-schnell pruned, {word}: preprint, published", before[column], after[column]))
    ratios = f"{before['ratio']:.0%}", f"{after['ratio']:.0%}"
    lines.append(Line("its ratio: preprint, published", *ratios, before["ratio"] == after["ratio"]))
    size = f"{before['params_billion']:g} B", f"{after['params_billion']:g} B"
    lines.append(Line("its parameters: preprint, published", *size, size[0] == size[1]))
    degrades = f"degrades at {claim('flux_degrades_at'):.0f} %"
    rises = after["coco_fid"] / row("published/main", model="FLUX-schnell", method="Original")["coco_fid"] - 1
    lines.append(Line("FLUX at 20 %: preprint's Figure 9, published", degrades, f"FID {rises:+.1%}", rises > 0.1))
    text = "The numbers that the preprint gives to FLUX-schnell at 15 % stand at 20 % in the published version."
    return Erratum(f"{MAIN}; Tables 1, 7", text, tuple(lines))


def two_protocols() -> Erratum:
    """The unpruned models: two were evaluated anew, and one has the preprint's numbers."""
    lines = []
    for name, model, later in (("table1", "SDXL", "SDXL"), ("table7", "FLUX Dev", "FLUX-dev"),
                               ("table7", "FLUX Schnell", "FLUX-schnell")):  # fmt: skip
        before = row(name, model=model, ratio=0.0, method="Original")
        after = row("published/main", model=later, method="Original")
        for column, word in SETS.items():
            lines.append(number(f"{later} unpruned, {word}: preprint, published", before[column], after[column]))
    text = (
        "SDXL and FLUX-dev were evaluated anew, and FLUX-schnell was not: "
        "its FIDs cannot be compared with the others in the same table."
    )
    return Erratum(MAIN, text, tuple(lines))


def speedups() -> Erratum:
    """The printed speed-ups against 1 / (1 - ratio), which is 7 times as much for the model of few steps."""
    lines = []
    for entry in table("published/main"):
        if entry["method"] != "Original":
            base = row("published/main", model=entry["model"], method="Original")["speedup"]
            nominal = base / (1 - entry["ratio"])
            what = f"{entry['model']}, {entry['method']}: speed-up"
            lines.append(number(what, entry["speedup"], nominal))
    others = sum(not line.agrees for line in lines)
    what = "speed-ups that differ from 1 / (1 - ratio), as measured times would"
    lines.append(Line(what, "some", f"{others} of {len(lines)}", others > 0))
    text = "Every speed-up is 1 / (1 - ratio), times 7 for FLUX-schnell: it follows from the ratio, without any time."
    return Erratum(MAIN, text, tuple(lines))


def rebuilt_baseline() -> Erratum:
    """DiffPruning in both versions."""
    lines = []
    for model, later, ratio in (("SDXL", "SDXL", 0.2), ("FLUX", "FLUX-schnell", 0.15)):
        before = row("table1", model=model, method="DiffPruning", ratio=ratio)
        after = row("published/main", model=later, method="DiffPruning")
        for column, word in SETS.items():
            what = f"DiffPruning of {later}, {word}: preprint at {ratio:.0%}, published at {after['ratio']:.0%}"
            lines.append(number(what, before[column], after[column]))
    text = "DiffPruning has a fifth of its former FID on SDXL, and less than half at a higher ratio on FLUX-schnell."
    return Erratum(f"{MAIN}; Table 1", text, tuple(lines))


def changed_sign() -> Erratum:
    """What pruning a fifth of SDXL does to its FID, by each version."""
    lines = []
    for column, word in SETS.items():
        changes = []
        for name in ("table1", "published/main"):
            original = row(name, model="SDXL", method="Original")
            pruned = row(name, model="SDXL", method="EcoDiff", ratio=0.2)
            changes.append(pruned[column] - original[column])
        before, after = changes
        what = f"SDXL at 20 %, change of {word}: preprint, published"
        lines.append(Line(what, f"{before:+.2f}", f"{after:+.2f}", (before < 0) == (after < 0)))
    text = "The preprint's fall of FID at 20 % is a rise in the published version, on both sets."
    return Erratum(f"{MAIN}; §3.2", text, tuple(lines))


VERSIONS = (schnell_twice, two_protocols, speedups, rebuilt_baseline, changed_sign)
