# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Noise on GPUs: the loops of `noise_cpu.py` as Triton kernels.

A program makes the words of a run of counters and turns them into numbers in registers. Integers
and uniforms equal the reference bit for bit; Gaussians to 1e-6, since a GPU fuses products with
sums. Without a GPU the kernels run under Triton's interpreter (TRITON_INTERPRET=1), as in tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from zotune.core.noise import Key, philox_key
from zotune.errors import BadInput

COUNTERS = 256  # per program: 1,024 words
LAWS = {"gaussian": 0, "uniform": 1, "rademacher": 2, "whole": 3}
_jit: Any = triton.jit
# Arguments that change from call to call: one compiled kernel must serve all their values.
_free: Any = triton.jit(do_not_specialize=["n", "keys", "k0", "k1", "most"])


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
def _numbers(a, b, law: tl.constexpr, most):
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
def _put(out, at, n, value, add: tl.constexpr):
    inside = (at >= 0) & (at < n)
    if add:
        value += tl.load(out + at, inside, other=0.0)
    tl.store(out + at, value.to(out.dtype.element_ty), inside)


@_jit
def _signs(out, at, n, word, weight, add: tl.constexpr):
    """Bit k of a word is the sign 64 k numbers on."""
    for bit in tl.static_range(32):
        sign = 1.0 - 2.0 * ((word >> bit) & 1).to(tl.float32)
        _put(out, at + 64 * bit, n, weight * sign, add)


@_jit
def _field(row, k: tl.constexpr):
    return tl.load(row + k).to(tl.uint32, bitcast=True)


@_free
def _fill(out, table, n, keys, k0, k1, most,
          law: tl.constexpr, add: tl.constexpr, size: tl.constexpr):  # fmt: skip
    """out[r, i] (+)= sum over k < keys of weight_rk * u_rk[start_rk + i]; `table` as `_table`."""
    row = tl.program_id(1).to(tl.int64)
    table += row * keys * 6
    out += row * n
    start = (_field(table, 5).to(tl.int64) << 32) | _field(table, 4).to(tl.int64)
    tiled: tl.constexpr = 2048 if law == 2 else 64
    local = tl.program_id(0).to(tl.int64) * size + tl.arange(0, size)
    # Counter 16 t + j makes words j, 16 + j, 32 + j, 48 + j of tile t.
    counter = start // tiled * 16 + local
    at = counter // 16 * tiled + counter % 16 - start
    k0 = k0.to(tl.uint32, bitcast=True)
    k1 = k1.to(tl.uint32, bitcast=True)
    x = tl.zeros((size,), tl.float32)
    y, z, w = x, x, x
    for k in range(keys):
        here = table + k * 6
        a, b, c, d = philox(counter, _field(here, 0), _field(here, 1), _field(here, 2), k0, k1)
        weight = tl.load(here + 3).to(tl.float32, bitcast=True)
        if law == 2:
            _signs(out, at, n, a, weight, add)
            _signs(out, at + 16, n, b, weight, add)
            _signs(out, at + 32, n, c, weight, add)
            _signs(out, at + 48, n, d, weight, add)
        else:
            p, q = _numbers(a, b, law, most)
            r, s = _numbers(c, d, law, most)
            x, y, z, w = x + weight * p, y + weight * q, z + weight * r, w + weight * s
    if law != 2:
        _put(out, at, n, x, add)
        _put(out, at + 16, n, y, add)
        _put(out, at + 32, n, z, add)
        _put(out, at + 48, n, w, add)


def _table(
    keys: Sequence[Key], weights: Sequence[float], starts: Sequence[int], device: torch.device
) -> Tensor:
    """(keys, 6) int32: lane, step, query, the weight's bits, low and high half of the start."""
    if max(key.lane for key in keys) >= 1 << 16:
        raise BadInput("directions per example are limited to 65,536 examples on a GPU")
    words = np.empty((len(keys), 6), np.uint32)
    words[:, :3] = [key.stream for key in keys]
    words[:, 3] = np.array(weights, np.float32).view(np.uint32)
    words[:, 4:] = [(start & 0xFFFFFFFF, start >> 32) for start in starts]
    return torch.from_numpy(words.view(np.int32)).to(device)


def fill_(
    out: Tensor,
    law: str,
    keys: Sequence[Key],
    weights: Sequence[float],
    starts: Sequence[int],
    name: str,
    *,
    add: bool = False,
    most: int = 0,
) -> Tensor:
    """Numbers of several streams into `out` (rows, n), contiguous: float32, or int8 for "whole".

    Every row gets len(keys) / rows streams, weighted and summed in their order; with `add` on top
    of what it holds. Streams of a row share a start, all keys a seed; `name` is the block's.

    Raises:
        BadInput: for more than 65,536 examples with directions of their own.
    """
    rows, n = out.shape
    if out.numel() == 0 or not keys:
        return out
    tile = 2048 if law == "rademacher" else 64
    counters = (-(-n // tile) + 1) * 16
    table = _table(keys, weights, starts, out.device)
    k0, k1 = (word - (word >> 31 << 32) for word in philox_key(keys[0].seed, name))  # as int32
    grid = (triton.cdiv(counters, COUNTERS), rows)
    _fill[grid](
        out, table, n, len(keys) // rows, k0, k1, most,
        law=LAWS[law], add=add, size=COUNTERS,
    )  # fmt: skip
    return out
