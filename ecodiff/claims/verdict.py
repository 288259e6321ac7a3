"""What a claim is, which verdicts there are, and the rules that reach them.

A verdict is about one thing that the claim was decided on: an embedded model, a count at full size, the paper's own
tables. A claim has several. Rules look at intervals of paired differences, so that luck is not taken for a result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errata import Erratum
from ..errors import EcoDiffError
from ..metrics import Interval

REPRODUCED = "reproduced on the embedded family"
NOT_REPRODUCED = "not reproduced on the embedded family"
OPEN = "cannot be told apart"
COUNTED = "at full size: holds"
NOT_COUNTED = "at full size: does not hold"
PRINTED = "the paper's own numbers: hold"
NOT_PRINTED = "the paper's own numbers: do not hold"
CHECKPOINT = "needs the real checkpoint"
MISSING = "not measured here yet"
VERDICTS = (
    REPRODUCED, NOT_REPRODUCED, OPEN, COUNTED, NOT_COUNTED, PRINTED, NOT_PRINTED, CHECKPOINT, MISSING,
)  # fmt: skip
DECIDED = VERDICTS[:7]
IN_FAVOUR, AGAINST = (REPRODUCED, COUNTED, PRINTED), (NOT_REPRODUCED, NOT_COUNTED, NOT_PRINTED)

MARGIN = 0.05
"""Largest loss that counts as none: 0.05 of SSIM, or 5 of 100 pictures."""


@dataclass(frozen=True)
class Decision:
    """A verdict, one of ``VERDICTS``, on something: with its evidence in numbers where it is decided, and where it is
    not with the ``command`` that would decide it, or the reason why there is none."""

    on: str
    verdict: str
    evidence: str = ""
    command: str = ""

    def __post_init__(self):
        if self.verdict not in VERDICTS:
            raise EcoDiffError(f"{self.verdict!r} is no verdict: take one of {', '.join(VERDICTS)}.")
        if not (self.evidence or (self.command and self.verdict not in DECIDED)):
            raise EcoDiffError(f"A verdict {self.verdict!r} on {self.on} needs its evidence.")


@dataclass(frozen=True)
class Claim:
    """Something that the paper says, in our words: where it stands, what decides it, and what was decided.

    ``shown`` names chapters that show the evidence, the best first (stems of their files).
    """

    where: str
    says: str
    test: str
    shown: tuple[str, ...]
    decisions: tuple[Decision, ...]

    @property
    def decided(self) -> bool:
        """Whether there is any verdict from numbers."""
        return any(decision.verdict in DECIDED for decision in self.decisions)


def better(differences: Sequence[Interval]) -> str:
    """Verdict on "the first is better": more by some measure and less by none, each outside its interval of first -
    second."""
    signs = {d.sign for d in differences}
    return OPEN if (1 in signs) == (-1 in signs) else REPRODUCED if 1 in signs else NOT_REPRODUCED


def kept(differences: Sequence[Interval], margin: float = MARGIN) -> str:
    """Verdict on "the first loses nothing": all intervals of first - second lie above -margin; or one lies below."""
    if any(d.high < -margin for d in differences):
        return NOT_REPRODUCED
    return REPRODUCED if all(d.low > -margin for d in differences) else OPEN


def lower(difference: Interval) -> str:
    """Verdict on "the first is lower", such as a FID."""
    return {-1: REPRODUCED, 0: OPEN, 1: NOT_REPRODUCED}[difference.sign]


def together(decisions: Sequence[Decision], on: str) -> Decision:
    """One decision on "all of these": as bad as the worst; missing where one is missing and none contradicts."""
    verdicts = [decision.verdict for decision in decisions]
    worst = next((v for v in (NOT_REPRODUCED, MISSING, OPEN) if v in verdicts), REPRODUCED)
    evidence = "; ".join(decision.evidence for decision in decisions if decision.evidence)
    command = next((decision.command for decision in decisions if decision.command), "")
    return Decision(on, worst, evidence, command if worst == MISSING else "")


def printed(on: str, holds: bool, evidence: str) -> Decision:
    """A decision on the paper's own numbers, or on its formulas with its own constants."""
    return Decision(on, PRINTED if holds else NOT_PRINTED, evidence)


def contradicted(erratum: Erratum) -> Decision:
    """A decision on the paper's own numbers by an erratum, whose lines that disagree are the evidence."""
    wrong = [line for line in erratum.lines if not line.agrees] or erratum.lines
    evidence = "; ".join(f"{line.what}: printed {line.published}, computed {line.computed}" for line in wrong)
    return printed(erratum.where, not erratum.confirmed, evidence)


def checkpoint(model: str, command: str) -> Decision:
    """What only a published checkpoint can decide, and the command that would."""
    return Decision(model, CHECKPOINT, command=command)
