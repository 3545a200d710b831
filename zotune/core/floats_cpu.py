# mypy: allow-untyped-defs
"""bfloat16 in compiled code, as uint16 patterns, and a probe's point in one pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from zotune.quant.kernels.threads import parallel_ranges

GRAIN = 1 << 16  # numbers per thread below which a second thread does not pay
_compiled: Any = njit(nogil=True, cache=True)
_inlined: Any = njit(nogil=True, cache=True, forceinline=True)
_f, _u = np.float32, np.uint32


@_inlined
def nearest(value):
    """The nearest bfloat16, ties to even, as a pattern; NaN stays NaN."""
    bits = _f(value).view(np.uint32)
    even = _u(_u(bits >> _u(16)) & _u(1))
    rounded = _u(_u(_u(bits + _u(0x7FFF)) + even) >> _u(16))
    return _u(0x7FC0) if value != value else rounded


@_inlined
def wide(pattern):
    """The float32 that a pattern stands for."""
    return _u(_u(pattern) << _u(16)).view(np.float32)


@_compiled
def _shifted(out, base, u, factor, low):
    for i in range(out.shape[0]):
        v = wide(base[i]) + factor * u[i]
        out[i] = np.uint16(nearest(low if v < low else v))


def shifted(base: Tensor, u: Tensor, factor: float, low: float | None) -> Tensor:
    """base + factor u, no less than `low`: bfloat16 on the CPU, u float32 of the same shape.

    >>> shifted(torch.ones(2, dtype=torch.bfloat16), torch.tensor([2.0, -8.0]), 0.5, 0.0).tolist()
    [2.0, 0.0]
    """
    out = torch.empty(base.shape, dtype=torch.bfloat16)
    to, at, by = out.view(-1), base.contiguous().view(-1), u.contiguous().view(-1)
    arrays = to.view(torch.uint16).numpy(), at.view(torch.uint16).numpy(), by.numpy()
    bound = _f(-np.inf if low is None else low)

    def work(start: int, stop: int) -> None:
        _shifted(*(a[start:stop] for a in arrays), _f(factor), bound)

    parallel_ranges(work, len(arrays[0]), GRAIN)
    return out
