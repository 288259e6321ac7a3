"""The paper's claims, each with the code that decides it.

Every claim is a function without arguments that returns a ``Claim``: where it stands, what it says in our words, what
decides it, and the decisions that follow today from recorded rows, counts and the paper's own numbers. Rows that
arrive later change the decisions and nothing here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from .ablations import ABLATIONS
from .comparisons import COMPARISONS
from .cost import COST
from .memory import MEMORY
from .method import METHOD
from .on_embedded import FAMILY
from .on_full_size import PRESETS
from .results import RESULTS
from .reviewers import REVIEWERS
from .rules import AGAINST, DECIDED, IN_FAVOUR, VERDICTS, Claim, Decision

GROUPS: dict[str, tuple[Callable[[], Claim], ...]] = {
    "method": METHOD,
    "results": RESULTS + COMPARISONS,
    "ablations": ABLATIONS,
    "cost": COST + MEMORY,
}
CLAIMS = tuple(claim for group in GROUPS.values() for claim in group)


def check(claims: Iterable[Callable[[], Claim]] = CLAIMS, presets: Sequence[str] = PRESETS) -> list[Claim]:
    """Decide them all, in order. ``presets``: the full-size models that are counted where no count is recorded."""
    return [claim().answered(presets) for claim in claims]


def tally(claims: Iterable[Claim]) -> dict[str, int]:
    """Number of decisions for each verdict, in the order of ``VERDICTS``."""
    found = Counter(decision.verdict for claim in claims for decision in claim.decisions)
    return {verdict: found[verdict] for verdict in VERDICTS}


__all__ = [
    "AGAINST",
    "CLAIMS",
    "DECIDED",
    "FAMILY",
    "GROUPS",
    "IN_FAVOUR",
    "REVIEWERS",
    "VERDICTS",
    "Claim",
    "Decision",
    "check",
    "tally",
]
