"""A report on sentences that are long: ``python -m ecodiff book sentences``. It decides nothing.

What counts as a sentence is prose of chapters and pages: no code, table, heading, formula or directive. Inline code, a
formula in the text and a reference count as one word each.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from ecodiff.storage.paths import root

from . import build

MOST = 35
ONE_WORD = re.compile(r"\{[\w:-]+\}`[^`]*`|`[^`]+`|\$[^$]+\$")
LINK = re.compile(r"!?\[([^\]]*)\]\([^)]*\)")
END = re.compile(r"((?<![.\s][A-Za-z])(?<!e\.g)(?<!i\.e)(?<!\bFig)(?<!\bEq)(?<!\bApp)[.!?][\"')*”]*)\s+(?=\W*[A-Z0-9])")
NO_PROSE = re.compile(r"\s*(\||#|:\w|:::|<|\(\S+\)=$|%|---|\+\+\+|\[\^)")
ITEM = re.compile(r"\s*([-*]|\d+\.)\s+")


def long_sentences(text: str, most: int = MOST) -> list[tuple[int, str]]:
    """Sentences of a Markdown text with more words than ``most``, (words, sentence), in the order of the text."""
    found = []
    for paragraph in paragraphs(text):
        plain = LINK.sub(r"\1", ONE_WORD.sub("Xx", paragraph))
        for sentence in END.sub(r"\1\n", plain).splitlines():
            words = len(re.findall(r"\w\S*", sentence))
            if words > most:
                found.append((words, sentence))
    return found


def paragraphs(text: str) -> Iterator[str]:
    """Paragraphs and items of lists, each in one line."""
    lines: list[str] = []
    fence, in_list = "", False
    for line in [*re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.S).splitlines(), ""]:
        mark = re.match(r"\s*(`{3,}|\$\$)", line)
        outside = not fence
        if mark and outside:
            fence = mark[1]
        elif mark and mark[1] == fence:
            fence = ""
        breaks = mark or fence or not line.strip() or NO_PROSE.match(line)
        item = ITEM.match(line)
        # A line inside a paragraph that begins with "4. The" ends a sentence; it is an item only after another one.
        if item and lines and item[1] not in ("-", "*", "1.") and not in_list:
            item = None
        if (breaks or item) and lines:
            yield " ".join(lines)
            lines = []
        if not breaks:
            in_list = bool(item) or (in_list and bool(lines))
            lines.append(line[item.end() :] if item else line.strip())


def report(base: Path | None = None) -> list[str]:
    """A line for each page, with its long sentences under it, and a last line with how many there are."""
    base = base or root()
    lines, number = [], 0
    for path in [*build.sources(base), *sorted((base / "book").glob("*.md"))]:
        long = long_sentences(path.read_text(encoding="utf-8"))
        number += len(long)
        if long:
            lines.append(f"{path.relative_to(base)}: {len(long)}")
        for words, sentence in long:
            lines.append(f"    {words} words: {sentence}")
    return [*lines, f"{number} sentences have more than {MOST} words."]
