# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Noise on GPUs: the loops of `noise_cpu.py` as Triton kernels.

A program makes the words of a run of counters and turns them into numbers in registers. No product
is fused with a sum, so that every number equals the reference's bit for bit. Without a GPU the
kernels run under Triton's interpreter (TRITON_INTERPRET=1), as in tests.
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
from zotune.quant.kernels.philox import FIELDS, LAWS, field, numbers, philox, weight_of

COUNTERS = 256  # per program: 1,024 words
_jit: Any = triton.jit
# Arguments that change from call to call: one compiled kernel must serve all their values.
_free: Any = triton.jit(do_not_specialize=["n", "keys", "k0", "k1", "most"])


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


@_free
def _fill(out, table, n, keys, k0, k1, most,
          law: tl.constexpr, add: tl.constexpr, size: tl.constexpr):  # fmt: skip
    """out[r, i] (+)= sum over k < keys of weight_rk * u_rk[start_rk + i]; `table` as `table`."""
    row = tl.program_id(1).to(tl.int64)
    table += row * keys * 6  # FIELDS
    out += row * n
    start = (field(table, 5).to(tl.int64) << 32) | field(table, 4).to(tl.int64)
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
        a, b, c, d = philox(counter, field(here, 0), field(here, 1), field(here, 2), k0, k1)
        weight = weight_of(here)
        if law == 2:
            _signs(out, at, n, a, weight, add)
            _signs(out, at + 16, n, b, weight, add)
            _signs(out, at + 32, n, c, weight, add)
            _signs(out, at + 48, n, d, weight, add)
        else:
            p, q = numbers(a, b, law, most)
            r, s = numbers(c, d, law, most)
            x, y, z, w = x + weight * p, y + weight * q, z + weight * r, w + weight * s
    if law != 2:
        _put(out, at, n, x, add)
        _put(out, at + 16, n, y, add)
        _put(out, at + 32, n, z, add)
        _put(out, at + 48, n, w, add)


def table(
    keys: Sequence[Key], weights: Sequence[float], starts: Sequence[int], device: torch.device
) -> Tensor:
    """(keys, 6) int32: lane, step, query, the weight's bits, low and high half of the start.

    Raises:
        BadInput: for more than 65,536 examples with directions of their own.
    """
    if max(key.lane for key in keys) >= 1 << 16:
        raise BadInput("directions per example are limited to 65,536 examples on a GPU")
    words = np.empty((len(keys), FIELDS), np.uint32)
    words[:, :3] = [key.stream for key in keys]
    words[:, 3] = np.array(weights, np.float32).view(np.uint32)
    words[:, 4:] = [(start & 0xFFFFFFFF, start >> 32) for start in starts]
    return torch.from_numpy(words.view(np.int32)).to(device)


def words(seed: int, name: str) -> tuple[int, int]:
    """The Philox key of a block as kernels take it: two int32."""
    k0, k1 = (word - (word >> 31 << 32) for word in philox_key(seed, name))
    return k0, k1


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
    rows_of = table(keys, weights, starts, out.device)
    grid = (triton.cdiv(counters, COUNTERS), rows)
    _fill[grid](
        out, rows_of, n, len(keys) // rows, *words(keys[0].seed, name), most,
        law=LAWS[law], add=add, size=COUNTERS, enable_fp_fusion=False,
    )  # fmt: skip
    return out
