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
        where = "; ".join(filter(None, (claim.where, _link(claim.shown))))
        head = {"no.": str(number), "claim": f"{claim.says} *Decided by:* {claim.test}", "where": where}
        for on, verdict, evidence, varies in _grouped(claim):
            told = _spaced(f"*{on}:* {evidence}{varies}" if evidence else f"*{on}*")
            table.append({**head, "verdict": f"**{verdict}**", "evidence": told})
            head = dict.fromkeys(head, "")  # said once
    return table


def waiting(claims: Sequence[Claim], first: int = 1) -> list[dict[str, str]]:
    """Commands that would decide what is open, each with the numbers of the claims that wait for it."""
    numbers: dict[str, list[str]] = {}
    for number, claim in enumerate(claims, first):
        for command in dict.fromkeys(decision.command for decision in claim.decisions if decision.command):
            numbers.setdefault(command, []).append(str(number))
    return [{"command": f"`{command}`", "decides claims": ", ".join(found)} for command, found in numbers.items()]


def _grouped(claim: Claim) -> list[tuple[str, str, str, str]]:
    """Decisions as (on, verdict, evidence, what is varied); those that are open for the same reason are one."""
    groups: dict[tuple, list[str]] = {}
    for i, decision in enumerate(claim.decisions):
        own = i if decision.verdict in DECIDED else -1
        varies = f" (varied: {', '.join(decision.varies)})" if decision.varies else ""
        groups.setdefault((decision.verdict, decision.evidence, varies, own), []).append(decision.on)
    return [
        ("; ".join(dict.fromkeys(on)), verdict, evidence, varies)
        for (verdict, evidence, varies, _), on in groups.items()
    ]


def _link(stems: Sequence[str]) -> str:
    """A link to the first of these chapters that is there."""
    found = next((stem for stem in stems if (root() / "notebooks" / f"{stem}.md").is_file()), None)
    return f"[]({found}.ipynb)" if found else ""


def _spaced(text: str) -> str:
    return re.sub(r"(\d)%", r"\1 %", text)
