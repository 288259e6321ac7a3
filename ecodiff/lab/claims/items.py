"""Tables, figures, equations and algorithms of the paper, each with one word for what became of it here.

Words come from the claims and errata that name the item in their ``where``. An item that neither names has a word of
its own: *shown* where this book computes or generates it anew, *explained* where there is nothing to decide.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ecodiff.lab.errata import ALGEBRA, ARITHMETIC, VERSIONS, Erratum
from ecodiff.lab.identities import identity
from ecodiff.lab.studies.cell import describe_cell
from ecodiff.lab.studies.plan import SEEDS
from ecodiff.lab.studies.results import chosen
from ecodiff.storage import records

from . import page
from .rules import SCALES, Claim, Decision, contradicted, overall

SHOWN, EXPLAINED = "shown", "explained"
KINDS = {
    r"Tables?": "Table",
    r"Fig(?:\.|ures?)": "Figure",
    r"Eq(?:\.|uations?)": "Equation",
    r"Alg(?:\.|orithm)": "Algorithm",
}
STUDY = re.compile(r"python -m ecodiff study (\S+) --model (\S+)")
FULL_SIZE = re.compile(r"python -m ecodiff benchmark full-size (\S+) --samples (\d+) --parts (\S+)")
PUBLISHED_PLACES = {"main table": "Published main table", "recovery table": "Published recovery table"}


@dataclass(frozen=True)
class Item:
    """An item of the paper: what it shows, where this book treats it, and what computes that again.

    ``labels`` are those of tables, figures, equations and algorithms of the book, the best first.
    """

    name: str
    shows: str
    chapter: str
    labels: tuple[str, ...] = ()
    command: str = ""
    word: str = SHOWN

    @property
    def slug(self) -> str:
        return f"item-{self.name.lower().replace(' ', '-')}"


def _study(name: str, model: str = "openmoji-sdxl") -> str:
    return f"python -m ecodiff study {name} --model {model}"


def _chapter(stem: str, parameters: str = "") -> str:
    return f"papermill notebooks/{stem}.ipynb out.ipynb{parameters}"


TABLES = (
    Item("Table 1", "SDXL and FLUX-schnell pruned by EcoDiff and Diff-Pruning, and DeepCache: FID, CLIP score, SSIM, "
         "GFLOP and parameters.", "10_every_method", ("tab-published-main", "tab-gflop"), _study("main")),
    Item("Table 2", "The settings with which masks of FLUX are learned.", "05_learning_a_mask",
         ("tab-items-settings",), _study("choices", "openmoji-flux-dev"), EXPLAINED),
    Item("Table 3", "The settings with which masks of SDXL are learned.", "05_learning_a_mask",
         ("tab-items-settings",), _study("choices"), EXPLAINED),
    Item("Table 4", "The weight β of the regulariser, for SDXL.", "11_settings",
         ("tab-published-beta", "fig-beta"), _study("beta")),
    Item("Table 5", "The number of training prompts, for SDXL.", "11_settings",
         ("tab-published-size", "fig-data-size"), _study("data_size")),
    Item("Table 6", "Stable Diffusion 2 pruned by 10 and 20 %.", "12_after_pruning",
         ("tab-published-sd2",), _study("main", "openmoji-sd2")),
    Item("Table 7", "FLUX-dev unpruned, and FLUX-schnell pruned by 10 and 15 %.", "12_after_pruning",
         ("tab-published-flux",), _study("main", "openmoji-flux-schnell")),
    Item("Table 8", "SDXL pruned by 25 and 30 %, without and with light retraining.", "12_after_pruning",
         ("tab-published-retraining",), _study("retraining")),
    Item("Table 9", "The weight β of the regulariser, for FLUX.", "11_settings",
         ("tab-published-beta-flux", "fig-beta"), _study("beta", "openmoji-flux-schnell")),
    Item("Table 10", "The number of training prompts, for FLUX.", "11_settings",
         ("tab-published-size-flux", "fig-data-size"), _study("data_size", "openmoji-flux-schnell")),
    Item("Table 11", "One threshold for the whole model against one in each module, for SDXL.", "11_settings",
         ("tab-published-scope", "fig-scope"), _study("scope")),
    Item("Table 12", "Hours, memory, GPU-hours and carbon of learning a mask.", "13_what_it_costs", (),
         "python -m ecodiff benchmark full-size sdxl --samples 2 --parts update"),
)  # fmt: skip

FIGURES = (
    Item("Figure 1", "Images of SDXL and FLUX before and after pruning, with the GPUs that they then fit.",
         "13_what_it_costs", ("tab-8-24",), "python -m ecodiff cost sdxl --ratio 0.2"),
    Item("Figure 2", "The objective over all denoising steps, and time-step checkpointing, as a schematic.",
         "06_memory_and_time", ("alg-checkpoint",), _chapter("06_memory_and_time"), EXPLAINED),
    Item("Figure 3", "Where gates stand in attention and in feed-forward layers, as a schematic.",
         "02_where_masks_go", ("eq-masked-heads", "eq-masked-ffn"), _chapter("02_where_masks_go"), EXPLAINED),
    Item("Figure 4", "Draws from the hard concrete distribution beside a sigmoid.", "03_hard_concrete",
         ("fig-paper4",), _chapter("03_hard_concrete")),
    Item("Figure 5", "The hard concrete distribution at three values of δ.", "03_hard_concrete",
         ("fig-paper5",), _chapter("03_hard_concrete")),
    Item("Figure 6", "Images of several methods for the same prompts.", "10_every_method",
         ("fig-six",), _study("main")),
    Item("Figure 7", "Images of SDXL at growing pruning ratios.", "07_a_smaller_model",
         ("fig-ratios",), _chapter("07_a_smaller_model")),
    Item("Figure 8", "Memory and time of an update, with and without checkpointing.", "06_memory_and_time",
         ("fig-memory", "fig-memory-full"), _chapter("06_memory_and_time")),
    Item("Figure 9", "Quality against the pruning ratio, for SDXL and FLUX.", "07_a_smaller_model",
         ("fig-compare",), _study("ratios")),
    Item("Figure 10", "Images of EcoDiff together with DeepCache. Here a table stands for them.", "12_after_pruning",
         ("tab-reuse",), _study("main")),
    Item("Figure 11", "Images after light retraining. Here tables stand for them.", "12_after_pruning",
         ("tab-published-retraining",), _study("retraining")),
    Item("Figure 12", "Images with one threshold and with one in each module. Here a table stands for them.",
         "11_settings", ("fig-scope",), _study("scope")),
    Item("Figure 13", "Images with heads alone or neurons alone removed. Here a table stands for them.",
         "11_settings", ("fig-kinds",), _study("kinds")),
    Item("Figure 14", "More images of SDXL at growing pruning ratios.", "07_a_smaller_model",
         ("fig-ratios",), _study("ratios")),
    Item("Figure 15", "More images of FLUX-schnell at growing pruning ratios.", "07_a_smaller_model",
         ("fig-ratios",), _study("ratios", "openmoji-flux-schnell")),
)  # fmt: skip

EQUATIONS = (
    Item("Equation 1", "The whole denoising as steps inside steps.", "05_learning_a_mask", ("eq-trajectory",)),
    Item("Equation 2", "The objective: error of the final latent, plus the number of units kept.",
         "05_learning_a_mask", ("eq-objective",), word=EXPLAINED),
    Item("Equation 3", "The first term of the objective, for random gates.", "05_learning_a_mask",
         ("eq-objective",), word=EXPLAINED),
    Item("Equation 4", "The expected number of open gates, and L1 in its place.", "04_l0_to_l1",
         ("eq-term", "eq-paper-4")),
    Item("Equation 5", "The training loss of a latent diffusion model. This book trains with it and does not check it.",
         "01_the_models", word=EXPLAINED),
    Item("Equation 6", "One denoising step. Here the scheduler of each pipeline takes it.", "05_learning_a_mask",
         ("eq-trajectory",), word=EXPLAINED),
    Item("Equation 7", "Multi-head attention.", "02_where_masks_go"),
    Item("Equation 8", "The feed-forward layer.", "02_where_masks_go"),
    Item("Equation 9", "Attention with a gate for each head.", "02_where_masks_go", ("eq-masked-heads",)),
    Item("Equation 10", "The feed-forward layer with a gate for each neuron.", "02_where_masks_go",
         ("eq-masked-ffn",)),
    *(Item(f"Equation {n}", "A line of the derivation of L1 from L0.", "04_l0_to_l1", ("eq-appendix-d",))
      for n in range(11, 18)),
    Item("Equation 18", "The slope of the factor g, said to be nearly zero.", "04_l0_to_l1", ("eq-slope",)),
    Item("Equation 19", "The sum of |λ| in the place of L0.", "04_l0_to_l1", ("eq-appendix-d",)),
)  # fmt: skip

ALGORITHMS = (
    Item("Algorithm 1", "End-to-end learning of a mask.", "05_learning_a_mask", ("alg-learn",),
         _chapter("05_learning_a_mask")),
    Item("Algorithm 2", "Time-step checkpointing.", "06_memory_and_time", ("alg-checkpoint",),
         _chapter("06_memory_and_time")),
)  # fmt: skip

LATER = (
    Item("Published main table", "SDXL, FLUX-dev and FLUX-schnell at 20 %, with BK-SDM, Diff-Pruning, FLUX-Lite and a "
         "per-step loss (ICLR 2026, read second-hand).", "17_versions", ("tab-versions-main",), _study("main")),
    Item("Published recovery table", "SDXL at 25, 40 and 50 %, without and with recovery (ICLR 2026, read "
         "second-hand).", "17_versions", ("tab-versions-recovery",), _study("retraining")),
)  # fmt: skip

ITEMS = {
    "Tables": TABLES,
    "Figures": FIGURES,
    "Equations": EQUATIONS,
    "Algorithms": ALGORITHMS,
    "Published version": LATER,
}


def named(text: str) -> set[str]:
    """The items that a place names: "Tables 4, 9, Fig. 7" is {"Table 4", "Table 9", "Figure 7"}.

    A place in the published version names none of the preprint's.
    """
    if text.lower().startswith("published version"):
        return {name for words, name in PUBLISHED_PLACES.items() if words in text}
    found = set()
    for pattern, kind in KINDS.items():
        for numbers in re.findall(rf"\b{pattern} (\d+(?:(?:, | and |-)\d+)*)", text):
            for part in re.split(", | and ", numbers):
                first, _, last = part.partition("-")
                found |= {f"{kind} {n}" for n in range(int(first), int(last or first) + 1)}
    return found


@dataclass(frozen=True)
class Verdict:
    """What became of an item: one word, what it rests on, and the numbers and cards of the claims that decide it."""

    word: str
    scale: str
    claims: tuple[tuple[str, Claim], ...]
    errata: tuple[Erratum, ...]


def judge(item: Item, numbered: Sequence[tuple[str, Claim]], errata: Sequence[Erratum]) -> Verdict:
    """The verdict on an item by those claims, ``(number, claim)``, and errata that name it.

    A decision that itself names items counts for these alone.
    """
    decisions: list[Decision] = []
    naming = [(number, claim) for number, claim in numbered if item.name in named(claim.where)]
    for _, claim in naming:
        for decision in claim.decisions:
            about = named(decision.on)
            if not about or item.name in about:
                decisions.append(decision)
    wrong = [erratum for erratum in errata if item.name in named(erratum.where)]
    decisions += [contradicted(erratum) for erratum in wrong]
    if not decisions:
        return Verdict(item.word, "nothing to decide", (), ())
    scales = {decision.scale for decision in decisions}
    found = [scale for scale in SCALES if scale in scales] or ["open"]
    return Verdict(overall(decisions), ", ".join(found), tuple(naming), tuple(wrong))


def all_errata() -> list[Erratum]:
    """The errata, computed."""
    return [erratum() for erratum in (*ARITHMETIC, *ALGEBRA, *VERSIONS)]


def recorded(item: Item) -> tuple[str, list[dict]]:
    """The file under ``data`` and the rows in it that an item's command has measured.

    Both are empty for a command that computes what no row keeps. Loads no model.
    """
    rows: dict[str, dict] = {}
    study, benchmark = STUDY.fullmatch(item.command), FULL_SIZE.fullmatch(item.command)
    if study:
        name, model = study.groups()
        of = identity(model)
        for _, _, cell in chosen(name, model, SEEDS, ()):
            row = records.find(describe_cell(of, cell), name="compare")
            if row is not None:
                rows[row["key"]] = row
        return "results/compare.jsonl", list(rows.values())
    if benchmark:
        name, samples, part = benchmark.groups()
        wanted = {"what": f"full_size_{part}", "model": name, "samples": int(samples)}
        for row in records.rows("full_size"):
            if wanted.items() <= row["config"].items():
                rows[row["key"]] = row
        return "results/full_size.jsonl", list(rows.values())
    return "", []


def cost(item: Item) -> str:
    """A sentence on what the recorded rows of an item took; empty where there are none."""
    _, rows = recorded(item)
    if not rows:
        return ""
    seconds = sum(row["seconds"] for row in rows)
    took = f"{seconds / 3600:.1f} hours" if seconds >= 3600 else f"{seconds / 60:.0f} minutes"
    return f"The {len(rows)} rows that are recorded of it took {took}."


def text(item: Item, verdict: Verdict) -> str:
    """An item as Markdown: word, scale, what it shows, where the evidence is, the command, and what it took."""
    evidence = [*(_reference(label) for label in item.labels), f"[]({item.chapter}.ipynb)"]
    lines = [f"{page.badge(verdict.word)} *{verdict.scale}.* {item.shows}", "", f"Here: {', '.join(evidence)}."]
    if verdict.claims:
        links = [f"{{ref}}`{number} <{page.anchor(claim)}>`" for number, claim in verdict.claims]
        lines[-1] += f" {'Claims' if len(links) > 1 else 'Claim'} {', '.join(links)}."
    if verdict.errata:
        lines[-1] += " Erratum: " + " ".join(erratum.conclusion for erratum in verdict.errata)
    if item.command:
        lines[-1] += f" Again: `{item.command}`. {cost(item)}".rstrip()
    return "\n".join(lines)


def line(item: Item, verdict: Verdict) -> dict[str, str]:
    """An item as a row of a table."""
    places = [_reference(label) for label in item.labels] or [f"[]({item.chapter}.ipynb)"]
    return {
        "item": item.name,
        "verdict": page.badge(verdict.word),
        "what it is": f"{item.shows} *({verdict.scale})*",
        "here": ", ".join(places),
    }


def index(items: Sequence[Item], verdicts: Sequence[Verdict]) -> str:
    """All items with their words, as one paragraph of links."""
    parts = []
    for item, verdict in zip(items, verdicts, strict=True):
        parts.append(f"{{ref}}`{item.name} <{item.slug}>`\u00a0{page.badge(verdict.word)}")
    return " · ".join(parts)


def _reference(label: str) -> str:
    role = {"eq": "eq", "alg": "prf:ref"}.get(label.partition("-")[0], "numref")
    reference = f"{{{role}}}`{label}`"
    return f"Eq. {reference}" if role == "eq" else reference
