"""Compiled noise for the CPU: Philox4x32-10 and the laws drawn from it, at memory speed.

Every kernel is the same loop over *tiles*. A tile is 16 consecutive Philox counters, that is 64
words of 32 bits, kept planar (word 0 of all counters, then word 1, ...) so that each inner loop
runs over 16 independent lanes and the compiler turns it into vector instructions. Words become
numbers 64 at a time, straight into the output unless they stick out of it. `noise_reference.py`
holds the same arithmetic in plain torch; the two agree bit for bit, because every operation here
is an exactly rounded IEEE one (no fast-math, no fused multiply-add) in the same order.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

COUNTERS = 16  # Philox counters in a tile
WORDS = 4 * COUNTERS  # 32-bit words in a tile
_MASK = np.uint64(0xFFFFFFFF)
_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_32 = np.uint64(32)
_f = np.float32

_compiled: Any = njit(nogil=True, cache=True)
# Called out of line, the loops below are not turned into vector instructions.
_inlined: Any = njit(nogil=True, cache=True, forceinline=True)


@_inlined
def _philox(c0, c1, c2, c3, k0, k1):  # type: ignore[no-untyped-def]
    """Ten rounds of Philox4x32 on 64-bit lanes that hold 32-bit values."""
    for _ in range(10):
        p0 = _M0 * c0
        p1 = _M1 * c2
        c0 = (p1 >> _32) ^ c1 ^ k0
        c1 = p1 & _MASK
        c2 = (p0 >> _32) ^ c3 ^ k1
        c3 = p0 & _MASK
        k0 = (k0 + _W0) & _MASK
        k1 = (k1 + _W1) & _MASK
    return c0, c1, c2, c3


@_compiled
def philox(counter, key):  # type: ignore[no-untyped-def]
    """Philox4x32-10 of one counter (4 words) under one key (2 words): 4 words, for the tests."""
    out = np.empty(4, np.uint32)
    a, b, c, d = _philox(
        np.uint64(counter[0]), np.uint64(counter[1]), np.uint64(counter[2]),
        np.uint64(counter[3]), np.uint64(key[0]), np.uint64(key[1]),
    )  # fmt: skip
    out[0], out[1], out[2], out[3] = a, b, c, d
    return out


@_inlined
def _words(words, tile, stream, key):  # type: ignore[no-untyped-def]
    """Fill `words` (64 uint32) with tile number `tile` of a stream (lane, step, query)."""
    first = np.uint64(tile) * np.uint64(COUNTERS)
    high = ((first >> _32) & np.uint64(0xFFFF)) | (np.uint64(stream[0]) << np.uint64(16))
    low = first & _MASK  # a multiple of 16: adding j < 16 never carries
    c2, c3 = np.uint64(stream[1]), np.uint64(stream[2])
    k0, k1 = np.uint64(key[0]), np.uint64(key[1])
    for j in range(COUNTERS):
        a, b, c, d = _philox(low + np.uint64(j), high, c2, c3, k0, k1)
        words[j] = np.uint32(a)
        words[COUNTERS + j] = np.uint32(b)
        words[2 * COUNTERS + j] = np.uint32(c)
        words[3 * COUNTERS + j] = np.uint32(d)


@_inlined
def _gaussian_pair(a, b):  # type: ignore[no-untyped-def]
    """Box-Muller: two words to two standard normals (polynomials after Cephes, error < 1e-6)."""
    uniform = _f(np.int32(a >> np.uint32(8)) + np.int32(1)) * _f(5.9604644775390625e-08)
    bits = _f(uniform).view(np.int32)
    exponent = _f((bits >> np.int32(23)) - np.int32(126))
    m = np.int32((bits & np.int32(0x007FFFFF)) | np.int32(0x3F000000)).view(np.float32)
    small = m < _f(0.70710678118654752440)
    exponent = exponent - (_f(1.0) if small else _f(0.0))
    x = m + (m if small else _f(0.0)) - _f(1.0)
    z = x * x
    y = _f(7.0376836292e-2) * x + _f(-1.1514610310e-1)
    y = y * x + _f(1.1676998740e-1)
    y = y * x + _f(-1.2420140846e-1)
    y = y * x + _f(1.4249322787e-1)
    y = y * x + _f(-1.6668057665e-1)
    y = y * x + _f(2.0000714765e-1)
    y = y * x + _f(-2.4999993993e-1)
    y = y * x + _f(3.3333331174e-1)
    y = y * x * z
    y = y + exponent * _f(-2.12194440e-4)
    y = y - _f(0.5) * z
    log = (x + y) + exponent * _f(0.693359375)
    radius = np.sqrt(max(_f(-2.0) * log, _f(0.0)))

    quadrant = (b + np.uint32(0x20000000)) >> np.uint32(30)
    rest = np.int32(b - np.uint32(quadrant << np.uint32(30)))
    x = _f(rest) * _f(1.4629180792671596e-09)
    z = x * x
    s = _f(-1.9515295891e-4) * z + _f(8.3321608736e-3)
    s = s * z + _f(-1.6666654611e-1)
    s = s * z * x + x
    c = _f(2.443315711809948e-5) * z + _f(-1.388731625493765e-3)
    c = c * z + _f(4.166664568298827e-2)
    c = c * z * z - _f(0.5) * z + _f(1.0)
    odd = (quadrant & np.uint32(1)) == np.uint32(1)
    cosine, sine = (s, c) if odd else (c, s)
    flip_cosine = ((quadrant + np.uint32(1)) & np.uint32(2)) == np.uint32(2)
    flip_sine = (quadrant & np.uint32(2)) == np.uint32(2)
    cosine = -cosine if flip_cosine else cosine
    sine = -sine if flip_sine else sine
    return radius * cosine, radius * sine


@_inlined
def _gaussian(out, words):  # type: ignore[no-untyped-def]
    for j in range(COUNTERS):
        out[j], out[COUNTERS + j] = _gaussian_pair(words[j], words[COUNTERS + j])
    for j in range(COUNTERS):
        out[2 * COUNTERS + j], out[3 * COUNTERS + j] = _gaussian_pair(
            words[2 * COUNTERS + j], words[3 * COUNTERS + j]
        )


@_inlined
def _uniform(out, words):  # type: ignore[no-untyped-def]
    for j in range(WORDS):
        out[j] = _f(np.int32(words[j] >> np.uint32(8))) * _f(1.1920928955078125e-07) - _f(1.0)


@_inlined
def _rademacher(out, words, bit):  # type: ignore[no-untyped-def]
    for j in range(WORDS):
        sign = (words[j] >> np.uint32(bit)) & np.uint32(1)
        out[j] = _f(1.0) - _f(2.0) * _f(np.int32(sign))


@_inlined
def _whole(out, words, most):  # type: ignore[no-untyped-def]
    for j in range(WORDS):
        u = _f(np.int32(words[j] >> np.uint32(8))) * _f(5.9604644775390625e-08)
        out[j] = np.int8(np.int32(np.int32(u * _f(2 * most + 1)) - np.int32(most)))


@_inlined
def _numbers(out, words, law, plane):  # type: ignore[no-untyped-def]
    """64 numbers from the 64 words of a tile; a rademacher's tile has 32 such planes."""
    if law == 0:
        _gaussian(out, words)
    elif law == 1:
        _uniform(out, words)
    else:
        _rademacher(out, words, plane)


@_compiled
def rows(out, law, size, starts, streams, key):  # type: ignore[no-untyped-def]
    """out[k, i] = u_k[starts[k] + i], by law number, `size` numbers to a tile."""
    words, edge = np.empty(WORDS, np.uint32), np.empty(WORDS, np.float32)
    n = out.shape[1]
    for k in range(out.shape[0]):
        row, start = out[k], starts[k]
        for tile in range(start // size, (start + n + size - 1) // size):
            _words(words, tile, streams[k], key)
            for plane in range(size // WORDS):
                at = tile * size + plane * WORDS - start
                if at >= 0 and at + WORDS <= n:
                    _numbers(row[at : at + WORDS], words, law, plane)
                elif at > -WORDS and at < n:
                    _numbers(edge, words, law, plane)
                    for j in range(max(0, -at), min(WORDS, n - at)):
                        row[at + j] = edge[j]


@_compiled
def combine(out, law, size, start, streams, key, coefficients):  # type: ignore[no-untyped-def]
    """out[i] += sum_k coefficients[k] * u_k[start + i], in the order of k."""
    words, u = np.empty(WORDS, np.uint32), np.empty(WORDS, np.float32)
    n = out.shape[0]
    for tile in range(start // size, (start + n + size - 1) // size):
        for k in range(streams.shape[0]):
            _words(words, tile, streams[k], key)
            c = coefficients[k]
            for plane in range(size // WORDS):
                at = tile * size + plane * WORDS - start
                if at <= -WORDS or at >= n:
                    continue
                _numbers(u, words, law, plane)
                if at >= 0 and at + WORDS <= n:
                    inside = out[at : at + WORDS]
                    for j in range(WORDS):
                        inside[j] += c * u[j]
                else:
                    for j in range(max(0, -at), min(WORDS, n - at)):
                        out[at + j] += c * u[j]


@_compiled
def whole(out, most, start, stream, key):  # type: ignore[no-untyped-def]
    """out[i], int8, is where u[start + i], uniform, falls on the whole numbers -most..most."""
    words, edge = np.empty(WORDS, np.uint32), np.empty(WORDS, np.int8)
    n = out.shape[0]
    for tile in range(start // WORDS, (start + n + WORDS - 1) // WORDS):
        _words(words, tile, stream, key)
        at = tile * WORDS - start
        if at >= 0 and at + WORDS <= n:
            _whole(out[at : at + WORDS], words, most)
        else:
            _whole(edge, words, most)
            for j in range(max(0, -at), min(WORDS, n - at)):
                out[at + j] = edge[j]


# Law numbers and tile sizes are arguments, not closures: only so do the compiled kernels come
# from the cache in the next process.
LAWS = {"gaussian": (0, WORDS), "uniform": (1, WORDS), "rademacher": (2, 32 * WORDS)}
