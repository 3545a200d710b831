"""Integer codes under a displacement or a step, clamped to their range.

Plain torch is the truth and runs anywhere; on the CPU one compiled pass gives the same bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from zotune.quant.kernels.threads import parallel_ranges

_GRAIN = 1 << 18  # codes per thread below which a second thread does not pay


def shifted(codes: Tensor, u: Tensor, factor: Tensor | float, low: int, high: int) -> Tensor:
    """clamp(codes + factor u, low, high): int8 where every number is whole, else float32.

    codes: int8. u: int8 or float32, of the same shape.

    >>> shifted(torch.tensor([7, -8], dtype=torch.int8), torch.tensor([1.0, 1.0]), 2.0, -8, 7)
    tensor([ 7, -6], dtype=torch.int8)
    """
    if isinstance(factor, Tensor) or not _compilable(codes, u):
        return plain_shifted(codes, u, factor, low, high)
    from zotune.core import codes_cpu

    scale = np.float32(factor)
    if u.dtype == torch.int8 and float(factor).is_integer() and abs(factor) < 1 << 24:
        whole = torch.empty(codes.shape, dtype=torch.int8)
        _pass(codes_cpu.shifted_whole, (whole, codes, u), scale, low, high)
        return whole
    moved = torch.empty(codes.shape)
    fractions = _pass(codes_cpu.shifted, (moved, codes, u.float()), scale, low, high)
    return moved if fractions else moved.to(torch.int8)


def plain_shifted(codes: Tensor, u: Tensor, factor: Tensor | float, low: int, high: int) -> Tensor:
    """`shifted` in plain torch: any device, and shapes that broadcast."""
    moved = (codes + factor * u).clamp_(low, high)
    return moved if bool((moved != moved.round()).any()) else moved.to(torch.int8)


def stepped(codes: Tensor, step: Tensor, low: int, high: int) -> tuple[Tensor, bool]:
    """clamp(codes - floor(step), low, high) as int8, and whether every step is whole.

    >>> stepped(torch.tensor([7, 0], dtype=torch.int8), torch.tensor([-1.0, 0.5]), -8, 7)
    (tensor([7, 0], dtype=torch.int8), False)
    """
    if not _compilable(codes, step):
        return plain_stepped(codes, step, low, high)
    from zotune.core import codes_cpu

    moved = torch.empty(codes.shape, dtype=torch.int8)
    return moved, not _pass(codes_cpu.stepped, (moved, codes, step.float()), low, high)


def plain_stepped(codes: Tensor, step: Tensor, low: int, high: int) -> tuple[Tensor, bool]:
    """`stepped` in plain torch, for any device."""
    down = step.floor()
    moved = (codes.float() - down).clamp_(low, high).to(torch.int8)
    return moved, bool((step == down).all())


def _compilable(codes: Tensor, other: Tensor) -> bool:
    return (
        codes.device.type == "cpu"
        and codes.dtype == torch.int8
        and other.dtype in (torch.int8, torch.float32)
        and other.shape == codes.shape
    )


def _pass(kernel: Any, tensors: tuple[Tensor, ...], *numbers: Any) -> int:
    """Run a kernel over equal tensors, in ranges; the sum of what it counts."""
    flat = [t.reshape(-1).numpy() for t in tensors]
    counts: list[int | None] = []
    parallel_ranges(
        lambda a, b: counts.append(kernel(*(f[a:b] for f in flat), *numbers)), len(flat[0]), _GRAIN
    )
    return sum(count or 0 for count in counts)
