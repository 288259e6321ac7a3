"""Claims as cards of a page: one word for all verdicts of a claim, and the verdicts folded below it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ecodiff.storage.paths import root

from .rules import AGAINST, DECIDED, FAILS, HOLDS, IN_FAVOUR, MIXED, OPEN, UNSETTLED, Claim, Decision, overall

BADGES = {
    HOLDS: ("success", "✓"),
    FAILS: ("danger", "✗"),
    MIXED: ("warning", "±"),
    UNSETTLED: ("secondary", "?"),
    OPEN: ("secondary-line", "○"),
}
"""Colour and mark of each word. The theme has each colour for light and for dark pages; the mark needs no colour."""


def badge(word: str) -> str:
    """A word of ``OVERALL`` with its mark, on its colour; another word, such as "shown", on none."""
    colour, mark = BADGES.get(word, ("info-line", "·"))
    return f"{{bdg-{colour}}}`{mark} {word}`"


def anchor(claim: Claim) -> str:
    """The label of a claim's card, the same in every build: "claim-no-loss"."""
    return f"claim-{claim.name.replace('_', '-')}"


def cards(claims: Sequence[Claim], first: int = 1, prefix: str = "") -> str:
    """The claims as Markdown, numbered from ``first`` after ``prefix``: a card each.

    A card shows number, word and sentence. It unfolds to the claim's place, what decides it, and each verdict.
    """
    return "\n\n".join(_card(claim, f"{prefix}{number}") for number, claim in enumerate(claims, first))


def _card(claim: Claim, number: str) -> str:
    places = [place for place in (claim.where, _link(claim.shown)) if place]
    lines = [
        f"({anchor(claim)})=",
        f":::{{dropdown}} {number} {badge(overall(claim.decisions))} {claim.says}",
        ":class-container: claim",
        "",
        f"*{places[0]}*" + "".join(f" · {place}" for place in places[1:]) + f" · {counts(claim.decisions)}",
        "",
        f"*Decided by:* {claim.test}",
        "",
        *(f"- {line}" for line in verdicts(claim)),
        ":::",
    ]
    return "\n".join(lines)


def change_cards(changes: Sequence[dict[str, str]]) -> str:
    """Changes of claims (``published.changes``) as Markdown: an open card each, with a link to the claim's own card."""
    return "\n\n".join(
        "\n".join(
            [
                f":::{{dropdown}} {change['number']} {change['claim']}",
                ":class-container: claim",
                ":open:",
                "",
                f"*Published version (second-hand):* {change['later']}",
                "",
                f"*What this does to the verdict:* {change['effect']} {{ref}}`All verdicts <{change['anchor']}>`",
                ":::",
            ]
        )
        for change in changes
    )


def counts(decisions: Sequence[Decision]) -> str:
    """How many verdicts of each direction there are: "2 verdicts for, 1 against, 1 open"."""
    number = {"for": 0, "against": 0, "undecided": 0, "open": 0}
    for decision in decisions:
        if decision.verdict in IN_FAVOUR:
            number["for"] += 1
        elif decision.verdict in AGAINST:
            number["against"] += 1
        elif decision.verdict in DECIDED:
            number["undecided"] += 1
        else:
            number["open"] += 1
    parts = [f"{count} {word}" for word, count in number.items() if count]
    first, _, rest = parts[0].partition(" ")
    parts[0] = f"{first} verdict{'' if first == '1' else 's'} {rest}"
    return ", ".join(parts)


def verdicts(claim: Claim) -> list[str]:
    """A line for each verdict with its evidence; those that are open for the same reason share one."""
    lines = []
    for on, verdict, evidence, varies in _grouped(claim):
        text = f"**{verdict}:** {on}"
        if evidence:
            text += f". {evidence[0].upper()}{evidence[1:]}{varies}"
        lines.append(_spaced(text))
    return lines


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
