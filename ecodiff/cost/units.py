"""Bytes as people write them, and what of a GPU's memory a model can use."""

from __future__ import annotations

import re

from ecodiff.errors import EcoDiffError

_UNITS = {"": 1, "B": 1} | {
    f"{p}{b}": k**i for i, p in enumerate("KMGT", 1) for b, k in (("", 1000), ("B", 1000), ("IB", 1024))
}


# Beside what the allocator hands out, a GPU holds the CUDA context, and fragments: assumed, not measured.
CONTEXT, FRAGMENTS = 500_000_000, 0.03


def parse_bytes(text: int | str) -> int:
    """Bytes of a size such as "24GB" (10^9), "8 GiB" (2^30) or a number of bytes; EcoDiffError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    if isinstance(text, bool) or not match or match[2].upper() not in _UNITS or not float(match[1]):
        raise EcoDiffError(f"{text!r} is no amount of memory: write it as 24GB, 8GiB or a number of bytes.")
    return round(float(match[1]) * _UNITS[match[2].upper()])


def usable(budget: int | str) -> int:
    """What the allocator can hand out of a GPU's memory: less 0.5 GB for the CUDA context and 3 % lost to fragments."""
    return max(round(parse_bytes(budget) * (1 - FRAGMENTS)) - CONTEXT, 0)


def gb(size: int) -> str:
    """Bytes as text in GB (10^9), three digits."""
    value = size / 1e9
    return f"{value:,.0f} GB" if value >= 100 else f"{value:.1f} GB" if value >= 10 else f"{value:.2f} GB"
