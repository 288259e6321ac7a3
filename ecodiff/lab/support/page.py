"""The recorded rows as words: totals, the sentence that README quotes, and the tables of the page."""

from __future__ import annotations

from collections.abc import Mapping

from ecodiff.errors import EcoDiffError

from .run import read, results_file

ENOUGH = 0.9  # of the parameters of attentions and feed-forwards: the aim for each denoiser
DENOISER_STAGES = {"sites": "units go", "removed": "masked is removed", "emptied": "emptied", "saved": "saved"}
PIPELINE_STAGES = {
    "sites": "units go",
    "gradient": "exact gradient",
    "learn": "learns",
    "removed": "masked is removed",
    "emptied": "emptied",
    "saved": "saved",
    "retrain": "retrains",
}
BUILT = ("build", "denoiser", "runs")


def share(row: Mapping) -> float | None:
    """The share of the parameters of a denoiser's attentions and feed-forwards that goes with units, if counted."""
    if "reached" not in row:
        return None
    return sum(row["reached"].values())


def is_tried(row: Mapping) -> bool:
    """Whether a tiny instance of the class was built and ran."""
    return "broken" not in row and row["stages"].get("runs") is True


def holds(row: Mapping) -> bool:
    """Whether every stage holds."""
    stages = PIPELINE_STAGES if row["kind"] == "pipeline" else DENOISER_STAGES
    return is_tried(row) and all(row["stages"].get(stage) is True for stage in stages)


def numbers(recorded: Mapping) -> dict[str, int]:
    """Counts of classes: of each kind all, tried, whole; denoisers with enough in reach; pipelines that learn."""
    counts: dict[str, int] = {}
    for kind in ("denoiser", "pipeline"):
        rows = [row for row in recorded["rows"].values() if row["kind"] == kind]
        counts[f"{kind}s"] = list(recorded["classes"].values()).count(kind)
        counts[f"{kind}s_tried"] = sum(map(is_tried, rows))
        counts[f"{kind}s_whole"] = sum(map(holds, rows))
    rows = list(recorded["rows"].values())
    shares = [share(row) for row in rows if row["kind"] == "denoiser"]
    counts["denoisers_counted"] = sum(one is not None for one in shares)
    counts["denoisers_in_reach"] = sum(one is not None and one >= ENOUGH for one in shares)
    for stage in ("learn", "removed", "saved", "retrain"):
        pipelines = [row for row in rows if row["kind"] == "pipeline"]
        counts[f"pipelines_{stage}"] = sum(row["stages"].get(stage) is True for row in pipelines)
    return counts


def totals(recorded: Mapping) -> str:
    """The counts as lines."""
    n = numbers(recorded)
    return "\n".join([
        f"diffusers {recorded['diffusers']}",
        f"denoisers: {n['denoisers']} classes, {n['denoisers_tried']} tried, all stages hold for "
        f"{n['denoisers_whole']}; at least {ENOUGH:.0%} of attentions and feed-forwards in reach in "
        f"{n['denoisers_in_reach']} of {n['denoisers_counted']}",
        f"pipelines: {n['pipelines']} classes, {n['pipelines_tried']} tried, all stages hold for "
        f"{n['pipelines_whole']}; {n['pipelines_learn']} learn with exact gradients, {n['pipelines_removed']} give "
        f"removed as masked, {n['pipelines_saved']} load as saved, {n['pipelines_retrain']} retrain",
    ])  # fmt: skip


def sentence(recorded: Mapping) -> str:
    """What README says of diffusers pipelines in general."""
    n = numbers(recorded)
    return (
        f"Of the {n['pipelines']} pipeline classes of diffusers {recorded['diffusers']}, {n['pipelines_tried']} were "
        f"tried as tiny random instances. {n['pipelines_removed']} of these can be pruned, {n['pipelines_learn']} by a "
        f"mask that is learned with exact gradients, and {n['pipelines_retrain']} can be retrained."
    )


def page() -> str:
    """The tables (MyST), from what is recorded; raises EcoDiffError where nothing is."""
    recorded = read()
    if not recorded["rows"]:
        raise EcoDiffError(f"{results_file().name} is not there: run `python -m ecodiff support`, or get it with git.")
    lines = [sentence(recorded), "", "## Denoisers", ""]
    n = numbers(recorded)
    lines += [
        f"{n['denoisers_in_reach']} of {n['denoisers_counted']} denoiser classes have at least {ENOUGH:.0%} of the "
        "parameters of their attentions and feed-forwards in units that can go.",
        "",
    ]
    lines += _groups(recorded, "denoiser")
    lines += ["", "## Pipelines", ""]
    lines += _groups(recorded, "pipeline")
    return "\n".join(lines).replace("%", " %") + "\n"


def _groups(recorded: Mapping, kind: str) -> list[str]:
    """A folded table for classes of which all holds, of which something does not, and which were not tried."""
    groups: dict[str, list[str]] = {"Every stage holds": [], "Some stage does not hold": [], "Not tried": []}
    rows = {}
    for name, kind_of_class in recorded["classes"].items():
        if kind_of_class != kind:
            continue
        row = recorded["rows"].get(name, {"kind": kind, "stages": {}, "broken": "this class is not measured yet"})
        rows[name] = row
        if holds(row):
            groups["Every stage holds"].append(name)
        elif is_tried(row):
            groups["Some stage does not hold"].append(name)
        else:
            groups["Not tried"].append(name)
    lines = []
    for title, names in groups.items():
        if names:
            table = _table(rows, names, kind, recorded["rows"])
            lines += [f":::{{dropdown}} {title}: {len(names)} classes", "", *table, ":::", ""]
    return lines


def _table(rows: Mapping[str, dict], names: list[str], kind: str, denoisers: Mapping[str, dict]) -> list[str]:
    stages = PIPELINE_STAGES if kind == "pipeline" else DENOISER_STAGES
    heads = ["Class", "in reach", *stages.values(), "What does not hold"]
    if kind == "denoiser":
        heads[1:2] = ["parameters", "attention", "feed-forward"]
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "---|" * (len(heads) - 1)]
    for name in names:
        row = rows[name]
        cells = [f"`{name}`", *_shares(row, denoisers), *(_mark(row["stages"].get(stage)) for stage in stages)]
        lines.append("| " + " | ".join([*cells, reason(row)]) + " |")
    return lines


def _shares(row: Mapping, denoisers: Mapping[str, dict]) -> list[str]:
    if row["kind"] == "pipeline":
        found = [share(denoisers.get(name, {})) for name in row.get("denoiser", "").split(", ")]
        return [" ".join("–" if one is None else f"{one:.0%}" for one in found)]
    if "reached" not in row:
        return ["–", "–", "–"]
    size = f"{row['parameters'] / 1e9:.2f} B" if row["counted_on"] != "a tiny size" else "tiny"
    return [size, *(f"{row['reached'][kind]:.0%}" for kind in ("attention", "feed_forward"))]


def _mark(stage: bool | str | None) -> str:
    if stage is None:
        return "–"
    return "✓" if stage is True else "✗"


def reason(row: Mapping) -> str:
    """The first sentence of each stage that does not hold, and why modules have no units."""
    reasons = [row["broken"]] if "broken" in row else []
    for stage in (*BUILT, *PIPELINE_STAGES):
        given = row["stages"].get(stage, True)
        if given is not True:
            reasons.append(f"{stage}: {given}")
    if "failing" in row:
        reasons.append(f"{row['failing']['sites']} sites: {row['failing']['reason']}")
    for reason, count in row.get("skipped", {}).items():
        reasons.append(f"{count} modules: {reason}")
    if row.get("form") == "mappings":
        reasons.append("learns with images in each sample's mapping")
    return "; ".join(reasons).replace("|", "\\|").replace("<", "&lt;").replace("$", "\\$").replace("{", "\\{")
