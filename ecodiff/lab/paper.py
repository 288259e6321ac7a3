"""Numbers as the paper prints them, kept apart from everything computed: ``data/paper/*.csv``.

Nothing here is measured or corrected. A chapter that shows one of these numbers says *published*.

    table1                  main comparison: FID, CLIP and SSIM on two sets, GFLOP, parameters (* ratios are speed-ups)
    table2, table3          training configurations of FLUX and SDXL, as parameter and value
    table4, table9          the weight β of the regulariser, SDXL and FLUX
    table5, table10         the number of training prompts, SDXL and FLUX
    table6, table7          SD2; FLUX-dev and the step-distilled FLUX-schnell
    table8                  light retraining
    table11                 global and local thresholds
    table12                 hours, memory and carbon
    claims                  numbers of the text and the captions, by name
    sdxl_lambda             not printed: the authors' published λ of SDXL, one row a module
"""

from __future__ import annotations

import csv
from functools import lru_cache

from ecodiff.errors import EcoDiffError
from ecodiff.storage.paths import data_file

TABLES = (*(f"table{i}" for i in range(1, 13)), "claims", "sdxl_lambda")


def table(name: str) -> list[dict]:
    """Rows of a table, one of ``TABLES``: a dict a row, {column: number, text or None}.

    A column of numbers is all int or all float; an empty entry is None: not printed, or not applicable. Column names
    end in their unit; ratios are shares (10 % is 0.1). ``bold`` names the columns that the paper prints in bold. Raises
    EcoDiffError for another name.
    """
    if name not in TABLES:
        raise EcoDiffError(f"There is no published table {name!r} here: {', '.join(TABLES)}.")
    return [dict(row) for row in _rows(name)]


def row(name: str, **columns) -> dict:
    """The one row of a table whose columns have these values: ``row("table1", model="SDXL", ratio=0.2, ...)``.

    Raises EcoDiffError where none or several fit.
    """
    found = [row for row in table(name) if all(row.get(column) == value for column, value in columns.items())]
    if len(found) != 1:
        raise EcoDiffError(f"{name}.csv has {len(found)} rows with {columns}, not one.")
    return found[0]


_HEADS = {"coco": "COCO", "flickr": "Flickr", "fid": "FID", "clip": "CLIP", "ssim": "SSIM"}
_HEADS |= {"gflop": "GFLOP", "beta": "β"}


def readable(name: str, **columns) -> list[dict[str, str]]:
    """The rows of a table that have these values, as texts for a page; "–" where nothing is printed.

    Numbers keep their digits as printed, 35.50 and not 35.5; shares and thousands are set for reading.
    """
    shown = []
    for row, printed in zip(table(name), _texts(name), strict=True):
        if all(row.get(column) == value for column, value in columns.items()):
            shown.append({_head(key): _text(key, row[key], printed[key]) for key in row if key != "bold"})
    return shown


def _head(column: str) -> str:
    words = [_HEADS.get(word, word) for word in column.split("_")]
    return f"{words[1]}, {words[0]}" if words[0] in ("COCO", "Flickr") else " ".join(words)


def _text(column: str, value, printed: str) -> str:
    if value is None:
        return "–"
    if column == "ratio":
        return f"{100 * value:.0f} %"
    return f"{value:,}" if isinstance(value, int) else printed


def setting(name: str, parameter: str):
    """A value of the training configurations "table2" (FLUX) and "table3" (SDXL)."""
    return row(name, parameter=parameter)["value"]


def claim(name: str) -> float:
    """One number of the text, by its name in ``claims.csv``; raises EcoDiffError for another name."""
    if name not in (claims := _claims()):
        raise EcoDiffError(f"There is no published claim {name!r} in claims.csv.")
    return claims[name]


def _typed(texts: list[str]) -> list:
    values = [_value(text) for text in texts]
    if float in map(type, values) and str not in map(type, values):
        return [None if value is None else float(value) for value in values]
    return values


@lru_cache
def _texts(name: str) -> list[dict[str, str]]:
    with open(data_file(f"paper/{name}.csv"), encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, strict=True))


@lru_cache
def _rows(name: str) -> list[dict]:
    rows = _texts(name)
    columns = {column: _typed([row[column] for row in rows]) for column in rows[0]}
    return [{column: values[i] for column, values in columns.items()} for i in range(len(rows))]


@lru_cache
def _claims() -> dict[str, float]:
    return {row["name"]: row["value"] for row in _rows("claims")}


def _value(text: str):
    if text == "":
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text
