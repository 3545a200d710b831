# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Numbers from counters in a kernel's registers: what noise, products and updates on GPUs share.

Laws by number: 0 gaussian, 1 uniform, 2 rademacher, 3 whole. Element i of a block lies in tile
i // 64, whose 16 counters make four words each: numbers 0-15, 16-31, 32-47 and 48-63 of the tile
(a Rademacher tile has 2,048 numbers, bit k of a word being 64 k on). `four` makes all numbers of
runs of counters, which wastes nothing; `one` makes single numbers anywhere. Compiled without fused
products (`enable_fp_fusion=False`), all of them equal the reference bit for bit.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

LAWS = {"gaussian": 0, "uniform": 1, "rademacher": 2, "whole": 3}
FIELDS = 6  # of a row of a table of streams: lane, step, query, a weight's bits, a start's halves
_jit: Any = triton.jit


@_jit
def philox(counter, lane, step, query, k0, k1):
    """Philox4x32-10 of 64-bit counters under a stream: four uint32 words each."""
    c0 = counter.to(tl.uint32)
    c1 = ((counter >> 32) & 0xFFFF).to(tl.uint32) | (lane << 16)
    c2 = step + tl.zeros_like(c0)
    c3 = query + tl.zeros_like(c0)
    m0 = tl.full(c0.shape, 0xD2511F53, tl.uint32)
    m1 = tl.full(c0.shape, 0xCD9E8D57, tl.uint32)
    for _ in tl.static_range(10):
        h0, l0 = tl.umulhi(m0, c0), m0 * c0
        h1, l1 = tl.umulhi(m1, c2), m1 * c2
        c0, c1, c2, c3 = h1 ^ c1 ^ k0, l1, h0 ^ c3 ^ k1, l0
        k0 = k0 + tl.full(k0.shape, 0x9E3779B9, tl.uint32)
        k1 = k1 + tl.full(k1.shape, 0xBB67AE85, tl.uint32)
    return c0, c1, c2, c3


@_jit
def _log(u):
    """log(u) for u in (0, 1], by the polynomial of `noise_reference`."""
    bits = u.to(tl.int32, bitcast=True)
    exponent = ((bits >> 23) - 126).to(tl.float32)
    m = ((bits & 0x007FFFFF) | 0x3F000000).to(tl.float32, bitcast=True)
    small = m < 0.70710678118654752440
    exponent = exponent - tl.where(small, 1.0, 0.0)
    x = m + tl.where(small, m, 0.0) - 1.0
    z = x * x
    y = x * 7.0376836292e-2 - 1.1514610310e-1
    y = y * x + 1.1676998740e-1
    y = y * x - 1.2420140846e-1
    y = y * x + 1.4249322787e-1
    y = y * x - 1.6668057665e-1
    y = y * x + 2.0000714765e-1
    y = y * x - 2.4999993993e-1
    y = y * x + 3.3333331174e-1
    y = y * x * z + exponent * -2.12194440e-4 - 0.5 * z
    return (x + y) + exponent * 0.693359375


@_jit
def gaussian_pair(a, b):
    """Box-Muller: two words to two standard normals."""
    uniform = ((a >> 8) + 1).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08
    radius = tl.sqrt_rn(tl.maximum(-2.0 * _log(uniform), 0.0))
    quadrant = (b + tl.full(b.shape, 0x20000000, tl.uint32)) >> 30
    rest = (b - (quadrant << 30)).to(tl.int32, bitcast=True)
    x = rest.to(tl.float32) * 1.4629180792671596e-09
    z = x * x
    s = z * -1.9515295891e-4 + 8.3321608736e-3
    s = s * z - 1.6666654611e-1
    s = s * z * x + x
    c = z * 2.443315711809948e-5 - 1.388731625493765e-3
    c = c * z + 4.166664568298827e-2
    c = c * z * z - 0.5 * z + 1.0
    odd = (quadrant & 1) == 1
    cosine = tl.where(odd, s, c)
    sine = tl.where(odd, c, s)
    cosine = tl.where(((quadrant + 1) & 2) == 2, -cosine, cosine)
    sine = tl.where((quadrant & 2) == 2, -sine, sine)
    return radius * cosine, radius * sine


@_jit
def _uniform(word):
    return (word >> 8).to(tl.int32).to(tl.float32) * 1.1920928955078125e-07 - 1.0


@_jit
def numbers(a, b, law: tl.constexpr, most):
    """Two planes of words to two planes of numbers."""
    if law == 0:
        x, y = gaussian_pair(a, b)
    else:
        x, y = _uniform(a), _uniform(b)
        if law == 3:  # whole numbers -most..most
            x = tl.floor((x * 0.5 + 0.5) * (2 * most + 1).to(tl.float32)) - most.to(tl.float32)
            y = tl.floor((y * 0.5 + 0.5) * (2 * most + 1).to(tl.float32)) - most.to(tl.float32)
    return x, y


@_jit
def field(row, k: tl.constexpr):
    return tl.load(row + k).to(tl.uint32, bitcast=True)


@_jit
def weight_of(row):
    """The weight, or the probe's step, of a row of a table."""
    return tl.load(row + 3).to(tl.float32, bitcast=True)


@_jit
def _bit(word, k):
    return 1.0 - 2.0 * ((word >> k.to(tl.uint32)) & 1).to(tl.float32)


@_jit
def four(counter, row, k0, k1, most, law: tl.constexpr):
    """Numbers counter // 16 * 64 + counter % 16 + 0, 16, 32, 48 of the stream in `row`."""
    here = counter
    if law == 2:
        here = counter // 512 * 16 + counter % 16
    a, b, c, d = philox(here, field(row, 0), field(row, 1), field(row, 2), k0, k1)
    if law == 2:
        k = counter // 16 % 32
        x, y, z, w = _bit(a, k), _bit(b, k), _bit(c, k), _bit(d, k)
    else:
        x, y = numbers(a, b, law, most)
        z, w = numbers(c, d, law, most)
    return x, y, z, w


@_jit
def one(index, row, k0, k1, most, law: tl.constexpr):
    """Number `index` (int64) of the stream in `row`."""
    plane = index // 16 % 4
    tiled: tl.constexpr = 2048 if law == 2 else 64
    counter = index // tiled * 16 + index % 16
    a, b, c, d = philox(counter, field(row, 0), field(row, 1), field(row, 2), k0, k1)
    a, b = tl.where(plane < 2, a, c), tl.where(plane < 2, b, d)
    if law == 2:
        k = index // 64 % 32
        x, y = _bit(a, k), _bit(b, k)
    else:
        x, y = numbers(a, b, law, most)
    return tl.where(plane % 2 == 0, x, y)
