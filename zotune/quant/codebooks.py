"""Codes that stand for the numbers of a table instead of for themselves.

A 4-bit float is stored as its bit pattern n in 0..15, packed like the integer code n - 8; the
layer multiplies with `TABLES[kind, bits][n]`. Another table is another entry here and a kind in
`affine.BITS`.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

_E2M1: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
TABLES: Final[dict[tuple[str, int], tuple[float, ...]]] = {
    # E2M1 of the OCP Microscaling Formats specification v1.0 (2023); the high bit is the sign.
    ("fp", 4): (*_E2M1, *(-value for value in _E2M1)),
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
