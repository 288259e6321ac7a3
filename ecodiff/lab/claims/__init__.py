"""The paper's claims, each with the code that decides it.

Every claim is a function without arguments that returns a ``Claim``: where it stands, what it says in our words, what
decides it, and the decisions that follow today from recorded rows, counts and the paper's own numbers. Rows that
arrive later change the decisions and nothing here.

``CLAIMS`` are the preprint's, in ``GROUPS``; ``PUBLISHED`` are those that the published version adds or changes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from .ablations import ABLATIONS
from .comparisons import COMPARISONS
from .cost import COST
from .memory import MEMORY
from .method import METHOD
from .on_embedded import FAMILY
from .on_full_size import PRESETS
from .published import PUBLISHED
from .results import RESULTS
from .reviewers import REVIEWERS
from .rules import AGAINST, DECIDED, IN_FAVOUR, OVERALL, VERDICTS, Claim, Decision, overall

GROUPS: dict[str, tuple[Callable[[], Claim], ...]] = {
    "method": METHOD,
    "results": RESULTS + COMPARISONS,
    "ablations": ABLATIONS,
    "cost": COST + MEMORY,
}
CLAIMS: tuple[Callable[[], Claim], ...] = sum(GROUPS.values(), ())


def check(claims: Iterable[Callable[[], Claim]] = CLAIMS, presets: Sequence[str] = PRESETS) -> list[Claim]:
    """The claims with all their decisions, in order.

    ``presets`` names the full-size models that may be counted; what needs others stays open.
    """
    checked = []
    for claim in claims:
        checked.append(replace(claim().answered(presets), name=claim.__name__))
    return checked


def tally(claims: Iterable[Claim]) -> dict[str, int]:
    """Number of decisions for each verdict, in the order of ``VERDICTS``."""
    counts: Counter[str] = Counter()
    for claim in claims:
        counts.update(decision.verdict for decision in claim.decisions)
    return {verdict: counts[verdict] for verdict in VERDICTS}


__all__ = [
    "AGAINST",
    "CLAIMS",
    "DECIDED",
    "FAMILY",
    "GROUPS",
    "IN_FAVOUR",
    "OVERALL",
    "PUBLISHED",
    "REVIEWERS",
    "VERDICTS",
    "Claim",
    "Decision",
    "check",
    "overall",
    "tally",
]
