"""Bytes as people write them, and what of a GPU's memory a model can use."""

from __future__ import annotations

import re

from ecodiff.errors import EcoDiffError

# Letters count in decimal steps, as makers of GPUs and disks print sizes; only "GiB" and its like mean powers of two.
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}

# Beside what the allocator hands out, a GPU holds the CUDA context, and fragments: assumed, not measured.
CONTEXT, FRAGMENTS = 500_000_000, 0.03


def parse_bytes(text: int | str) -> int:
    """Bytes of a size such as "24GB" (10^9), "8 GiB" (2^30) or a number of bytes; EcoDiffError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    if not match or match[2].upper() not in _UNITS or not float(match[1]):
        raise EcoDiffError(f"{text!r} is no amount of memory: write it as 24GB, 8GiB or a number of bytes.")
    return round(float(match[1]) * _UNITS[match[2].upper()])


def usable(budget: int | str) -> int:
    """What the allocator can hand out of a GPU's memory: less 0.5 GB for the CUDA context and 3 % lost to fragments."""
    return max(round(parse_bytes(budget) * (1 - FRAGMENTS)) - CONTEXT, 0)


def gb(size: int) -> str:
    """Bytes as text in GB (10^9), three digits."""
    value = size / 1e9
    decimals = 2
    if value >= 10:
        decimals = 1
    if value >= 100:
        decimals = 0
    return f"{value:,.{decimals}f} GB"
