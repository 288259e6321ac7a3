"""The model card of a pruned pipeline, written from what its folder says and from measurements that are given."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ecodiff.cost.trace import parameters
from ecodiff.errors import EcoDiffError
from ecodiff.method.kept import ENTRIES, mask_of_config
from ecodiff.method.pruned import pruned_class
from ecodiff.method.sites import KINDS, Site, find_sites

from .made import read_made

MARKER = "<!-- Written by ecodiff's push. Without this line the card is yours, and later pushes leave it. -->"

REPOSITORY = "https://github.com/ecodiff-companion/ecodiff-companion"

_UNITS = {"attention": "attention heads", "feed_forward": "feed-forward neurons", "modulation": "modulation channels"}


@dataclass(frozen=True)
class PrunedPart:
    """A pruned component of a pipeline's folder, read without its weights.

    sites: those of the original; mask: which of its units were kept; parameters: before and after; size: bytes of the
    weight files.
    """

    component: str
    model: str
    sites: Mapping[str, Site]
    mask: Mapping[str, Tensor]
    parameters: tuple[int, int]
    size: int


def pruned_parts(folder: str | os.PathLike) -> tuple[str, list[PrunedPart]]:
    """The class of the pipeline in a folder, and its pruned components.

    Raises EcoDiffError for a folder without a pipeline, and for one in which nothing is pruned or a file is missing.
    """
    index = _read_json(Path(folder) / "model_index.json", "save a pipeline there with save_pretrained")
    parts = []
    for component, entry in index.items():
        if isinstance(entry, list) and len(entry) == 2 and str(entry[1]).startswith("Pruned"):
            parts.append(_part(Path(folder), component, entry[1].removeprefix("Pruned")))
    if not parts:
        raise EcoDiffError(f"{folder}: nothing of this pipeline is pruned; `prune` makes a pruned one.")
    return str(index.get("_class_name", "DiffusionPipeline")), parts


def _part(folder: Path, component: str, model: str) -> PrunedPart:
    import diffusers
    from accelerate import init_empty_weights

    config = _read_json(folder / component / "config.json", "save the pipeline again")
    dense_config = {name: value for name, value in config.items() if name not in ENTRIES}
    with init_empty_weights():
        pruned_model: Any = pruned_class(model)
        pruned = pruned_model.from_config(config)
        dense = getattr(diffusers, model).from_config(dense_config)
    weights = sorted((folder / component).glob("*.safetensors"))
    if not weights:
        raise EcoDiffError(f"{folder / component}: there are no weights (*.safetensors): save the pipeline again.")
    sites = find_sites(dense, KINDS)
    mask, _ = mask_of_config(config, sites)
    size = sum(file.stat().st_size for file in weights)
    return PrunedPart(component, model, sites, mask, (parameters(dense), parameters(pruned)), size)


def made_of(folder: str | os.PathLike, parts: Sequence[PrunedPart]) -> dict:
    """What the commands wrote about how the pipeline was made; empty where they did not make it."""
    mask: dict[str, Tensor] = {}
    for number, part in enumerate(parts):
        for name, keep in part.mask.items():
            mask[name if number == 0 else f"{part.component}.{name}"] = keep
    return read_made(folder, mask)


def read_evaluation(path: str | os.PathLike) -> dict[str, Any]:
    """The measures in a file that `evaluate --json` printed. Raises EcoDiffError for anything else."""
    content = _read_json(Path(path), "give what `evaluate --json` printed")
    rows = {name: value for name, value in content.items() if _in_words(value) is not None}
    if not rows:
        raise EcoDiffError(f"{path}: holds no measures; give what `evaluate --json` printed.")
    return rows


def write_card(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    evaluations: Mapping[str, Mapping[str, Any]] | None = None,
    base: str | None = None,
    licence: str | None = None,
) -> str:
    """The text of the model card for the pruned pipeline in a folder.

    evaluations: {heading: measures}, as `read_evaluation` gives them. base: the Hub id of the original (None: what the
    folder says). licence: the Hub's name of it, such as "openrail++" (None: the card says that it is not known).
    Raises EcoDiffError where the folder holds no pruned pipeline.
    """
    pipeline, parts = pruned_parts(folder)
    made = made_of(folder, parts)
    return card_of(repo_id, pipeline, parts, made, evaluations=evaluations, base=base, licence=licence)


def card_of(
    repo_id: str,
    pipeline: str,
    parts: Sequence[PrunedPart],
    made: Mapping[str, Any],
    *,
    evaluations: Mapping[str, Mapping[str, Any]] | None,
    base: str | None,
    licence: str | None,
) -> str:
    """The text of `write_card`, for parts that were read already."""
    from huggingface_hub import ModelCardData

    base = base or made.get("base")
    on_hub = base if base is not None and base.count("/") == 1 else None
    data = ModelCardData(
        base_model=on_hub, license=licence, library_name="diffusers", tags=["ecodiff", "pruning", "structural-pruning"]
    )
    before, after = _summed(parts)
    origin = f"[{base}](https://huggingface.co/{base})" if on_hub else base or "its original"
    text = [
        f"---\n{data.to_yaml()}\n---",
        MARKER,
        f"# {repo_id.partition('/')[2]}",
        f"This is a `{pipeline}` of which the denoiser is smaller than that of {origin}: {after:,} of {before:,} "
        f"parameters are left ({100 * after / before:.1f} %). Whole attention heads and feed-forward neurons were "
        f"removed by structural pruning, with the [EcoDiff companion]({REPOSITORY}). The weights that stay are dense.",
        "## What was removed",
        *_removed(parts),
        _chosen(made),
        "## How to use it",
        _usage(repo_id, parts),
        "## How far its images are from those of the original",
        *_measured(evaluations or {}),
        "## What it costs",
        _cost(repo_id, parts),
        "## Licence",
        _terms(origin, licence),
    ]
    return "\n\n".join(text) + "\n"


def _summed(parts: Sequence[PrunedPart]) -> tuple[int, int]:
    return sum(part.parameters[0] for part in parts), sum(part.parameters[1] for part in parts)


def _removed(parts: Sequence[PrunedPart]) -> list[str]:
    """A table of the units kept by kind, and one of each site to unfold."""
    lines = ["| component | units | kept | of | removed |", "|---|---|---|---|---|"]
    each = ["| component | site | kept | of |", "|---|---|---|---|"]
    for part in parts:
        for kind in KINDS:
            sites = [site for site in part.sites.values() if site.kind == kind and site.name in part.mask]
            if not sites:
                continue
            total = sum(site.units for site in sites)
            kept = sum(int(part.mask[site.name].sum()) for site in sites)
            share = f"{100 * (1 - kept / total):.1f} %"
            lines.append(f"| `{part.component}` | {_UNITS.get(kind, kind)} | {kept:,} | {total:,} | {share} |")
        for name, keep in part.mask.items():
            each.append(f"| `{part.component}` | `{name}` | {int(keep.sum())} | {keep.numel()} |")
    unfold = "<details><summary>The units kept in each site</summary>\n\n" + "\n".join(each) + "\n\n</details>"
    return ["\n".join(lines), unfold]


def _chosen(made: Mapping[str, Any]) -> str:
    """How the units were chosen, and what came after, as far as it is known."""
    scores = made.get("scores")
    if not isinstance(scores, Mapping) or "method" not in scores:
        return "How these units were chosen was not recorded."
    details = ", ".join(f"{name} {value}" for name, value in scores.items() if name != "method")
    sentences = [f"The units were chosen by the method *{scores['method']}*{f' ({details})' if details else ''}."]
    if "ratio" in made:
        sentences.append(
            f"Asked for was a ratio of {made['ratio']} of the {made.get('of', 'units')}, with units competing by the "
            f"scope *{made.get('scope', 'kind')}*, rounded to a multiple of {made.get('round_to', 1)}."
        )
    for step in made.get("then", []):
        sentences.append(f"After that: {step}.")
    return " ".join(sentences)


def _usage(repo_id: str, parts: Sequence[PrunedPart]) -> str:
    classes = ", ".join(f"`Pruned{part.model}`" for part in parts)
    return f"""```
pip install git+{REPOSITORY}
```

```python
import ecodiff  # tells diffusers about pruned classes
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{repo_id}")  # or ecodiff.load("{repo_id}")
```

Without `import ecodiff`, diffusers does not know the class {classes} and loads nothing. The layers of this model differ
in width from site to site, which no class of diffusers itself can express. Adapters made for the original load by
`load_lora_weights` as ever; `ecodiff.mask_of(pipe)` says which units of the original are left."""


def _measured(evaluations: Mapping[str, Mapping[str, Any]]) -> list[str]:
    if not evaluations:
        return ["This was not measured. The command `evaluate` measures it."]
    blocks = []
    for heading, rows in evaluations.items():
        lines = ["| measure | value |", "|---|---|"]
        for name, value in rows.items():
            lines.append(f"| {_cell(name)} | {_in_words(value)} |")
        blocks += [f"### {heading}", "\n".join(lines)]
    return [*blocks, "Measured against the original by ecodiff's command `evaluate`, with the same prompts and noise."]


def _cost(repo_id: str, parts: Sequence[PrunedPart]) -> str:
    before, after = _summed(parts)
    size = sum(part.size for part in parts)
    size_before = f"{round(size * before / after):,} (at as many bytes a parameter)"
    return f"""| | original | this model |
|---|---|---|
| parameters of the denoiser | {before:,} | {after:,} |
| weights of the denoiser in these files, in bytes | {size_before} | {size:,} |

`python -m ecodiff cost {repo_id}` counts operations and memory."""


def _terms(origin: str, licence: str | None) -> str:
    known = f"`{licence}`" if licence else "not known to the program that wrote this card"
    return f"The licence of {origin} is {known}. This model is derived from it, and its terms hold."


def _in_words(value: Any) -> str | None:
    """A measure as a cell of a table; None for what is none."""
    if isinstance(value, Mapping) and {"mean", "low", "high"} <= value.keys():
        numbers = [value["mean"], value["low"], value["high"]]
        if all(isinstance(number, (int, float)) for number in numbers):
            return "{:.4g} (95 % interval {:.4g} to {:.4g})".format(*numbers)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def _read_json(path: Path, advice: str) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EcoDiffError(f"{path}: cannot be read as JSON ({error}): {advice}.") from error
    if not isinstance(content, dict):
        raise EcoDiffError(f"{path}: is no JSON object: {advice}.")
    return content
