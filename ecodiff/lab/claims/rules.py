"""What a claim is, which verdicts there are, and the rules that reach them.

A verdict is about one thing that the claim was decided on: an embedded model, a count at full size, the paper's own
tables. A claim has several. Rules look at intervals of paired differences, so that luck is not taken for a result, and
ask one smallest effect of interest (``ecodiff.metrics.SMALLEST_EFFECT``) both of a gain and of a loss: no difference
can be a gain for one claim and nothing for another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ecodiff.errors import EcoDiffError
from ecodiff.lab.errata import Erratum
from ecodiff.metrics.intervals import SMALLEST_EFFECT, Interval

REPRODUCED = "reproduced on the embedded family"
NOT_REPRODUCED = "not reproduced on the embedded family"
UNDECIDED = "undecided"
DISAGREE = "measures disagree"
COUNTED = "at full size: holds"
NOT_COUNTED = "at full size: does not hold"
PRINTED = "the paper's own numbers: hold"
NOT_PRINTED = "the paper's own numbers: do not hold"
CHECKPOINT = "needs the real checkpoint"
MISSING = "not measured here yet"
IN_FAVOUR, AGAINST = (REPRODUCED, COUNTED, PRINTED), (NOT_REPRODUCED, NOT_COUNTED, NOT_PRINTED)
DECIDED = (REPRODUCED, NOT_REPRODUCED, DISAGREE, UNDECIDED, COUNTED, NOT_COUNTED, PRINTED, NOT_PRINTED)
"""Verdicts that rest on numbers, of which some settle nothing."""
VERDICTS = (*DECIDED, CHECKPOINT, MISSING)
HOLDS, FAILS, MIXED, UNSETTLED, OPEN = "holds", "fails", "mixed", "undecided", "open"
OVERALL = (HOLDS, FAILS, MIXED, UNSETTLED, OPEN)
"""One word for a claim with all its verdicts."""
SCALES = {
    "paper's numbers": (PRINTED, NOT_PRINTED),
    "full size": (COUNTED, NOT_COUNTED),
    "small models": (REPRODUCED, NOT_REPRODUCED),
}
"""What decided: verdicts of each scale; the others of ``DECIDED`` are told apart by what they are about."""


@dataclass(frozen=True)
class Decision:
    """A verdict on one thing that the claim was decided on.

    ``verdict`` is one of ``VERDICTS``. A verdict from numbers comes with its ``evidence``; an open one comes with the
    ``command`` that would decide it, or with the reason why there is none. Raises EcoDiffError otherwise.
    """

    on: str
    verdict: str
    evidence: str = ""
    command: str = ""
    varies: tuple[str, ...] = ()
    """The fields in which two compared rows differ; everything else is the same in both."""

    def __post_init__(self):
        if self.verdict not in VERDICTS:
            raise EcoDiffError(f"{self.verdict!r} is no verdict: take one of {', '.join(VERDICTS)}.")
        if not (self.evidence or (self.command and self.verdict not in DECIDED)):
            raise EcoDiffError(f"A verdict {self.verdict!r} on {self.on} needs its evidence.")

    @property
    def scale(self) -> str:
        """What it rests on: one of ``SCALES``, or "open" where nothing does."""
        for scale, verdicts in SCALES.items():
            if self.verdict in verdicts:
                return scale
        if self.verdict not in DECIDED:
            return OPEN
        if "(small, for" in self.on:
            return "small models"
        if self.on.lower().startswith(("table", "published version")):
            return "paper's numbers"
        return "full size"


def overall(decisions: Sequence[Decision]) -> str:
    """One word for several decisions: what all that rest on numbers say, and "mixed" where they differ."""
    words = set()
    for decision in decisions:
        if decision.verdict in IN_FAVOUR:
            words.add(HOLDS)
        elif decision.verdict in AGAINST:
            words.add(FAILS)
        elif decision.verdict in DECIDED:
            words.add(UNSETTLED)
    if not words:
        return OPEN
    return words.pop() if len(words) == 1 else MIXED


@dataclass(frozen=True)
class Question:
    """A decision that depends on which full-size models may be counted: ``decide(presets)`` returns it."""

    decide: Callable[[Sequence[str]], Decision]


@dataclass(frozen=True)
class Claim:
    """Something that the paper says, in our words: where it stands, what decides it, and what was decided.

    ``shown`` names chapters that show the evidence, the best first (stems of their files).
    """

    where: str
    says: str
    test: str
    shown: tuple[str, ...]
    decisions: tuple[Decision | Question, ...]
    name: str = ""
    """The name of its function, from which the address of its card is made."""

    def answered(self, presets: Sequence[str]) -> Claim:
        """The same claim with every question answered, these full-size models being counted."""
        decisions = []
        for decision in self.decisions:
            if isinstance(decision, Question):
                decision = decision.decide(presets)
            decisions.append(decision)
        return replace(self, decisions=tuple(decisions))

    @property
    def decided(self) -> bool:
        """Whether there is any verdict from numbers."""
        return any(decision.verdict in DECIDED for decision in self.decisions)


def better(differences: Sequence[Interval], smallest: float = SMALLEST_EFFECT) -> str:
    """Verdict on "the first is better": it has more by some measure and less by none.

    ``differences`` are intervals of first - second, one a measure. "More" is an interval wholly above ``smallest``,
    "not less" one wholly above ``-smallest``. Where one measure has more and another less, they disagree. The first is
    not better where some measure has less, or where none can have more.
    """
    more = any(d.low > smallest for d in differences)
    less = any(d.high < -smallest for d in differences)
    if more and less:
        return DISAGREE
    if less or all(d.high < smallest for d in differences):
        return NOT_REPRODUCED
    if more and all(d.low > -smallest for d in differences):
        return REPRODUCED
    return UNDECIDED


def kept(differences: Sequence[Interval], smallest: float = SMALLEST_EFFECT) -> str:
    """Verdict on "the first loses nothing": all intervals of first - second lie wholly above ``-smallest``.

    It loses where one lies wholly below; where another lies wholly above ``smallest``, the measures disagree.
    """
    more = any(d.low > smallest for d in differences)
    less = any(d.high < -smallest for d in differences)
    if more and less:
        return DISAGREE
    if less:
        return NOT_REPRODUCED
    if all(d.low > -smallest for d in differences):
        return REPRODUCED
    return UNDECIDED


def lower(difference: Interval) -> str:
    """Verdict on "the first is lower", such as a FID: by the sign alone, since the claim names no size."""
    return {-1: REPRODUCED, 0: UNDECIDED, 1: NOT_REPRODUCED}[difference.sign]


def together(decisions: Sequence[Decision], on: str) -> Decision:
    """One decision on "all of these hold": as bad as the worst; missing where one is missing and none contradicts."""
    verdicts = {decision.verdict for decision in decisions}
    worst = REPRODUCED
    for verdict in (NOT_REPRODUCED, DISAGREE, MISSING, UNDECIDED):  # the worst first
        if verdict in verdicts:
            worst = verdict
            break
    evidence = "; ".join(decision.evidence for decision in decisions if decision.evidence)
    varies: dict[str, None] = {}  # a set that keeps its order
    for decision in decisions:
        varies |= dict.fromkeys(decision.varies)
    command = ""
    if worst == MISSING:
        command = next((decision.command for decision in decisions if decision.command), "")
    return Decision(on, worst, evidence, command, tuple(varies))


def printed(on: str, holds: bool, evidence: str) -> Decision:
    """A decision on the paper's own numbers, or on its formulas with its own constants."""
    return Decision(on, PRINTED if holds else NOT_PRINTED, evidence)


def contradicted(erratum: Erratum) -> Decision:
    """A decision on the paper's own numbers by an erratum, whose lines that disagree are the evidence."""
    lines = [line for line in erratum.lines if not line.agrees]
    if not lines:  # then the lines that agree say why the paper is right
        lines = list(erratum.lines)
    evidence = "; ".join(f"{line.what}: printed {line.published}, computed {line.computed}" for line in lines)
    return printed(erratum.where, not erratum.confirmed, evidence)


def checkpoint(model: str, command: str) -> Decision:
    """A decision that waits for a published checkpoint, with the command that would reach it."""
    return Decision(model, CHECKPOINT, command=command)
