"""Terms of ``book/glossary.md`` in the chapters: the first use of each becomes a link, which shows the definition.

`link_first_uses` writes the links into the pages that are built, so that sources and notebooks stay plain text.
`script` is what shows the definition where a link is pointed at, has the focus, or is tapped; it needs no network.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import nbformat

# A word that also means something else is a term only in such words; the term is the group.
FORMS = {
    "cell": r"\b(?:each|retrained|measured|recorded) (cells?)\b",
    "claim": r"\b(?:the|each|this|these|no) (claims?)\b",
    "judge": r"\bthe (judge)\b",
    "price of open gates": r"\b(?:the|a) (price)\b(?! of (?:both|a))",
    "probe": r"\bthe (probe)\b",
    "ratio": r"\b(?:same|equal|wanted|which) (ratios?)\b",
    "right": r"\b(?:images?|facts) (?:is|are) (right)\b|\b(right) images\b",
    "row": r"\brecorded (rows?)\b",
    "score": r"\b(?:importance|how|a|each|good|other|these|which|by) (scores?)\b",
    "step distillation": r"\b(step[- ]distill(?:ed|ation))\b",
    "study": r"\bthe (study) (?=[`*])",
    "two-four sparsity": r"(?<![\d:])(2:4)(?![\d:])",
    "unit": r"\b(units?)\b(?! of (?:work|memory))",
}
# Where no link can stand, or none belongs: code, formulas, roles, links, headings, tables, options and first lines of
# directives, labels, and blocks that are no running text.
PROSE = "admonition|note|tip|warning|important|hint"
PROTECTED = re.compile(
    rf"""
    ^(`{{3,}}).*?^\1`*[ ]*$                     # fenced code, and directives with backticks
    | ^:::+\{{(?!(?:{PROSE})\}}).*?^:::+[ ]*$   # directives that are no boxes of running text
    | ^(?::::|:[\w-]+:|\#|[ ]*\||\([\w-]+\)=)[^\n]*
    | \$\$.*?\$\$ | \$[^$\n]+\$
    | (?:\{{[\w:.-]+\}})?(`+)(?!`).*?(?<!`)\2(?!`)
    | \[[^\]\n]*\](?:\([^)]*\))? | <[^>\n]+> | https?://\S+
    """,
    re.M | re.S | re.X,
)


def definitions(glossary: Path) -> dict[str, str]:
    """The text of each term of a glossary page (MyST), roles and marks taken off."""
    body = re.search(r"```\{glossary\}\n(.*?)\n```", glossary.read_text(encoding="utf-8"), re.S)
    if body is None:
        return {}
    found = {}
    for term, text in re.findall(r"^(\S.*)\n  (\S.*)$", body[1], re.M):
        words = re.sub(r"\{\w+\}`([^`<]+?)(?: <[^>]*>)?`", r"\1", text)
        found[term] = re.sub(r"[`*]", "", words)
    return found


def script(terms: dict[str, str]) -> str:
    """The script of the pages; a term is found by the end of its address, without regard to case."""
    by_address = {}
    for term, text in terms.items():
        by_address[re.sub(r"[^a-z0-9]+", "-", term.lower())] = [term, text]
    code = Path(__file__).with_name("glossary.js").read_text(encoding="utf-8")
    return code.replace("CONSTANTS", json.dumps(by_address))


def link_first_uses(page: nbformat.NotebookNode, terms: list[str]) -> None:
    """Make the first use of each term in the text cells of a page a link to the glossary, where it is not one yet."""
    todo = set(terms)
    for cell in page.cells:
        if cell.cell_type == "markdown":
            cell.source = _linked(cell.source, todo)


def _linked(text: str, todo: set[str]) -> str:
    """The text with links; takes the terms that it has linked, or finds linked, from ``todo``."""
    protected = [match.span() for match in PROTECTED.finditer(text)]
    places = []
    for written in re.finditer(r"\{term\}`(?:[^`<]*<)?([^`>]+)>?`", text):
        places.append((written.start(), written.end(), written[1], True))
    for term in todo:
        places += [(start, end, term, False) for start, end in _uses(term, text, protected)]
    changes, reached = [], 0
    # In the order of the text, and of two terms that begin together the longer one.
    for start, end, term, is_link in sorted(places, key=_place):
        if term in todo and start >= reached:
            todo.discard(term)
            reached = end
            if not is_link:
                changes.append((start, end, term))
    for start, end, term in reversed(changes):
        word = text[start:end]
        link = term if word == term else f"{word} <{term}>"
        text = f"{text[:start]}{{term}}`{link}`{text[end:]}"
    return text


def _place(use: tuple[int, int, str, bool]) -> tuple[int, int]:
    return use[0], -use[1]


def _uses(term: str, text: str, protected: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Where a text uses a term, in its singular or plural, outside what is protected."""
    pattern = FORMS.get(term, rf"\b({re.escape(term)}s?)\b".replace(r"\ ", r"\s"))
    uses = []
    for match in re.finditer(pattern, text, re.I):
        start, end = match.span(match.lastindex)
        if not any(first < end and start < last for first, last in protected):
            uses.append((start, end))
    return uses
