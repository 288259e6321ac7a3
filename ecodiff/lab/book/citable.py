"""Files by which others cite and check this companion, made from what the repository has already.

`codecheck` is ``codecheck.yml`` (https://codecheck.org.uk/spec/config/1.0/): the outputs of this companion and the
paper's items that they answer, made from the map of items in ``ecodiff/lab/claims/items.py``. `zenodo` is
``.zenodo.json``, made from ``CITATION.cff``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from ecodiff.lab.claims.items import ALGORITHMS, FIGURES, LATER, TABLES, Item, recorded
from ecodiff.storage.files import write_whole
from ecodiff.storage.fingerprint import canonical
from ecodiff.storage.paths import root

SPECIFICATION = "https://codecheck.org.uk/spec/config/1.0/"
HEAD = """%YAML 1.1
---
# Written by `python -m ecodiff book codecheck`; do not edit. Whoever checks this companion adds `codechecker`,
# `report`, `summary` and `certificate`. Under `ecodiff_outputs`, `sha256` is that of the keys and values of recorded
# rows, and `seconds` is what measuring them took. Outputs without rows are computed by the pages of `make book`.
"""


def write(action: str, base: Path | None = None) -> Path:
    """Write ``codecheck.yml`` or ``.zenodo.json``, as ``action`` names it; returns the file."""
    base = base or root()
    citation = yaml.safe_load((base / "CITATION.cff").read_text(encoding="utf-8"))
    if action == "codecheck":
        path, text = base / "codecheck.yml", codecheck(citation)
    else:
        path, text = base / ".zenodo.json", zenodo(citation)
    write_whole(path, text.encode())
    return path


def authors(work: Mapping) -> list[str]:
    """Authors of a work in a CITATION.cff: "Given Family", or the one name of a group."""
    return [author.get("name") or f"{author['given-names']} {author['family-names']}" for author in work["authors"]]


def codecheck(citation: Mapping) -> str:
    """The text of ``codecheck.yml``."""
    outputs = [_output(item) for item in (*TABLES, *FIGURES, *ALGORITHMS, *LATER)]
    answered: dict[str, list[str]] = {}
    for output in outputs:
        answered.setdefault(output["file"], []).append(output["item"])
    manifest = []
    for file, items in sorted(answered.items()):
        manifest.append({"file": file, "comment": f"What answers {', '.join(items)} of the paper"})
    paper, *others = [citation["preferred-citation"], *_others(citation)]
    content = {
        "version": SPECIFICATION,
        "manifest": manifest,
        "paper": {
            "title": paper["title"],
            "authors": [{"name": name} for name in authors(paper)],
            "reference": paper["url"],
            "reference-other": [work["url"] for work in others],
        },
        "repository": citation["repository-code"],
        "ecodiff_outputs": outputs,
    }
    return HEAD + yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=118)


def _others(citation: Mapping) -> list[Mapping]:
    """The versions of the paper beside the one that is preferred."""
    return [work for work in citation["references"] if work["url"] != citation["preferred-citation"]["url"]]


def _output(item: Item) -> dict:
    """What this companion has in the place of an item of the paper."""
    file, rows = recorded(item)
    output: dict = {
        "item": item.name,
        "shows": item.shows,
        "file": f"data/{file}" if rows else f"_build/notebooks/{item.chapter}.ipynb",
        "page": f"notebooks/{item.chapter}.html",
        "labels": list(item.labels),
        "command": item.command,
    }
    if rows:
        output["rows"] = len(rows)
        output["seconds"] = round(sum(row["seconds"] for row in rows))
        output["sha256"] = digest(rows)
    return output


def digest(rows: Sequence[Mapping]) -> str:
    """The hash of the keys and values of recorded rows, whatever their order; when and where they were measured does
    not enter."""
    lines = sorted(f"{row['key']} {canonical(row['values'])}" for row in rows)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def zenodo(citation: Mapping) -> str:
    """The text of ``.zenodo.json``.

    A few lines stand here in the place of cffconvert, since its Zenodo format drops the works that are referred to:
    here these are both versions of the paper.
    """
    works = citation["references"]
    related = [{"identifier": citation["repository-code"], "relation": "isSupplementTo", "scheme": "url"}]
    for work in works:
        related.append({"identifier": work["url"], "relation": "isSupplementTo", "scheme": "url"})
    references = []
    for work in works:
        where = work.get("journal") or work["collection-title"]
        references.append(f"{', '.join(authors(work))} ({work['year']}). {work['title']}. {where}. {work['url']}")
    content = {
        "title": citation["title"],
        "upload_type": citation["type"],
        "description": citation["abstract"],
        "version": citation["version"],
        "license": citation["license"],
        "creators": [{"name": name} for name in authors(citation)],
        "keywords": citation["keywords"],
        "related_identifiers": related,
        "references": references,
    }
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
