"""The experiments behind the tables and ablations: which cells each needs, and one command that measures them all.

    python -m ecodiff.studies                       # what the plan has and is not recorded; stop and go on as you like
    python -m ecodiff.studies beta data_size --model openmoji-sd2 --minutes 30  # these, in the plan or not
    python -m ecodiff.studies --model all           # the plan of all embedded pipelines, seed 0 of all of them first
    python -m ecodiff.studies --list                # what there is, what is recorded, what the rest would take
    python -m ecodiff.studies --verify 2            # measure two recorded cells again and compare

A study is a function from a model's id to rows of cells (``ecodiff.experiments.Cell``); chapters read what is recorded
through ``table``, and say where nothing is. The plan (``Study.plan``) has each table of the paper on the model that
stands for the paper's, and what is not in the paper where the question arises. Seed 0 of all studies comes first, the
paper's tables before the others, so that a short run gives a whole picture and a long one its intervals over seeds.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

from ..cache import hashed_once
from ..errors import EcoDiffError
from ..experiments import Cell, compare, difference, interval_text
from ..learn_config import LearnConfig
from ..metrics import Interval
from ..pipelines import embedded
from ..protocol import Protocol
from ..retrain_config import RetrainConfig

SEEDS = 3
SD2, SDXL, DEV, SCHNELL = "openmoji-sd2", "openmoji-sdxl", "openmoji-flux-dev", "openmoji-flux-schnell"
METHODS = (  # the slowest last, so that the others do not wait for it
    *("learned", "random", "magnitude", "wanda", "taylor", "diff-pruning", "fisher", "gauss-newton"),
    *("obs", "obs+compensation", "occlusion"),
)
ADAPTED = ("learned+compensation", "gauss-newton+compensation")


def base(model: str, **changes) -> Cell:
    """The cell all studies vary: our defaults for learning, the model's own way of drawing, 20 % of the units."""
    protocol = Protocol.of(model)
    config = LearnConfig(guidance_scale=protocol.guidance_scale, call=protocol.call)
    if model in embedded():  # there is memory for all steps: a quarter less time, the same result to the bit
        config = replace(config, keep_last=config.num_inference_steps)
    steps = protocol.num_inference_steps
    if steps and steps < config.num_inference_steps:  # a step-distilled model has only so many
        config = replace(config, num_inference_steps=steps)
    return replace(Cell(protocol=protocol, config=config), **changes)


def learning(cell: Cell, **changes) -> Cell:
    """The same cell with other settings of learning."""
    return replace(cell, config=replace(cell.config, **changes))


def judging(cell: Cell, **changes) -> Cell:
    """The same cell judged by another protocol."""
    return replace(cell, protocol=replace(cell.protocol, **changes))


def smaller(cell: Cell, *, updates: int, most_prompts: int, pictures: int) -> Cell:
    """The same cell with less work: chapters take their parameters in so. ``updates`` in the place of the default
    number; cells that learn longer do so in proportion."""
    updates = round(updates * cell.config.updates / LearnConfig().updates)
    cell = replace(cell, prompts=min(cell.prompts, most_prompts))
    return judging(learning(cell, updates=updates), pictures=pictures)


def is_flux(model: str) -> bool:
    """Whether an id names a FLUX model, embedded or on the Hub."""
    return "flux" in model.lower()


def _main(model: str) -> dict[str, Cell]:
    cells = {"original": base(model, method="original")}
    for ratio in (0.2, 0.1):
        cells |= {f"{method}, {ratio:.0%}": base(model, method=method, ratio=ratio) for method in METHODS[:-1]}
    cells |= {f"{method}, 20%": base(model, method=method) for method in ("blocks", "blocks-clip")}
    cells["2:4 weights"] = base(model, method="sparse24", ratio=0.5)
    if not is_flux(model):  # reuse needs skip connections
        cells["deepcache"] = base(model, method="original+deepcache")
        cells["learned+deepcache, 20%"] = base(model, method="learned+deepcache")
    for ratio in (0.2, 0.1):
        cells |= {f"{method}, {ratio:.0%}": base(model, method=method, ratio=ratio) for method in ADAPTED}
    return cells | {f"{METHODS[-1]}, {ratio:.0%}": base(model, method=METHODS[-1], ratio=ratio) for ratio in (0.2, 0.1)}


def _pairs(model: str) -> dict[str, Cell]:
    """The second evaluation set: two objects, pairs that no training caption named. Rivals at a fifth of the units."""
    rows = {name: cell for name, cell in _main(model).items() if cell.ratio != 0.1 or cell.method == "learned"}
    return {name: judging(cell, split="heldout", count=2) for name, cell in rows.items()}


def _equal_parameters(model: str) -> dict[str, Cell]:
    """A share of the units' parameters in the place of a share of the units, which are not all of one size."""
    methods = (*METHODS, *ADAPTED, f"{METHODS[-1]}+compensation")
    return {
        f"{method}, {ratio:.0%}": base(model, method=method, ratio=ratio, count="parameters")
        for ratio in (0.2, 0.1)
        for method in methods
    }


def _ratios(model: str) -> dict[str, Cell]:
    shorter = {"pictures": 64, "features": False}
    return {
        f"{method}, {ratio:.0%}": judging(base(model, method=method, ratio=ratio), **shorter)
        for method in ("learned", "magnitude", "random")
        for ratio in (0.05, 0.1, 0.2, 0.3, 0.5)
    }


def _weight(model: str) -> dict[str, Cell]:
    """β in every update, as published; and only while too many gates are open, the default."""
    cell = base(model)
    rows = {f"β = {weight:g}": learning(cell, weight=weight, target_open=None) for weight in (0.5, 2.0, 8.0)}
    return rows | {"β until 80 % are open": cell}


def _data_size(model: str) -> dict[str, Cell]:
    return {f"{number} prompts": base(model, prompts=number) for number in (1, 8, 64, 100, 512)}


def _scope(model: str) -> dict[str, Cell]:
    return {scope: base(model, scope=scope) for scope in ("kind", "global", "local")}


def _kinds(model: str) -> dict[str, Cell]:
    kinds = {"both": ("attention", "feed_forward"), "heads only": ("attention",), "neurons only": ("feed_forward",)}
    return {name: learning(base(model), kinds=chosen) for name, chosen in kinds.items()}


def _relaxation(model: str) -> dict[str, Cell]:
    """δ, temperature and where λ starts, which the paper leaves to future work."""
    cell = base(model)
    rows = {f"δ = {delta:g}": learning(cell, delta=delta) for delta in (0.0, 0.1, 0.5)}
    rows |= {f"temperature {value:g}": learning(cell, temperature=value) for value in (0.33, 0.83, 1.5)}
    return rows | {f"λ starts at {start:g}": learning(cell, log_alpha_start=start) for start in (1.0, 3.0, 5.0)}


def _choices(model: str) -> dict[str, Cell]:
    """What the published method does otherwise, one at a time and all together."""
    cell = base(model)
    faithful = LearnConfig.paper(
        "flux" if is_flux(model) else "sdxl",
        "code",
        updates=cell.config.updates,
        num_inference_steps=cell.config.num_inference_steps,
        guidance_scale=cell.config.guidance_scale,
        call=cell.config.call,
        kinds=cell.config.kinds,
    )
    return {
        "corrected": cell,
        "L1 in place of L0": learning(cell, regulariser="l1", weight=0.5),
        "gates kept through all steps": learning(cell, gate_draw="sample"),
        "and shared by all samples": learning(cell, gate_draw="trajectory"),
        "gates drawn anew when recomputing": learning(cell, recompute="redraw", keep_last=1),
        "one noise for all prompts": learning(cell, fixed_noise=True),
        "one step at a time": learning(cell, objective="step"),
        "as the published code": replace(cell, config=faithful),
    }


def _soft(model: str) -> dict[str, Cell]:
    """Gates between 0 and 1: cut to 0 and 1, cut with the units that stay at their gates, or not cut at all."""
    gates = base(model, method="learned+soft")
    return {
        "cut": base(model),
        "cut, the rest times its gates": gates,
        "times their gates, none cut": replace(gates, ratio=0.0),
    }


DISTILLED_FROM = {
    SCHNELL: DEV,
    "black-forest-labs/FLUX.1-schnell": "black-forest-labs/FLUX.1-dev",
}


def _transfer(model: str) -> dict[str, Cell]:
    """Masks learned with other step counts, on other prompts or on another model than they are used with."""
    cell = base(model)
    steps = (1, 2, 4) if model in DISTILLED_FROM else (4, 8, 12)
    rows = {f"learned in {number} steps": learning(cell, num_inference_steps=number) for number in steps}
    if teacher := DISTILLED_FROM.get(model):
        rows["learned on the model it was distilled from"] = replace(
            cell, learned_on=teacher, config=base(teacher).config
        )
    return rows | {"learned on held-out pairs": replace(cell, split="heldout")}


def _best(model: str) -> dict[str, Cell]:
    """Can the best scores be beaten? Longer learning, adapting what stays; where more goes."""
    rows = {}
    for ratio in (0.2, 0.3, 0.5):
        cell = base(model, ratio=ratio)
        longer = learning(cell, updates=3 * cell.config.updates)
        rows |= {
            f"learned, {ratio:.0%}": cell,
            f"learned three times as long, {ratio:.0%}": longer,
            f"learned+compensation, {ratio:.0%}": replace(cell, method="learned+compensation"),
            f"both, {ratio:.0%}": replace(longer, method="learned+compensation"),
        }
        for method in ("obs+compensation", "gauss-newton", ADAPTED[1], "occlusion", "occlusion+compensation"):
            rows[f"{method}, {ratio:.0%}"] = replace(cell, method=method)
    return rows


def _retraining(model: str) -> dict[str, Cell]:
    """Light retraining on 100 pictures of the original: settings for models of this size, not the published ones. The
    original retrained in the same way is the control: what is its change is no recovery."""
    lora = RetrainConfig(steps=300, batch_size=16, lr=1e-3)
    full = RetrainConfig(method="full", steps=300, batch_size=16, lr=2e-4)
    whole = base(model, method="original")
    rows = {
        "original": whole,
        "original, LoRA": replace(whole, retrain=lora),
        "original, all weights": replace(whole, retrain=full),
    }
    for ratio in (0.3, 0.5):
        for method in ("learned", "random"):
            cell, name = base(model, method=method, ratio=ratio), f"{method}, {ratio:.0%}"
            rows[name] = cell
            rows[f"{name}, LoRA"] = replace(cell, retrain=lora)
            rows[f"{name}, LoRA, a tenth of the rate"] = replace(cell, retrain=replace(lora, lr=1e-4))
            rows[f"{name}, all weights"] = replace(cell, retrain=full)
    rows["2:4 weights"] = base(model, method="sparse24", ratio=0.5)
    rows["2:4 weights, straight through"] = base(model, method="original", retrain=replace(full, method="2:4"))
    return rows


@dataclass(frozen=True)
class Study:
    """A table of this project: what varies, and where the paper has the like."""

    title: str
    paper: str
    rows: Callable[[str], dict[str, Cell]]
    plan: Mapping[str, int] = field(default_factory=dict)  # embedded model -> seeds that are measured on it
    short: Mapping[str, Collection[str]] = field(default_factory=dict)  # model -> its rows, where these are not all


MAIN = {SDXL: SEEDS, SCHNELL: SEEDS, DEV: 1, SD2: 1}
BOTH_KINDS = {SDXL: 1, DEV: 1}  # a U-Net and a transformer
# Of Stable Diffusion 2 the paper has one short table; every method is compared on a U-Net and on a transformer.
SHORT_METHODS = ("learned", "random", "magnitude", "diff-pruning", "gauss-newton", "obs+compensation", *ADAPTED)
SHORT = ("original", "learned, 10%", *(f"{method}, 20%" for method in SHORT_METHODS))
REUSE = ("deepcache", "learned+deepcache, 20%")
# A learned mask of a U-Net takes thrice as long as one of a transformer: these decide claims about both.
CORRECTIONS = ("corrected", "L1 in place of L0", "and shared by all samples", "one step at a time")
STUDIES = {  # in the order of measuring: the tables and figures of the paper first
    "main": Study(
        "Every method, one object", "Tables 1, 6, 7, Figure 6", _main, MAIN, short={SD2: (*SHORT, *REUSE)}
    ),
    "pairs": Study(
        "Every method, two objects, pairs never seen", "Table 1, Figure 6", _pairs, MAIN, short={SD2: SHORT}
    ),
    "ratios": Study("How much can go", "Figures 7, 9, 14, 15", _ratios, {SDXL: 1, DEV: 1, SCHNELL: 1}),
    "beta": Study("The weight β of the regulariser", "Tables 4 and 9", _weight, {SDXL: 1, SCHNELL: 1}),
    "data_size": Study("The number of training prompts", "Tables 5 and 10", _data_size, {SDXL: 1, SCHNELL: 1}),
    "scope": Study("What competes with what", "Table 11, Figure 12", _scope, BOTH_KINDS),
    "kinds": Study("Heads only, neurons only", "Figure 13", _kinds, BOTH_KINDS),
    "retraining": Study("Light retraining", "Table 8, Figure 11", _retraining, BOTH_KINDS),
    "parameters": Study("Equal parameters removed", "Table 1", _equal_parameters, BOTH_KINDS),
    "choices": Study(
        "As published, and corrected", "§2.2, Algorithm 1", _choices, BOTH_KINDS, short={SDXL: CORRECTIONS}
    ),
    "soft": Study("Gates between 0 and 1", "a reviewer's question", _soft, BOTH_KINDS),
    "relaxation": Study("δ, temperature, start of λ", "left to future work", _relaxation, {DEV: 1}),
    "transfer": Study("Masks used where they were not learned", "not in the paper", _transfer, {DEV: 1, SCHNELL: 1}),
    "best": Study("What could be better than the best", "not in the paper", _best, {DEV: 1}),
}


def planned(study: str, model: str) -> int:
    """Number of seeds that the plan has of a study for a model, 0 for none; of every study for a model that is in no
    plan, such as one from the Hub."""
    if any(model in known.plan for known in STUDIES.values()):
        return STUDIES[study].plan.get(model, 0)
    return SEEDS


def cells(study: str, model: str, seed: int = 0) -> dict[str, Cell]:
    """The rows of a study for one seed, {name: cell}. ``STUDIES[study].rows(model)`` has the rows that the plan leaves
    out of a model, too. Raises EcoDiffError for a study that is none."""
    if study not in STUDIES:
        raise EcoDiffError(f"There is no study {study!r}: take one of {', '.join(STUDIES)}.")
    rows = STUDIES[study].rows(model)
    names = STUDIES[study].short.get(model) or rows
    return {name: replace(cell, seed=seed) for name, cell in rows.items() if name in names}


def recorded(
    pipe,
    study: str,
    model: str,
    seeds: int = SEEDS,
    *,
    only: Sequence[str] = (),
    adjust: Callable[[Cell], Cell] = lambda cell: cell,
    measure: bool = False,
) -> dict[str, list[dict]]:
    """What is recorded of a study, {row: values of each seed}; rows without seed 0 are left out.

    Seeds are those from 0 to the first that is missing, so that place s of every row is seed s.
    ``only``: these rows. ``adjust`` changes each cell first, such as to fewer pictures. ``measure``: measure what is
    not recorded, instead of leaving it out.
    """
    found: dict[str, list[dict]] = {}
    asked = (
        (seed, name, cell)
        for seed in range(seeds)
        for name, cell in cells(study, model, seed).items()
        if not only or name in only
    )
    with nullcontext() if measure else hashed_once():  # looking up changes no weights
        for seed, name, cell in asked:
            if len(found.get(name, [])) < seed:
                continue
            if values := compare(pipe, adjust(cell), only_recorded=not measure):
                found.setdefault(name, []).append(values)
    return found


def progress(found: Mapping[str, Sequence], study: str, model: str, seeds: int = SEEDS) -> str:
    """A sentence on how much of a study is recorded, and the command that measures the rest; empty if all is.

    Of what the plan has, with no more than ``seeds`` seeds; one seed where it has nothing.
    """
    seeds = min(seeds, planned(study, model) or 1)
    have = sum(min(len(row), seeds) for row in found.values())
    all_cells = sum(len(cells(study, model, seed)) for seed in range(seeds))
    if have >= all_cells:
        return ""
    command = f"python -m ecodiff.studies {study} --model {model}"
    return f"{have} of {all_cells} cells of this table are recorded for {model}; `{command}` measures the others."


MEASURES = {  # column of a table -> what of a cell, scale, digits
    "SSIM to the original": ("ssim", 1, 3),
    "object named (%)": ("object", 100, 1),
    "all objects found (%)": ("found", 100, 1),
    "all facts right (%)": ("facts", 100, 1),
    "background right (%)": ("colour", 100, 0),
    "CLIP score": ("clip", 1, 1),
}
GFLOP = "GFLOP a picture"  # the denoiser's, all calls
SET_MEASURES = {"FID": ("fid", 1, 0), "KID x 1000": ("kid", 1000, 1)}


def table(rows: Mapping[str, Sequence[dict]], measures: Sequence[str]) -> list[dict[str, str]]:
    """Recorded rows as a table of texts: mean and 95 % interval over pictures and seeds (bootstrap); for FID and KID
    the mean over seeds with the lowest and the highest."""
    lines = []
    for name, per_seed in rows.items():
        line = {"": name, "parameters": f"{per_seed[0]['parameters'] / 1e6:.2f} M", "seeds": str(len(per_seed))}
        for column in measures:
            line[column] = _shown(column, per_seed)
        lines.append(line)
    return lines


def minus(rows: Mapping[str, Sequence[dict]], row: str, reference: str | None) -> str:
    """SSIM of a row minus that of another, paired by picture over the seeds that both have, with its 95 % interval; a
    dash for the reference itself and where it is not recorded."""
    d = _minus(rows, row, reference)
    return f"{d.mean:+.4f} ({d.low:+.4f} to {d.high:+.4f})" if d else "–"


def in_words(rows: Mapping[str, Sequence[dict]], reference: str | None) -> str:
    """Which rows keep more SSIM than the reference's, which less, and which their 95 % intervals cannot tell from it;
    empty where there is nothing to compare."""
    found: dict[str, list[str]] = {"more": [], "less": [], "cannot be told apart": []}
    for row in rows:
        if rows[row] != rows.get(reference) and (d := _minus(rows, row, reference)):  # equal ones are the same cell
            found[d.word].append(f"{row} ({d.mean:+.3f})")
    return "; ".join(f"{word}: {', '.join(names)}" for word, names in found.items() if names)


def _minus(rows: Mapping[str, Sequence[dict]], row: str, reference: str | None) -> Interval | None:
    both = min(len(rows[row]), len(rows.get(reference, [])))
    if row == reference or not both:
        return None
    return difference(*([cell["ssim"] for cell in rows[name][:both]] for name in (row, reference)))


def _shown(column: str, per_seed: Sequence[dict]) -> str:
    if column == GFLOP:
        counted = [cell["gflop"] for cell in per_seed if "gflop" in cell]
        return f"{statistics.mean(counted):.2f}" if counted else "–"
    if column in SET_MEASURES:
        name, scale, digits = SET_MEASURES[column]
        values = [scale * cell[name] for cell in per_seed if name in cell]
        if len(values) < 2:  # one seed has no range
            return f"{values[0]:.{digits}f}" if values else "–"
        return f"{statistics.mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"
    name, scale, digits = MEASURES[column]
    return interval_text([cell.get(name, []) for cell in per_seed], scale, digits)
