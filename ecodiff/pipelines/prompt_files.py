"""Prompts from files as the field's data sets have them: GCC3M, MS COCO, Flickr30k, PartiPrompts, and plain text.

read_prompts("Validation_GCC-1.1.0-Validation.tsv", count=100)           # the paper's own: the first 100
read_prompts("captions_val2017.json", count=1000, seed=0)                # a random choice, the same for a seed
read_prompts("datasets:nlphuji/flickr30k:test:caption", count=1000)      # a data set of the Hub
"""

from __future__ import annotations

import codecs
import csv
import json
import os
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ecodiff.errors import EcoDiffError
from ecodiff.progress import say
from ecodiff.storage.paths import checked_path

COLUMNS = ("prompt", "caption", "text", "comment", "sentence", "raw")
"""Names of columns that hold prompts, whatever their case, the first that is there."""

HUB = "datasets:"

# Longer marks first: that of UTF-16 begins that of UTF-32.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_LINE_ENDS = re.compile(r"\r\n|\r|\n")


def read_prompts(
    source: str | os.PathLike, *, column: str | None = None, count: int | None = None, seed: int | None = None
) -> list[str]:
    """The prompts of a file or data set, a list of strings without empty ones.

    Args:
        source: a text file with one prompt a line; a TSV or CSV file, with a header, or as GCC3M and Flickr30k have
            them; JSON as MS COCO and Flickr30k have it, or a list; JSON lines; or ``datasets:ID:SPLIT:COLUMN``, of the
            Hub or a local folder, of which split and column may be left out. Text is UTF-8, or UTF-16 and UTF-32 with
            their mark.
        column: name of the column with the prompts, where it is none of ``COLUMNS``.
        count: so many of them; None: all.
        seed: which ones: None the first, a number a random choice, in the order of the file.

    Entries without a prompt are skipped and counted, and one line on standard error says so. Raises EcoDiffError for a
    file that cannot be read, is in another encoding or form, or has too few prompts.
    """
    name = os.fspath(checked_path(source, "read_prompts"))
    entries: Iterable[Any]
    if name.startswith(HUB):
        entries = _of_data_set(name, column)
    else:
        path = Path(source)
        text = _text(path)
        reader = _READERS.get(path.suffix.lower(), _of_lines)
        try:
            entries = reader(text, column, name)
        except (csv.Error, json.JSONDecodeError, RecursionError) as error:
            raise EcoDiffError(f"{name}: this is no {path.suffix.lower()} file ({error}).") from error
    prompts, skipped = _sorted_out(entries)
    if skipped:
        reasons = ", ".join(f"{number} {reason}" for reason, number in sorted(skipped.items()))
        say(f"{name}: {sum(skipped.values())} of {len(prompts) + sum(skipped.values())} entries skipped: {reasons}")
    if not prompts:
        raise EcoDiffError(f"{name}: the file holds no prompt: write one a line.")
    return _chosen(prompts, count, seed, name)


def _chosen(prompts: list[str], count: int | None, seed: int | None, name: str) -> list[str]:
    if count is None:
        return prompts
    if not 1 <= count <= len(prompts):
        raise EcoDiffError(f"{name}: {count} prompts were asked for, and there are {len(prompts)}.")
    if seed is None:
        return prompts[:count]
    numbers = sorted(random.Random(seed).sample(range(len(prompts)), count))
    return [prompts[number] for number in numbers]


def _sorted_out(entries: Iterable[Any]) -> tuple[list[str], Counter]:
    """The prompts, each in one line and without blanks around it, and how many entries had none, by reason."""
    prompts, skipped = [], Counter[str]()
    for entry in entries:
        if not isinstance(entry, str):
            skipped["without a prompt"] += 1
        elif not entry.strip():
            skipped["empty"] += 1
        else:
            prompts.append(re.sub(r"[ \t\r\n]+", " ", entry.strip()))
    return prompts, skipped


def _text(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise EcoDiffError(f"{path}: prompts cannot be read ({error}): give a text file, one prompt a line.") from error
    encoding = next((name for mark, name in _MARKS if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
        if "\0" in text:
            raise ValueError("it holds zero bytes")
    except ValueError as error:  # UnicodeDecodeError is one
        raise EcoDiffError(f"{path}: this is no UTF-8 text ({error}): save the file as UTF-8.") from error
    return text


def _of_lines(text: str, column: str | None, name: str) -> list[str]:
    """One prompt a line; empty lines separate, and are no faults."""
    return [line for line in _LINE_ENDS.split(text) if line.strip()]


def _of_table(text: str, column: str | None, name: str) -> Iterator[Any]:
    """Rows with tabs, commas or bars between cells."""
    lines = [line for line in _LINE_ENDS.split(text) if line.strip()]
    if not lines:
        return iter(())
    delimiter = next((mark for mark in ("\t", "|", ",") if mark in lines[0]), "\t")
    # In TSV a quote is a quote, as GCC3M has them; in CSV it may hold a comma.
    if delimiter == ",":
        table = csv.reader(lines)
    else:
        table = csv.reader(lines, delimiter=delimiter, quoting=csv.QUOTE_NONE)
    rows = [[cell.strip() for cell in row] for row in table]
    place = _place(rows[0], column)
    if place is not None:
        rows = rows[1:]
    elif column is not None:
        raise EcoDiffError(f"{name}: there is no column {column!r}; the first line has {', '.join(rows[0])}.")
    elif re.search(r"#\d+$", rows[0][0]):  # Flickr30k: image.jpg#0, then the caption
        place = 1
    elif len(rows[0]) == 2 and "://" in rows[0][1] or len(rows[0]) == 1:  # GCC3M: caption, then the image's address
        place = 0
    else:
        raise EcoDiffError(
            f"{name}: which column holds the prompts? The first line has {', '.join(rows[0])}; name the column."[:300]
        )
    return (row[place] if place < len(row) else None for row in rows)


def _place(header: list[str], column: str | None) -> int | None:
    """Where the prompts are in a row, by the header; None where the first row is no header."""
    names = [cell.lower() for cell in header]
    for wanted in COLUMNS if column is None else (column.lower(),):
        if wanted in names:
            return names.index(wanted)
    return None


def _of_json(text: str, column: str | None, name: str) -> Iterator[Any]:
    content = json.loads(text)
    if isinstance(content, Mapping) and isinstance(content.get("annotations"), list):  # MS COCO
        content = content["annotations"]
    elif isinstance(content, Mapping) and isinstance(content.get("images"), list):  # Flickr30k, as Karpathy split it
        content = [sentence for image in content["images"] for sentence in image.get("sentences", [None])]
    if not isinstance(content, list):
        raise EcoDiffError(f"{name}: this JSON is no list of prompts, and no captions of MS COCO or Flickr30k.")
    return (_cell(entry, column) for entry in content)


def _of_json_lines(text: str, column: str | None, name: str) -> Iterator[Any]:
    for line in _LINE_ENDS.split(text):
        if line.strip():
            try:
                yield _cell(json.loads(line), column)
            except json.JSONDecodeError:
                yield None


def _cell(entry: Any, column: str | None) -> Any:
    """The prompt of one entry, which is a string or has it under a name; None where it has none."""
    if isinstance(entry, Mapping):
        place = _place(list(map(str, entry)), column)
        entry = None if place is None else list(entry.values())[place]
    if isinstance(entry, list) and entry:  # several captions of one image
        entry = entry[0]
    return entry


def _of_data_set(name: str, column: str | None) -> Iterator[Any]:
    """The prompts of ``datasets:ID:SPLIT:COLUMN``."""
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise EcoDiffError(f"{name}: pip install datasets, to read data sets.") from error
    identity, _, rest = name.removeprefix(HUB).partition(":")
    split, _, own_column = rest.partition(":")
    try:
        rows = datasets.load_dataset(identity, split=split or None)
    except Exception as error:  # what it raises differs from source to source
        raise EcoDiffError(f"{name}: this data set cannot be loaded ({error})."[:400]) from error
    if isinstance(rows, Mapping):
        raise EcoDiffError(
            f"{name}: name one of its splits ({', '.join(rows)}), as in {HUB}{identity}:{list(rows)[0]}."
        )
    column = column or own_column or None
    place = _place(rows.column_names, column)
    if place is None:
        raise EcoDiffError(
            f"{name}: which column holds the prompts? It has {', '.join(rows.column_names)}; "
            f"name one as in {HUB}{identity}:{split}:COLUMN."
        )
    return (_cell(row, column) for row in rows.select_columns(rows.column_names[place]))


_READERS: dict[str, Callable[[str, str | None, str], Iterable[Any]]] = {
    ".tsv": _of_table,
    ".csv": _of_table,
    ".token": _of_table,
    ".json": _of_json,
    ".jsonl": _of_json_lines,
    ".ndjson": _of_json_lines,
}
