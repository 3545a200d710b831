# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""16-bit floats as the whole numbers they are stored as, in a kernel's registers.

Bits leave no doubt how a number is rounded: on a GPU and in Triton's interpreter, which cuts
bfloat16 off, to the nearest as in torch; and the neighbour that stochastic rounding needs is one
bit away. Kinds: 0 float32 (as it is), 1 bfloat16, 2 float16.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_jit: Any = triton.jit


def bits_of(tensor: Tensor) -> Tensor:
    """The tensor itself, or 16-bit floats seen as int16."""
    return tensor if tensor.dtype == torch.float32 else tensor.view(torch.int16)


@_jit
def wide(bits, kind: tl.constexpr):
    """float32 of what memory holds."""
    if kind == 1:
        value = ((bits.to(tl.int32) & 0xFFFF) << 16).to(tl.float32, bitcast=True)
    elif kind == 2:
        value = bits.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        value = bits
    return value


@_jit
def narrow(value, kind: tl.constexpr):
    """What memory holds of a float32: the nearest, ties to even."""
    if kind == 1:
        whole = value.to(tl.int32, bitcast=True)
        odd = (whole >> 16) & 1
        whole = tl.where(value != value, 0x7FC00000, whole + 0x7FFF + odd)
        bits = (whole >> 16).to(tl.int16)
    elif kind == 2:
        bits = value.to(tl.float16).to(tl.int16, bitcast=True)
    else:
        bits = value
    return bits


@_jit
def rounded(value, chance, kind: tl.constexpr):
    """Stochastic rounding: the neighbour on the other side where `chance` lies below the error's
    share of the gap between the two."""
    near = narrow(value, kind)
    error = value - wide(near, kind)
    up = error >= 0
    bits = near.to(tl.int32) & 0xFFFF
    away = (bits < 0x8000) == up  # from zero, by adding one to the magnitude
    other = tl.where(away, bits + 1, bits - 1)
    zero = (bits & 0x7FFF) == 0
    other = tl.where(zero, tl.where(up, 1, 0x8001), other).to(tl.int16)
    gap = tl.abs(wide(other, kind) - wide(near, kind))
    return tl.where(chance * gap < tl.abs(error), other, near)
