# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""The Triton kernel of quantized products: one tile of outputs for one or two parts of a batch.

Each tile of codes is unpacked once; every part's own scales are laid on it, read from memory or
moved from one set of scales by directions that are drawn here, once per group; the dequantized
weight never reaches memory. `triton.py` launches it.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from zotune.quant.kernels.directions import moved
from zotune.quant.kernels.philox import one, weight_of

_jit: Any = triton.jit
_free: Any = triton.jit(do_not_specialize=["over", "each", "k0", "k1", "most"])


@_jit
def _codes(
    at, inside, table, plane: tl.constexpr, bits: tl.constexpr, lookup: tl.constexpr
):  # fmt: skip
    """One tile of codes: numbers of a table, or whole or fractional codes, centred."""
    q = tl.load(at, inside, other=0)
    if bits < 8:
        q = (q.to(tl.int32) >> (plane * bits)) & ((1 << bits) - 1)
        if lookup:
            q = tl.load(table + q)
        else:
            q = q - (1 << (bits - 1))
    return q


@_jit
def _weight(q, scale, zero, at, ok, zeroed: tl.constexpr, dtype: tl.constexpr):  # fmt: skip
    """(codes - zero) * scale, rounded to the product's dtype."""
    q = q.to(tl.float32)
    if zeroed:
        q -= tl.load(zero + at, ok, other=0.0)
    return (q * scale).to(dtype)


@_jit
def _add(x, q, scale, zero, at, ok, acc, zeroed: tl.constexpr, integer: tl.constexpr,
             dtype: tl.constexpr, held: tl.constexpr):  # fmt: skip
    """acc + x @ w.T for one tile and one part, whose scales these are."""
    if integer:
        sums = tl.dot(x, tl.trans(q.to(tl.int8))).to(tl.float32)
        return acc + sums * tl.trans(scale)
    w = _weight(q, scale, zero, at, ok, zeroed, dtype).to(held)
    if x.dtype.is_int():
        x = x.to(tl.float32)
    return tl.dot(x.to(dtype).to(held), tl.trans(w), acc, input_precision="ieee")


@_jit
def _finish(acc, out, x_scale, bias, m, n, tokens, outputs, rounded: tl.constexpr,
            biased: tl.constexpr):  # fmt: skip
    """Row scales, bias, and the tile into memory."""
    if rounded:
        acc = acc * tl.load(x_scale + m, m < tokens, other=0.0)[:, None]
    if biased:
        acc += tl.load(bias + n, n < outputs, other=0.0)[None, :]
    inside = (m < tokens)[:, None] & (n < outputs)[None, :]
    tl.store(out + m[:, None] * outputs + n[None, :], acc.to(out.dtype.element_ty), inside)


@_jit
def _drawn_scales(scale, at, ok, row, other, reach, over, k0, k1, most, reach_value, minimum,
                  parts: tl.constexpr, law: tl.constexpr, gain: tl.constexpr,
                  spread: tl.constexpr, bounded: tl.constexpr, shared: tl.constexpr):  # fmt: skip
    """Scales of the stream in `row` and, for a second part, of the one in `other`."""
    theta = tl.load(scale + at, ok, other=0.0)
    far = reach_value
    if spread:
        far = tl.load(reach + at // over, ok, other=0.0)
    u = one(at, row, k0, k1, most, law)
    first = moved(theta, u, weight_of(row), far, minimum, gain, bounded)
    second = first
    if parts == 2:
        if not shared:
            u = one(at, other, k0, k1, most, law)
        second = moved(theta, u, weight_of(other), far, minimum, gain, bounded)
    return first, second


@_free
def product(
    x, x_scale, codes, scale, zero, bias, table, out, streams, reach,
    tokens, outputs, columns, width, groups, group, row, scale_part, zero_part, bias_part,
    over, each, k0, k1, most, reach_value, minimum,
    bits: tl.constexpr, planes: tl.constexpr, parts: tl.constexpr, uniform: tl.constexpr,
    zeroed: tl.constexpr, biased: tl.constexpr, lookup: tl.constexpr, rounded: tl.constexpr,
    integer: tl.constexpr, dtype: tl.constexpr, held: tl.constexpr,
    drawn: tl.constexpr, law: tl.constexpr, gain: tl.constexpr, spread: tl.constexpr,
    bounded: tl.constexpr, shared: tl.constexpr,
    bm: tl.constexpr, bn: tl.constexpr, bk: tl.constexpr,
):  # fmt: skip
    """out[p] = x[p] @ ((codes - zero[p]) * scale[p]).T for parts p of this program.

    A row of codes has `row` elements; plane k of `planes` holds the columns from k * width on.
    `uniform`: every tile of `bk` columns lies in one group. Two parts are `each` parts apart.
    `drawn`: scale is one for all parts, moved by directions that are drawn once for each group.
    """
    m = tl.program_id(0) * bm + tl.arange(0, bm).to(tl.int64)
    n = tl.program_id(1) * bn + tl.arange(0, bn).to(tl.int64)
    p = tl.program_id(2) // each * each * parts + tl.program_id(2) % each
    streams += p * 6
    next_streams = streams + each * 6
    k0 = k0.to(tl.uint32, bitcast=True)
    k1 = k1.to(tl.uint32, bitcast=True)
    apart = each.to(tl.int64) * tokens
    x += p.to(tl.int64) * tokens * columns
    out += p.to(tl.int64) * tokens * outputs
    x_scale += p * tokens
    scale += p * scale_part
    zero += p * zero_part
    bias += p * bias_part
    first = tl.zeros((bm, bn), tl.float32)
    second = first
    s_first = tl.zeros((bn, 1 if uniform else bk), tl.float32)
    s_second = s_first
    for plane in tl.static_range(planes):
        for start in range(0, width, bk):
            byte = start + tl.arange(0, bk)
            k = plane * width + byte
            ok = (byte < width) & (k < columns)
            here = (n < outputs)[:, None] & ok[None, :]
            q = _codes(codes + n[:, None] * row + byte[None, :], here, table, plane, bits, lookup)
            if uniform:
                # A last tile may lie in the padding behind the last group.
                at = n[:, None] * groups + tl.minimum((plane * width + start) // group, groups - 1)
                valid = (n < outputs)[:, None]
            else:
                at = n[:, None] * groups + (k // group)[None, :]
                valid = here
            if drawn:
                if (start == 0) | ((plane * width + start) % group < bk):
                    s_first, s_second = _drawn_scales(
                        scale, at, valid, streams, next_streams, reach, over, k0, k1, most,
                        reach_value, minimum, parts, law, gain, spread, bounded, shared,
                    )  # fmt: skip
            else:
                s_first = tl.load(scale + at, valid, other=0.0)
                if parts == 2:
                    s_second = tl.load(scale + each * scale_part + at, valid, other=0.0)
            tile = (m < tokens)[:, None] & ok[None, :]
            source = x + m[:, None] * columns + k[None, :]
            first = _add(tl.load(source, tile, other=0.0), q, s_first, zero, at, valid, first,
                             zeroed, integer, dtype, held)  # fmt: skip
            if parts == 2:
                source += apart * columns
                second = _add(tl.load(source, tile, other=0.0), q, s_second,
                                  zero + each * zero_part, at, valid, second, zeroed, integer,
                                  dtype, held)  # fmt: skip
    _finish(first, out, x_scale, bias, m, n, tokens, outputs, rounded, biased)
    if parts == 2:
        _finish(second, out + apart * outputs, x_scale + apart, bias + each * bias_part, m, n,
                tokens, outputs, rounded, biased)  # fmt: skip
