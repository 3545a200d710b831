"""Codes that stand for the numbers of a table instead of for themselves.

A 4-bit float is stored as its bit pattern n in 0..15, packed like the integer code n - 8; the
layer multiplies with `TABLES[kind, bits][n]`. Another table is another entry here and a kind in
`scheme.BITS`.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

_E2M1: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# NormalFloat of QLoRA (2023, arXiv 2305.14314, appendix E).
_NF4: Final = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
# FP4 of bitsandbytes; its subnormal number is a sixteenth of what E2M1 would have.
_FPB: Final = tuple(value / 12 for value in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0))
TABLES: Final[dict[tuple[str, int], tuple[float, ...]]] = {
    # E2M1 of the OCP Microscaling Formats specification v1.0 (2023); the high bit is the sign.
    ("fp", 4): (*_E2M1, *(-value for value in _E2M1)),
    ("nf", 4): _NF4,
    ("fpb", 4): (*_FPB, *(-value for value in _FPB)),
}


def look_up(codes: Tensor, kind: str, bits: int) -> Tensor:
    """The numbers that int8 codes stand for: float32 by table, or the codes where there is none.

    >>> look_up(torch.tensor([-8, -1, 7], dtype=torch.int8), "fp", 4).tolist()
    [0.0, 6.0, -6.0]
    """
    table = TABLES.get((kind, bits))
    if table is None:
        return codes
    numbers = torch.tensor(table, device=codes.device)
    return numbers[codes.int() + (1 << (bits - 1))]
