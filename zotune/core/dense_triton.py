# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Products with float weights whose directions are drawn in the product's own registers.

A program owns a tile of outputs for one or two probes. It reads each tile of weights once, draws
u for it once, forms theta + eps u and theta - eps u and multiplies; no perturbed weight reaches
memory. Every tile of rows draws anew, so this pays where there are few rows (`few`): drawing a
13B model's weights costs a GPU of 2024 about as much as reading them six times in bfloat16, and
a scratch of one layer, filled once and read by two ordinary products, costs five such readings.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from zotune.quant.kernels.directions import Drawn, moved
from zotune.quant.kernels.floats import KINDS, bits_of, narrow, wide
from zotune.quant.kernels.philox import four, weight_of

TILE = 64  # most rows of a tile: what two accumulators and a tile of noise leave of the registers
FEW = 2  # tiles of rows up to which drawing anew beats a scratch
_jit: Any = triton.jit
_INTS = ["over", "each", "k0", "k1", "most", "bias_part"]
_free: Any = triton.jit(do_not_specialize=_INTS)
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # whose products know no bfloat16
_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def few(tokens: int, columns: int, dtype: torch.dtype) -> bool:
    """Whether to draw inside the product: few tiles of rows, and columns in whole tiles of noise.

    Not in float32, where tensor cores do not help and a kernel of ours has too few registers.

    >>> few(128, 5120, torch.bfloat16), few(129, 5120, torch.bfloat16), few(9, 100, torch.float16)
    (True, False, False)
    """
    return dtype != torch.float32 and tokens <= FEW * TILE and columns % 64 == 0


@_jit
def _add(acc, x, at, m, theta, u, step, r, minimum, tokens, ok, gain: tl.constexpr,
         bounded: tl.constexpr, kind: tl.constexpr, into: tl.constexpr, dtype: tl.constexpr,
         held: tl.constexpr):  # fmt: skip
    """acc + w @ x for one plane of 16 columns and one part; acc is (outputs, rows)."""
    w = wide(narrow(moved(theta, u, step, r, minimum, gain, bounded), into), into)
    w = tl.where(ok, w, 0.0).to(dtype).to(held)
    rows = tl.load(x + at, (m < tokens)[None, :], other=0.0)
    return tl.dot(w, rows.to(held), acc, input_precision="ieee")


@_jit
def _finish(acc, out, bias, m, n, tokens, outputs, biased: tl.constexpr, into: tl.constexpr):
    if biased:
        acc += wide(tl.load(bias + n, n < outputs, other=0), into)[:, None]
    inside = (n < outputs)[:, None] & (m < tokens)[None, :]
    tl.store(out + m[None, :] * outputs + n[:, None], narrow(acc, into), inside)


@_free
def _dense(x, theta, streams, reach, bias, out, tokens, outputs, columns, over, each, bias_part,
           k0, k1, most, reach_value, minimum, law: tl.constexpr, gain: tl.constexpr,
           spread: tl.constexpr, bounded: tl.constexpr, biased: tl.constexpr, kind: tl.constexpr,
           into: tl.constexpr, pairs: tl.constexpr, dtype: tl.constexpr, held: tl.constexpr,
           bm: tl.constexpr, bn: tl.constexpr):  # fmt: skip
    """out[p] = x[p] @ (theta + step_p reach u_p).T + bias[p]; columns % 64 == 0."""
    m = tl.program_id(0) * bm + tl.arange(0, bm).to(tl.int64)
    n = tl.program_id(1) * bn + tl.arange(0, bn).to(tl.int64)
    z = tl.program_id(2)
    p = (z // each * each * pairs + z % each).to(tl.int64)
    row, next_row = streams + p * 6, streams + (p + each) * 6
    x += p * tokens * columns
    out += p * tokens * outputs
    bias += p * bias_part
    k0 = k0.to(tl.uint32, bitcast=True)
    k1 = k1.to(tl.uint32, bitcast=True)
    lane = tl.arange(0, 16).to(tl.int64)
    ok = (n < outputs)[:, None]
    first = tl.zeros((bn, bm), tl.float32)
    second = first
    for start in range(0, columns, 64):
        # A row of this tile is one tile of noise: 16 counters make its 64 numbers.
        base = (n * columns + start)[:, None] + lane[None, :]
        numbers = four((base - lane[None, :]) // 4 + lane[None, :], row, k0, k1, most, law)
        for k in tl.static_range(4):
            at = base + 16 * k
            w = wide(tl.load(theta + at, ok, other=0), kind)
            r = reach_value
            if spread:
                r = tl.load(reach + at // over, ok, other=0.0)
            place = m[None, :] * columns + (start + 16 * k + lane)[:, None]
            first = _add(first, x, place, m, w, numbers[k], weight_of(row), r, minimum, tokens, ok,
                         gain, bounded, kind, into, dtype, held)  # fmt: skip
            if pairs == 2:
                second = _add(second, x + each.to(tl.int64) * tokens * columns, place, m, w,
                              numbers[k], weight_of(next_row), r, minimum, tokens, ok, gain,
                              bounded, kind, into, dtype, held)  # fmt: skip
    _finish(first, out, bias, m, n, tokens, outputs, biased, into)
    if pairs == 2:
        _finish(second, out + each.to(tl.int64) * tokens * outputs, bias + each * bias_part, m, n,
                tokens, outputs, biased, into)  # fmt: skip


def linear(x: Tensor, theta: Tensor, bias: Tensor | None, drawn: Drawn) -> Tensor:
    """x (parts, tokens, in) by the weights that each part sees -> (parts, tokens, out).

    theta (out, in), float32 or x's dtype; bias (parts or 1, out) or None; `few` says when.
    """
    parts, tokens, columns = x.shape
    outputs = theta.shape[0]
    out = torch.empty(parts, tokens, outputs, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    bm, bn = min(TILE, max(16, triton.next_power_of_2(tokens))), 64
    reach = drawn.streams if drawn.reach is None else drawn.reach
    shift = out if bias is None else bias.detach().to(x.dtype).contiguous()
    dtype = _DTYPES[x.dtype]
    grid = (triton.cdiv(tokens, bm), triton.cdiv(outputs, bn), parts // drawn.pairs)
    _dense[grid](
        x.contiguous(), bits_of(theta), drawn.streams, reach, bits_of(shift), bits_of(out),
        tokens, outputs, columns, drawn.over, drawn.lanes,
        outputs if bias is not None and len(bias) > 1 else 0, *drawn.numbers,
        biased=bias is not None, kind=KINDS[theta.dtype], into=KINDS[x.dtype], pairs=drawn.pairs,
        dtype=dtype, held=tl.float32 if _INTERPRETED else dtype, bm=bm, bn=bn,
        num_warps=8 if bm > 32 else 4, **drawn.constants,
    )  # fmt: skip
    return out
