"""Loops compiled by numba. Each works on a range of rows and releases the interpreter lock.

bfloat16 has no numpy type: it travels as uint16 bit patterns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import overload
from numpy.typing import NDArray

Array = NDArray[Any]

_INVERSE_127 = np.float32(1.0 / 127.0)


@njit(nogil=True, cache=True)
def to_bfloat16(value: np.float32) -> np.uint16:
    """Round float32 to the nearest bfloat16, ties to even, as a uint16 pattern."""
    bits = np.float32(value).view(np.uint32)
    even = np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(1))
    rounded = np.uint32(np.uint32(bits + np.uint32(0x7FFF)) + even)
    return np.uint16(rounded >> np.uint32(16))


def _stored(target: Array, value: np.float32) -> Any:
    """`value` as `target` holds it: float32, a bfloat16 pattern for uint16, or int8."""
    raise NotImplementedError("runs only inside compiled code")


# Chosen by type while compiling. A kernel made by a closure per type would never be found in
# numba's cache, whose key holds the closure's cells.
@overload(_stored)
def _choose_stored(target: Any, value: Any) -> Callable[[Any, Any], Any]:
    def as_bfloat16(target: Any, value: Any) -> Any:
        return to_bfloat16(value)

    def as_int8(target: Any, value: Any) -> Any:
        return np.int8(np.int32(value))

    def as_float32(target: Any, value: Any) -> Any:
        return np.float32(value)

    if target.dtype == types.uint16:
        return as_bfloat16
    return as_int8 if target.dtype == types.int8 else as_float32


@njit(nogil=True, cache=True)
def scale_rows(
    codes: Array, scale: Array, zero: Array, out: Array, group: int, start: int, stop: int
) -> None:
    """out = (codes - zero) * scale for codes with one number per weight, `group` to a scale."""
    for row in range(start, stop):
        scales = scale[row if scale.shape[0] > 1 else 0]
        zeros = zero[row if zero.shape[0] > 1 else 0]
        for k in range(scale.shape[1]):
            s = scales[k]
            z = zeros[k]
            source = codes[row, k * group : (k + 1) * group]
            target = out[row, k * group : (k + 1) * group]
            for c in range(target.shape[0]):
                target[c] = _stored(target, (np.float32(source[c]) - z) * s)


@njit(nogil=True, cache=True)
def _fill(
    target: Array, source: Array, shift: int, mask: int, offset: int, z: float, s: float
) -> None:
    """One group of one plane of 4 or 2 bits."""
    for c in range(target.shape[0]):
        q = np.int32(np.int32(np.int32(source[c]) >> np.int32(shift)) & np.int32(mask))
        target[c] = _stored(target, (np.float32(np.int32(q - np.int32(offset))) - z) * s)


@njit(nogil=True, cache=True)
def _fill_3_bits(target: Array, low: Array, high: Array, plane: int, z: float, s: float) -> None:
    """One group of one eighth of a row of 3 bits."""
    shift_low, shift_high = np.int32(2 * (plane // 2)), np.int32(plane)
    for c in range(target.shape[0]):
        q = np.int32(np.int32(np.int32(low[c]) >> shift_low) & np.int32(3))
        top = np.int32(np.int32(np.int32(high[c]) >> shift_high) & np.int32(1))
        q = np.int32(q + np.int32(np.int32(top << np.int32(2)) - np.int32(4)))
        target[c] = _stored(target, (np.float32(q) - z) * s)


@njit(nogil=True, cache=True)
def scale_packed_rows(
    packed: Array,
    scale: Array,
    zero: Array,
    out: Array,
    bits: int,
    group: int,
    start: int,
    stop: int,
) -> None:
    """out = (unpack(packed) - zero) * scale, plane by plane, group by group."""
    columns = out.shape[1]
    eighth = packed.shape[1] // bits
    # 4 and 2 bits have one part; 3 bits have two, whose planes meet every eighth of a row.
    planes = 8 if bits == 3 else 8 // bits
    size = eighth * 8 // planes
    for row in range(start, stop):
        scales = scale[row if scale.shape[0] > 1 else 0]
        zeros = zero[row if zero.shape[0] > 1 else 0]
        source = packed[row]
        for plane in range(planes):
            first = plane * size
            last = min(first + size, columns)
            c = first
            while c < last:
                k = c // group
                end = min(last, (k + 1) * group)
                target = out[row, c:end]
                a = c - first
                b = end - first
                if bits == 3:
                    part = source[(plane % 2) * eighth : 2 * eighth]
                    high = source[2 * eighth + a : 2 * eighth + b]
                    _fill_3_bits(target, part[a:b], high, plane, zeros[k], scales[k])
                elif bits == 2:
                    _fill(target, source[a:b], 2 * plane, 3, 2, zeros[k], scales[k])
                elif plane == 0:  # shifts known to the compiler: a third less time
                    _fill(target, source[a:b], 0, 15, 8, zeros[k], scales[k])
                else:
                    _fill(target, source[a:b], 4, 15, 8, zeros[k], scales[k])
                c = end


@njit(nogil=True, cache=True)
def _from_bits(pattern: np.int32) -> np.float32:
    return np.int32(pattern).view(np.float32)


@njit(nogil=True, cache=True)
def quantize_rows(
    values: Array, bits: Array, codes: Array, scale: Array, start: int, stop: int
) -> None:
    """Per-row int8 codes and scales; `bits` is `values` seen as int32.

    The largest magnitude is found on the bit patterns: an integer maximum vectorizes without
    relaxed float rules, and NaN, whose pattern is above infinity's, is kept.
    """
    for row in range(start, stop):
        top = np.int32(0)
        patterns = bits[row]
        for c in range(patterns.shape[0]):
            top = max(top, np.int32(patterns[c] & np.int32(0x7FFFFFFF)))
        largest = _from_bits(top)
        scale[row] = largest * _INVERSE_127
        inverse = np.float32(0.0)
        if largest > np.float32(0.0):
            inverse = np.float32(127.0) / largest
        source = values[row]
        target = codes[row]
        for c in range(source.shape[0]):
            v = np.rint(source[c] * inverse)
            v = min(max(v, np.float32(-127.0)), np.float32(127.0))
            target[c] = np.int8(np.int32(v if v == v else np.float32(0.0)))


@njit(nogil=True, cache=True)
def sum_rows(codes: Array, sums: Array, start: int, stop: int) -> None:
    """sums[row, g]: the sum of group g of a row's int8 codes."""
    group = codes.shape[1] // sums.shape[1]
    for row in range(start, stop):
        for g in range(sums.shape[1]):
            total = np.int32(0)
            for code in codes[row, g * group : (g + 1) * group]:
                total = np.int32(total + np.int32(code))
            sums[row, g] = total


@njit(nogil=True, cache=True)
def rescale_rows(
    sums: Array,
    x_sums: Array,
    x_scale: Array,
    scale: Array,
    zero: Array,
    bias: Array,
    out: Array,
    start: int,
    stop: int,
) -> None:
    """out = (sums - x_sums * zero) * scale * x_scale + bias, in this order."""
    for row in range(start, stop):
        source = sums[row]
        target = out[row]
        s = x_scale[row]
        total = np.float32(x_sums[row])
        for c in range(source.shape[0]):
            shifted = np.float32(source[c]) - total * zero[c]
            target[c] = shifted * scale[c] * s + bias[c]
