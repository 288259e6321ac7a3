"""How an erratum shows its computation."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Line:
    """One quantity as the paper has it and as it was computed here. Lines that agree are there for comparison."""

    what: str
    published: str
    computed: str
    agrees: bool


@dataclass(frozen=True)
class Erratum:
    """Where the paper says something, the lines that check it, and what follows."""

    where: str
    conclusion: str
    lines: tuple[Line, ...]

    @property
    def confirmed(self) -> bool:
        """Whether at least one line disagrees."""
        return not all(line.agrees for line in self.lines)

    def rows(self) -> list[dict[str, str]]:
        """The lines as rows of a table."""
        return [
            {
                "where": self.where,
                "quantity": line.what,
                "published": line.published,
                "computed": line.computed,
                "agrees": "yes" if line.agrees else "no",
            }
            for line in self.lines
        ]


def number(what: str, published: float, computed: float, digits: int = 2) -> Line:
    """A line that agrees where the computed value rounds to the published one at this many digits."""
    agrees = abs(published - computed) <= 0.5 * 10**-digits + 1e-9
    return Line(what, f"{published:.{digits}f}", f"{computed:.{max(digits, 2)}f}", agrees)
