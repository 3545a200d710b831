"""Compiled passes over integer codes: one reading of each tensor instead of ten."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

_compiled: Any = njit(nogil=True, cache=True)
_inlined: Any = njit(nogil=True, cache=True, forceinline=True)
_f = np.float32


@_inlined
def _clamped(v, low, high):  # type: ignore[no-untyped-def]
    """NaN stays, as in torch's clamp."""
    v = _f(low) if v < _f(low) else v
    return _f(high) if v > _f(high) else v


@_compiled
def shifted_whole(out, codes, u, factor, low, high):  # type: ignore[no-untyped-def]
    """out = clamp(codes + factor u), all int8 but the whole float32 `factor`."""
    for i in range(out.shape[0]):
        out[i] = np.int8(np.int32(_clamped(_f(codes[i]) + factor * _f(u[i]), low, high)))


@_compiled
def shifted(out, codes, u, factor, low, high):  # type: ignore[no-untyped-def]
    """out = clamp(codes + factor u) in float32; how many of them have a fraction."""
    fractions = 0
    for i in range(out.shape[0]):
        v = _clamped(_f(codes[i]) + factor * u[i], low, high)
        out[i] = v
        if v != np.floor(v):
            fractions += 1
    return fractions


@_compiled
def stepped(out, codes, step, low, high):  # type: ignore[no-untyped-def]
    """out = clamp(codes - floor(step)), int8; how many steps have a fraction."""
    fractions = 0
    for i in range(out.shape[0]):
        down = np.floor(step[i])
        v = _clamped(_f(codes[i]) - down, low, high)
        out[i] = np.int8(np.int32(v if v == v else _f(0.0)))
        if step[i] != down:
            fractions += 1
    return fractions
