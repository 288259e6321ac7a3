"""Claims as rows of the tables of a page."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ecodiff.storage.paths import root

from .rules import DECIDED, Claim


def lines(claims: Sequence[Claim], first: int = 1) -> list[dict[str, str]]:
    """A row for each decision, claims numbered from ``first``; what is open for the same reason shares a row.

    The column "where" has the place in the paper and a link to the chapter that shows the evidence.
    """
    table = []
    for number, claim in enumerate(claims, first):
        places = [place for place in (claim.where, _link(claim.shown)) if place]
        head = {
            "no.": str(number),
            "claim": f"{claim.says} *Decided by:* {claim.test}",
            "where": "; ".join(places),
        }
        for on, verdict, evidence, varies in _grouped(claim):
            text = f"*{on}*"
            if evidence:
                text = f"*{on}:* {evidence}{varies}"
            table.append({**head, "verdict": f"**{verdict}**", "evidence": _spaced(text)})
            head = dict.fromkeys(head, "")  # further decisions of a claim stand below its first, without its text
    return table


def waiting(claims: Sequence[Claim], first: int = 1) -> list[dict[str, str]]:
    """Commands that would decide what is open, each with the numbers of the claims that wait for it."""
    numbers: dict[str, list[str]] = {}
    for number, claim in enumerate(claims, first):
        commands = dict.fromkeys(decision.command for decision in claim.decisions if decision.command)
        for command in commands:
            numbers.setdefault(command, []).append(str(number))
    return [{"command": f"`{command}`", "decides claims": ", ".join(those)} for command, those in numbers.items()]


def _grouped(claim: Claim) -> list[tuple[str, str, str, str]]:
    """Decisions as (on, verdict, evidence, what is varied); those that are open for the same reason are one."""
    groups: dict[tuple, list[str]] = {}
    for number, decision in enumerate(claim.decisions):
        varies = ""
        if decision.varies:
            varies = f" (varied: {', '.join(decision.varies)})"
        group: tuple = (decision.verdict, decision.evidence, varies)
        if decision.verdict in DECIDED:
            group += (number,)  # its own number keeps a decided one apart from all others
        groups.setdefault(group, []).append(decision.on)
    rows = []
    for (verdict, evidence, varies, *_), on in groups.items():
        rows.append(("; ".join(dict.fromkeys(on)), verdict, evidence, varies))
    return rows


def _link(stems: Sequence[str]) -> str:
    """A link to the first of these chapters that is there, without a text: the book puts the chapter's title there."""
    for stem in stems:
        if (root() / "notebooks" / f"{stem}.md").is_file():
            return f"[]({stem}.ipynb)"
    return ""


def _spaced(text: str) -> str:
    """The text with a space between each number and its percent sign, as in the book's prose."""
    return re.sub(r"(\d)%", r"\1 %", text)
