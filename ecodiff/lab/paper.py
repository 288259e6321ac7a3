"""Numbers as the paper prints them, kept apart from everything computed: ``data/paper/*.csv``.

Nothing here is measured or corrected. A chapter that shows one of these numbers says *published*.

The tables of the preprint (arXiv 2412.02852v1) were read from the preprint itself:

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

Numbers of the published version (ICLR 2026), and of others who measured the method, stand in files of their own. Each
of their rows names its ``version`` and its ``source``: *first-hand*, or *second-hand* where notes on a paper were read
and not the paper.

    published/main          main comparison at 20 %, with speed-ups as printed
    published/recovery      SDXL at 25 to 50 %, without and with recovery
    published/claims        numbers of the text, by name
    others/obs_diff         EcoDiff as OBS-Diff's authors measured it
"""

from __future__ import annotations

import csv
from functools import lru_cache

from ecodiff.errors import EcoDiffError
from ecodiff.storage.paths import data_file

TABLES = (*(f"table{i}" for i in range(1, 13)), "claims", "sdxl_lambda")
"""The preprint's tables: all of their numbers are first-hand."""
LATER = ("published/main", "published/recovery", "published/claims", "others/obs_diff")
"""Tables of the published version and of others; their rows have the columns ``version`` and ``source``."""
SOURCES = ("first-hand", "second-hand")


def table(name: str) -> list[dict]:
    """Rows of a table, one of ``TABLES`` or ``LATER``: a dict a row, {column: number, text or None}.

    A column of numbers is all int or all float; an empty entry is None: not printed, or not applicable. Column names
    end in their unit; ratios are shares (10 % is 0.1). ``bold`` names the columns that the paper prints in bold. Raises
    EcoDiffError for another name, for a table of the preprint with rows of another source, and for a later table with
    rows that do not name theirs.
    """
    if name not in TABLES + LATER:
        raise EcoDiffError(f"There is no published table {name!r} here: {', '.join(TABLES + LATER)}.")
    _check_source(name)
    return [dict(row) for row in _rows(name)]


def _check_source(name: str) -> None:
    """Raise EcoDiffError where rows of a table do not say where they come from, or come from where they must not."""
    for texts in _texts(name):
        if name in TABLES and not {"version", "source"}.isdisjoint(texts):
            raise EcoDiffError(f"{name}.csv is the preprint's: rows of another version or source need their own file.")
        if name in LATER and not (texts.get("version") and texts.get("source") in SOURCES):
            raise EcoDiffError(f"{name}.csv: each row names its version, and its source as {' or '.join(SOURCES)}.")


def provenance(name: str) -> str:
    """Where the numbers of a table come from, for its caption: "preprint, first-hand" or "ICLR 2026, second-hand"."""
    if name in TABLES:
        return "preprint, first-hand"
    origins = dict.fromkeys(f"{row['version']}, {row['source']}" for row in table(name))
    return "; ".join(origins)


def row(name: str, **columns) -> dict:
    """The one row of a table whose columns have these values: ``row("table1", model="SDXL", ratio=0.2, ...)``.

    Raises EcoDiffError where none or several fit.
    """
    rows = [row for row in table(name) if _has(row, columns)]
    if len(rows) != 1:
        raise EcoDiffError(f"{name}.csv has {len(rows)} rows with {columns}, not one.")
    return rows[0]


_HEADS = {"coco": "COCO", "flickr": "Flickr", "fid": "FID", "clip": "CLIP", "ssim": "SSIM"}
_HEADS |= {"gflop": "GFLOP", "beta": "β", "image": "Image", "reward": "Reward"}


def readable(name: str, **columns) -> list[dict[str, str]]:
    """The rows of a table that have these values, as texts for a page; "–" where nothing is printed.

    Numbers keep their digits as printed, 35.50 and not 35.5; shares and thousands are set for reading.
    """
    lines = []
    for row, printed in zip(table(name), _texts(name), strict=True):
        if _has(row, columns):
            lines.append(
                {_head(column): _text(column, row[column], printed[column]) for column in row if column != "bold"}
            )
    return lines


def _has(row: dict, columns: dict) -> bool:
    """Whether the row has these values in these columns."""
    return all(row.get(column) == value for column, value in columns.items())


def _head(column: str) -> str:
    """The head of a column for reading: "FID, COCO" for ``coco_fid``."""
    words = [_HEADS.get(word, word) for word in column.split("_")]
    if words[0] in ("COCO", "Flickr"):
        return f"{words[1]}, {words[0]}"
    return " ".join(words)


def _text(column: str, value, printed: str) -> str:
    """An entry for reading, from its value and from the digits as printed."""
    if value is None:
        return "–"
    if column == "ratio":
        return f"{100 * value:.0f} %"
    if isinstance(value, int):
        return f"{value:,}"
    return printed


def setting(name: str, parameter: str):
    """A value of the training configurations "table2" (FLUX) and "table3" (SDXL)."""
    return row(name, parameter=parameter)["value"]


def claim(name: str, file: str = "claims") -> float:
    """One number of the text, by its name in ``claims.csv`` (or "published/claims").

    Raises EcoDiffError for another name.
    """
    for row in table(file):
        if row["name"] == name:
            return row["value"]
    raise EcoDiffError(f"There is no published claim {name!r} in {file}.csv.")


@lru_cache
def _texts(name: str) -> list[dict[str, str]]:
    with open(data_file(f"paper/{name}.csv"), encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, strict=True))


@lru_cache
def _rows(name: str) -> list[dict]:
    rows: list[dict] = [{} for _ in _texts(name)]
    for column in _texts(name)[0]:
        values = _typed([texts[column] for texts in _texts(name)])
        for row, value in zip(rows, values, strict=True):
            row[column] = value
    return rows


def _typed(texts: list[str]) -> list:
    """The values of a column. Where it has numbers with a point and no words, its whole numbers are floats, too."""
    values = [_value(text) for text in texts]
    types = {type(value) for value in values}
    if float not in types or str in types:
        return values
    return [None if value is None else float(value) for value in values]


def _value(text: str):
    """An entry as int, float or text, whichever fits first; None for an empty one."""
    if text == "":
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text
