# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""A block as several parts of a batch see it, in one launch: theta + step_p reach u_p.

Directions are drawn in registers, once for two probes that share one; nothing but the values
reaches memory. Streams and steps of the parts are read from memory, so that a recorded launch
draws other directions once those have changed.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from zotune.quant.kernels.directions import Drawn, moved
from zotune.quant.kernels.floats import KINDS, bits_of, narrow, wide
from zotune.quant.kernels.philox import four, one, weight_of

COUNTERS = 256  # per program: 1,024 numbers
_jit: Any = triton.jit
_INTS = ["n", "start", "over", "most", "k0", "k1", "each", "tokens"]
_free: Any = triton.jit(do_not_specialize=_INTS)


@_jit
def _put(out, at, theta, u, row, reach, reach_value, over, start, minimum, far, second, inside,
         gain: tl.constexpr, spread: tl.constexpr, bounded: tl.constexpr, kind: tl.constexpr,
         into: tl.constexpr, pairs: tl.constexpr):  # fmt: skip
    """One plane of numbers: the values of one part, or of two."""
    r = reach_value
    if spread:
        r = tl.load(reach + (start + at) // over, inside, other=0.0)
    here = wide(tl.load(theta + at, inside, other=0), kind)
    value = moved(here, u, weight_of(row), r, minimum, gain, bounded)
    tl.store(out + at, narrow(value, into), inside)
    if pairs == 2:
        value = moved(here, u, weight_of(row + second), r, minimum, gain, bounded)
        tl.store(out + far + at, narrow(value, into), inside)


@_free
def _points(
    out, theta, streams, reach, n, start, over, each, k0, k1, most, reach_value, minimum,
    law: tl.constexpr, gain: tl.constexpr, spread: tl.constexpr, bounded: tl.constexpr,
    kind: tl.constexpr, into: tl.constexpr, pairs: tl.constexpr, size: tl.constexpr,
):  # fmt: skip
    """out[p, i] = theta[i] + step_p reach[start + i] u_p[start + i], i < n."""
    z = tl.program_id(1)
    p = z // each * each * pairs + z % each
    row = streams + p * 6
    out += p.to(tl.int64) * n
    local = tl.program_id(0).to(tl.int64) * size + tl.arange(0, size)
    counter = start.to(tl.int64) // 64 * 16 + local
    k0 = k0.to(tl.uint32, bitcast=True)
    k1 = k1.to(tl.uint32, bitcast=True)
    at = counter // 16 * 64 + counter % 16 - start
    far = n.to(tl.int64) * each
    numbers = four(counter, row, k0, k1, most, law)
    for k in tl.static_range(4):
        here = at + 16 * k
        inside = (here >= 0) & (here < n)
        _put(out, here, theta, numbers[k], row, reach, reach_value, over, start, minimum, far,
             each * 6, inside, gain, spread, bounded, kind, into, pairs)  # fmt: skip


def points(
    theta: Tensor, drawn: Drawn, dtype: torch.dtype, start: int, shape: torch.Size
) -> Tensor:
    """(parts, *shape): the numbers of a block from `start` on, which `theta` holds, in `dtype`."""
    out = torch.empty(drawn.parts, *shape, dtype=dtype, device=theta.device)
    n = shape.numel()
    if n == 0:
        return out
    programs = triton.cdiv((-(-n // 64) + 1) * 16, COUNTERS)
    reach = drawn.streams if drawn.reach is None else drawn.reach
    _points[programs, drawn.parts // drawn.pairs](
        bits_of(out), bits_of(theta), drawn.streams, reach, n, start, drawn.over, drawn.lanes,
        *drawn.numbers, kind=KINDS[theta.dtype], into=KINDS[dtype], pairs=drawn.pairs,
        size=COUNTERS, **drawn.constants,
    )  # fmt: skip
    return out


@_free
def _rows(out, theta, ids, streams, reach, n, tokens, over, k0, k1, most, reach_value, minimum,
          law: tl.constexpr, gain: tl.constexpr, spread: tl.constexpr, bounded: tl.constexpr,
          kind: tl.constexpr, into: tl.constexpr, size: tl.constexpr):  # fmt: skip
    """out[t] = row ids[t] of a table of rows of n numbers, as the part of token t sees it."""
    t = tl.program_id(0)
    row = streams + t // tokens * 6
    column = tl.program_id(1) * size + tl.arange(0, size).to(tl.int64)
    at = tl.load(ids + t).to(tl.int64) * n + column
    k0 = k0.to(tl.uint32, bitcast=True)
    k1 = k1.to(tl.uint32, bitcast=True)
    u = one(at, row, k0, k1, most, law)
    out += t.to(tl.int64) * n - tl.load(ids + t).to(tl.int64) * n
    _put(out, at, theta, u, row, reach, reach_value, over, 0, minimum, 0, 0, column < n,
         gain, spread, bounded, kind, into, 1)  # fmt: skip


def rows(theta: Tensor, ids: Tensor, drawn: Drawn, dtype: torch.dtype) -> Tensor:
    """(*ids.shape, width): rows of an embedding's table, each as the part of its token sees it.

    ids: part-major, as many for each part. Only rows that are looked up are drawn.
    """
    width, tokens = theta.shape[1], ids.numel() // drawn.parts
    out = torch.empty(*ids.shape, width, dtype=dtype, device=theta.device)
    if out.numel() == 0:
        return out
    reach = drawn.streams if drawn.reach is None else drawn.reach
    _rows[ids.numel(), triton.cdiv(width, 256)](
        bits_of(out), bits_of(theta), ids.contiguous(), drawn.streams, reach, width, tokens,
        drawn.over, *drawn.numbers, kind=KINDS[theta.dtype], into=KINDS[dtype], size=256,
        **drawn.constants,
    )  # fmt: skip
    return out
