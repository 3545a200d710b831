# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Quantized products on GPUs, as one Triton kernel.

A program owns one tile of outputs for one or two parts of the batch (the probes +eps and -eps).
It unpacks each tile of codes once, lays every part's own scales on it and adds to that part's
sums; the dequantized weight never reaches memory. Codes of 2, 4 and 8 bits, tables of 16 numbers
and one number per weight are read as they lie; other widths are dequantized by the reference.

Without a GPU the kernel runs under Triton's interpreter (TRITON_INTERPRET=1), as in the tests.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from zotune.quant.codebooks import TABLES
from zotune.quant.kernels import reference, refuse_gradient
from zotune.quant.kernels.directions import Drawn, moved
from zotune.quant.kernels.philox import one, weight_of
from zotune.quant.packing import packed_columns
from zotune.quant.scheme import Scheme

_jit: Any = triton.jit
_free: Any = triton.jit(do_not_specialize=["over", "each", "k0", "k1", "most"])
# The interpreter's products take the bits of a bfloat16 for a whole number.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
MOST = 65534  # parts of one launch: a GPU's limit, made even
DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
}


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
def _product(x, q, scale, zero, at, ok, acc, zeroed: tl.constexpr, integer: tl.constexpr,
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
def _linear(
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
            first = _product(tl.load(source, tile, other=0.0), q, s_first, zero, at, valid, first,
                             zeroed, integer, dtype, held)  # fmt: skip
            if parts == 2:
                source += apart * columns
                second = _product(tl.load(source, tile, other=0.0), q, s_second,
                                  zero + each * zero_part, at, valid, second, zeroed, integer,
                                  dtype, held)  # fmt: skip
    _finish(first, out, x_scale, bias, m, n, tokens, outputs, rounded, biased)
    if parts == 2:
        _finish(second, out + apart * outputs, x_scale + apart, bias + each * bias_part, m, n,
                tokens, outputs, rounded, biased)  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """How codes lie in memory: `planes` runs of `width` columns, `bits` apart in a byte."""

    bits: int
    planes: int
    width: int
    lookup: bool = False

    @staticmethod
    def of(codes: Tensor, scheme: Scheme, columns: int) -> tuple[Tensor, Layout]:
        """Codes as the kernel can read them, and how they then lie."""
        if codes.dtype == torch.uint8 and scheme.bits in (2, 4):
            lookup = (scheme.kind, scheme.bits) in TABLES
            layout = Layout(scheme.bits, 8 // scheme.bits, codes.shape[-1], lookup)
            return codes.contiguous(), layout
        codes = reference.one_per_weight(codes, scheme.bits, columns)
        return codes.contiguous(), Layout(8, 1, columns)

    def tile(self, group: int, columns: int) -> tuple[int, bool]:
        """Columns per tile, and whether each tile lies in one group."""
        for bk in (64, 32, 16):
            if group % bk == 0 and (self.planes == 1 or self.width % bk == 0):
                return bk, True
        return (64, True) if group >= columns else (32, False)


def linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    scheme: Scheme,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """y = x @ ((codes - zero) * scale).T + bias; arguments as in `zotune.quant.kernels.linear`.

    Raises:
        BadInput: if a gradient is wanted; this kernel has none.
    """
    refuse_gradient("triton", x, scale, zero, bias)
    flat = x.reshape(1, x.shape[:-1].numel(), x.shape[-1])
    zeros, biases = (None if t is None else t[None] for t in (zero, bias))
    y = stacked(flat, codes, scale[None], zeros, biases, scheme, compute_dtype)
    return y.view(*x.shape[:-1], codes.shape[0])


def stacked(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    scheme: Scheme,
    compute_dtype: torch.dtype | None = None,
    drawn: Drawn | None = None,
) -> Tensor:
    """One layer at several points that share their codes, which are unpacked once for two of them.

    Args:
        x: (parts, tokens, in), as the layer's `inputs` gives it.
        codes: packed (out, bytes) or one number per weight (out, in).
        scale, zero, bias: (parts or 1, ...): each part's own, or one for all.
        drawn: directions that move the scales of each part, drawn where they are used; for
            at most MOST parts that share their scales, where `uniform` says so.

    Returns:
        (parts, tokens, out) in x's dtype.
    """
    parts, tokens, columns = x.shape
    outputs = codes.shape[0]
    if parts > MOST:
        return _in_runs(x, codes, scale, zero, bias, scheme, compute_dtype)
    out = x.new_empty(parts, tokens, outputs)
    if out.numel() == 0:
        return out
    codes, layout = Layout.of(codes, scheme, columns)
    inputs, x_scale = x.contiguous(), x
    if scheme.integer_inputs:
        flat, x_scale = reference.quantize_rows(x.flatten(0, 1))
        inputs = flat.view(x.shape)
    group = scheme.group_size or -(-columns // scale.shape[-1])
    bk, uniform = layout.tile(group, columns)
    whole = not codes.is_floating_point() and not layout.lookup
    dtype = DTYPES[compute_dtype or x.dtype]
    scales = _wide(scale, outputs)
    zeros, biases = (scales if t is None else _wide(t, outputs) for t in (zero, bias))
    tensors, numbers, constants = _arguments(drawn, scales)
    each = 1 if drawn is None else drawn.lanes
    bm, both = min(64, max(16, triton.next_power_of_2(tokens))), 2 - parts // each % 2
    _linear[triton.cdiv(tokens, bm), triton.cdiv(outputs, 64), parts // both](
        inputs, x_scale, codes, scales, zeros, biases, _table(scheme, x.device), out,
        *tensors, tokens, outputs, columns, layout.width, scales.shape[-1], group, codes.shape[1],
        _step(scales), _step(zeros), _step(biases), *numbers,
        bits=layout.bits, planes=layout.planes, parts=both, uniform=uniform,
        zeroed=zero is not None, biased=bias is not None, lookup=layout.lookup,
        rounded=scheme.integer_inputs,
        integer=scheme.integer_inputs and whole and uniform and zero is None,
        dtype=dtype, held=tl.float32 if INTERPRETED else dtype, bm=bm, bn=64, bk=bk,
        drawn=drawn is not None, shared=drawn is not None and drawn.shared,
        **constants,
    )  # fmt: skip
    return out


def _in_runs(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None,
    scheme: Scheme, compute_dtype: torch.dtype | None,
) -> Tensor:  # fmt: skip
    """More parts than one launch takes."""
    runs = []
    for start in range(0, len(x), MOST):
        here = slice(start, start + MOST)
        own = [t if t is None or len(t) == 1 else t[here] for t in (scale, zero, bias)]
        assert own[0] is not None
        runs.append(stacked(x[here], codes, own[0], own[1], own[2], scheme, compute_dtype))
    return torch.cat(runs)


def uniform(scheme: Scheme, columns: int, groups: int) -> bool:
    """Whether a kernel can draw the directions of such a layer's scales where it uses them: no
    tile of codes straddles two groups.

    >>> uniform(Scheme.parse("int4-g128"), 5120, 40), uniform(Scheme.parse("int4-g24"), 48, 2)
    (True, False)
    """
    layout = Layout(8, 1, columns)
    if scheme.bits in (2, 4):
        layout = Layout(scheme.bits, 8 // scheme.bits, packed_columns(scheme.bits, columns))
    return layout.tile(scheme.group_size or -(-columns // groups), columns)[1]


def _arguments(drawn: Drawn | None, scales: Tensor) -> tuple[list[Any], list[Any], dict[str, Any]]:
    """Tensors, numbers and constants of the directions that the kernel draws, if any."""
    if drawn is None:
        law = {"law": 0, "gain": 1.0, "spread": False, "bounded": False}
        return [scales, scales], [1, 1, 0, 0, 0, 0.0, 0.0], {**law, "enable_fp_fusion": True}
    reach = scales if drawn.reach is None else drawn.reach
    return [drawn.streams, reach], [drawn.over, drawn.lanes, *drawn.numbers], drawn.constants


def _wide(values: Tensor, outputs: int) -> Tensor:
    """float32 (parts or 1, out[, groups]), contiguous."""
    values = values.detach().float()
    if values.dim() == 3 and values.shape[1] != outputs:  # one scale for the whole weight
        values = values.expand(-1, outputs, -1)
    return values.contiguous()


def _step(values: Tensor) -> int:
    """Numbers from one part's values to the next one's; 0 where all parts share them."""
    return 0 if values.shape[0] == 1 else values[0].numel()


@cache
def _table(scheme: Scheme, device: torch.device) -> Tensor:
    return torch.tensor(TABLES.get((scheme.kind, scheme.bits), (0.0,)), device=device)
