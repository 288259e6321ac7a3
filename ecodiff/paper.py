"""Numbers as the paper prints them, kept apart from everything computed: ``data/paper/*.csv``.

Nothing here is measured or corrected. A chapter that shows one of these numbers says *published*.
"""

from __future__ import annotations

import csv

from .errors import EcoDiffError
from .paths import data_file

TABLES = ("table1", "table12", "claims", "sdxl_lambda")


def table(name: str) -> list[dict]:
    """Rows of a table: "table1", "table12", "claims", or "sdxl_lambda" (the authors' published λ, one row a module).

    Entries that are numbers are numbers; an empty entry is None. Raises EcoDiffError for another name.
    """
    if name not in TABLES:
        raise EcoDiffError(f"There is no published table {name!r} here: {', '.join(TABLES)}.")
    with open(data_file(f"paper/{name}.csv"), encoding="utf-8", newline="") as file:
        return [{key: _value(text) for key, text in row.items()} for row in csv.DictReader(file)]


def claim(name: str) -> float:
    """One number of the text, by its name in ``claims.csv``; raises EcoDiffError for another name."""
    found = [row["value"] for row in table("claims") if row["name"] == name]
    if not found:
        raise EcoDiffError(f"There is no published claim {name!r} in claims.csv.")
    return found[0]


def _value(text: str):
    if text == "":
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text
