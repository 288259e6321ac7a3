"""How many units kernels want a multiple of, by the name of what runs them.

A kernel reads rows of a fixed number of bytes. What it wants is therefore a multiple of *channels*, and a unit has one
channel (a neuron) or many (a head). Needs no torch, so that command lines can offer the names.
"""

from __future__ import annotations

import math

from ecodiff.errors import EcoDiffError

MULTIPLES = {"tensor-cores": 8, "int8": 16, "fp8": 16, "2:4": 64}
"""Channels by name.

- tensor-cores, int8: rows of 16 bytes, which are 8 channels of fp16 or bf16 and 16 of int8. Other sizes run, but
  slower, and before cuBLAS 11 without tensor cores (NVIDIA, Matrix Multiplication Background User's Guide, section
  "Tensor Core Requirements").
- fp8: `torch._scaled_mm` refuses matrices whose sides are no multiples of 16 (its check in
  torch/_meta_registrations.py).
- 2:4: `torch.sparse.to_sparse_semi_structured` refuses weights in fp16 or bf16 whose rows are no multiples of 32 or
  whose columns are none of 64 with CUTLASS (`_DTYPE_SHAPE_CONSTRAINTS` in torch/sparse/semi_structured.py).
"""


def units_multiple(round_to, unit_size: int) -> int:
    """The multiple of units that ``round_to`` stands for, where a unit has ``unit_size`` channels.

    round_to: a number of units, or a name in `MULTIPLES`. Raises EcoDiffError for anything else.
    """
    if isinstance(round_to, str):
        if round_to not in MULTIPLES:
            raise EcoDiffError(
                f"make_mask: round_to is a whole number of units or one of {', '.join(MULTIPLES)}; not {round_to!r}."
            )
        channels = MULTIPLES[round_to]
        return channels // math.gcd(channels, unit_size)
    if isinstance(round_to, bool) or not isinstance(round_to, int) or round_to < 1:
        raise EcoDiffError(f"make_mask: round_to must be a whole number of at least 1, not {round_to!r}.")
    return round_to
