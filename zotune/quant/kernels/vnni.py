# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
"""Integer products on AVX-512 VNNI, from codes as they lie to finished float outputs in one pass.

A thread owns panels of 64 outputs. It lays the codes of a panel as the instruction wants them (four
codes of one output side by side, 16 outputs to a register), straight from their packed bytes, and
meets the panel with the rounded activations of all probes, six rows at a time. The sums of a group
are scaled as they leave the registers, each row by the scales of its own probe. Neither sums nor
unpacked codes reach memory.

vpdpbusd multiplies unsigned by signed bytes: codes enter as q = code + 2^(bits - 1), which is how
packed ones are stored, and sums begin at -2^(bits - 1) sum(x) instead of 0.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from zotune.quant.kernels import panels
from zotune.quant.kernels.panels import PANEL, ROWS, VECTORS, columns_of, keep, lay, place
from zotune.quant.kernels.vectors import (
    BYTE,
    FLOAT,
    FLOATS,
    LANES,
    WORD,
    WORDS,
    Code,
    processor_has,
)
from zotune.quant.scheme import Scheme

_compiled: Any = njit(nogil=True, cache=True)


def available() -> bool:
    """Whether this processor has the instructions."""
    return processor_has("avx512vnni", "avx512bw")


def _dots(code: Code, begin: Any, x: Any, rows: Any, panel: Any, steps: Any) -> Any:
    """begin + sum over k < 4 steps of x[row + k] panel[k], by row and vector."""
    b, size = code.builder, steps.type
    dot = code.external("llvm.x86.avx512.vpdpbusd.512", WORDS)

    def more(k: Any, held: Any) -> Any:
        base, column = b.mul(k, size(4 * PANEL)), b.mul(k, size(4))
        q = [code.load(panel, b.add(base, size(4 * LANES * j)), WORDS) for j in range(VECTORS)]
        fours = [code.spread(code.load(x, b.add(row, column), WORD)) for row in rows]
        return [[b.call(dot, [held[r][j], q[j], fours[r]]) for j in range(VECTORS)]
                for r in range(ROWS)]  # fmt: skip

    return code.accumulate([[begin[r]] * VECTORS for r in range(ROWS)], steps, more)


def _tile_of(zeroed: bool) -> Any:
    """The tile for layers with zero points, or without."""

    @intrinsic
    def tile(typingctx, out, out_at, out_width, x, x_scale, x_sums, row, panel, steps, groups,
             offset, scale, zero, bias):  # type: ignore[no-untyped-def]  # fmt: skip
        kinds = (out, out_at, out_width, x, x_scale, x_sums, row, panel, steps, groups, offset,
                 scale, zero, bias)  # fmt: skip

        def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            code, b = Code(context, builder), builder
            arrays = {0, 3, 4, 5, 7, 11, 12, 13}
            (out, out_at, out_width, x, x_scale, x_sums, row, panel, steps, groups, offset,
             scale, zero, bias) = (
                code.data(kind, value) if n in arrays
                else context.cast(b, value, kind, types.intp)
                for n, (kind, value) in enumerate(zip(signature.args, arguments, strict=True))
            )  # fmt: skip
            size = row.type
            numbers = [b.add(row, size(r)) for r in range(ROWS)]
            columns = b.mul(b.mul(steps, groups), size(4))
            held = b.bitcast(
                cgutils.alloca_once(b, ir.ArrayType(FLOATS, ROWS * VECTORS)), BYTE.as_pointer()
            )
            places = [[size(64 * (r * VECTORS + j)) for j in range(VECTORS)] for r in range(ROWS)]
            for r in range(ROWS):
                for j in range(VECTORS):
                    b.store(code.constant(0.0), code.at(held, places[r][j], FLOATS), align=4)
            for r in range(ROWS):  # what the next rows of this panel will write comes meanwhile
                ahead = b.mul(b.add(out_at, b.mul(out_width, size(ROWS + r))), size(4))
                for j in range(VECTORS):
                    code.fetch(out, b.add(ahead, size(64 * j)))
            fma = code.external("llvm.fma.v16f32", FLOATS)
            with cgutils.for_range(b, groups) as loop:
                g = loop.index
                totals = [
                    code.load(x_sums, b.mul(b.add(b.mul(n, groups), g), size(4)), WORD)
                    for n in numbers
                ]
                less = b.neg(b.trunc(offset, WORD))
                begin = [code.spread(b.mul(less, total)) for total in totals]
                first = b.mul(b.mul(g, steps), size(4))
                rows = [b.add(b.mul(n, columns), first) for n in numbers]
                here = code.at(panel, b.mul(first, size(PANEL)), BYTE)
                sums = _dots(code, begin, x, rows, here, steps)
                lanes = [b.add(b.mul(g, size(4 * PANEL)), size(64 * j)) for j in range(VECTORS)]
                scales = [code.load(scale, lane, FLOATS) for lane in lanes]
                for r in range(ROWS):
                    total = code.spread(b.sitofp(totals[r], FLOAT))
                    for j in range(VECTORS):
                        value = b.sitofp(sums[r][j], FLOATS)
                        if zeroed:
                            value = b.fsub(value, b.fmul(total, code.load(zero, lanes[j], FLOATS)))
                        place = code.at(held, places[r][j], FLOATS)
                        value = b.call(fma, [value, scales[j], b.load(place, align=4)])
                        b.store(value, place, align=4)
            for r in range(ROWS):
                s = code.spread(code.load(x_scale, b.mul(numbers[r], size(4)), FLOAT))
                begin_out = b.mul(b.add(out_at, b.mul(out_width, size(r))), size(4))
                for j in range(VECTORS):
                    value = b.fmul(b.load(code.at(held, places[r][j], FLOATS), align=4), s)
                    value = b.fadd(value, code.load(bias, size(64 * j), FLOATS))
                    b.store(value, code.at(out, b.add(begin_out, size(64 * j)), FLOATS), align=1)
            return context.get_dummy_value()

        return types.void(*kinds), codegen

    return tile


_tile, _tile_zero = _tile_of(False), _tile_of(True)


@_compiled
def _product(out, x, x_scale, x_sums, tokens, words, layout, offset, scale, zero, bias, chunk,
            start, stop):  # type: ignore[no-untyped-def]  # fmt: skip
    """Outputs of tasks start..stop; a task is a panel and `chunk` rows of a part.

    out float32 (parts * tokens, outputs). x int8 (rows + at least ROWS - 1, columns), x_scale
    (as many,), x_sums int32 (as many, groups). words int32 (outputs, words of a row). scale, zero
    (parts, outputs, groups), bias (parts, outputs, 1): sizes of 1 are broadcast. A `zero` of no
    parts means none.
    """
    rows, outputs = out.shape
    groups, columns = x_sums.shape[1], x.shape[1]
    steps, parts = columns // groups // 4, rows // tokens
    panel = np.empty((columns // 4) * PANEL, np.int32)
    scales = np.zeros((parts, groups, PANEL), np.float32)
    zeros = np.zeros((parts, groups, PANEL), np.float32)
    biases = np.zeros((parts, 1, PANEL), np.float32)
    edge, flat, laid = np.empty(ROWS * PANEL, np.float32), out.reshape(-1), -1
    zeroed = zero.shape[0] > 0
    for task in range(start, stop):
        first, p, low, high = place(task, chunk, parts, tokens)
        width = min(PANEL, outputs - first)
        if first != laid:
            lay(panel, words, layout, first, width, columns // 4)
            for each in range(parts):
                columns_of(scales[each], scale, each, first, width)
                columns_of(biases[each], bias, each, first, width)
                if zeroed:
                    columns_of(zeros[each], zero, each, first, width)
            laid = first
        for row in range(low, high, ROWS):
            whole = width == PANEL and row + ROWS <= high
            to = flat if whole else edge
            at, stride = (row * outputs + first, outputs) if whole else (0, PANEL)
            if zeroed:
                _tile_zero(to, at, stride, x, x_scale, x_sums, row, panel, steps, groups, offset,
                           scales[p], zeros[p], biases[p])  # fmt: skip
            else:
                _tile(to, at, stride, x, x_scale, x_sums, row, panel, steps, groups, offset,
                      scales[p], zeros[p], biases[p])  # fmt: skip
            if not whole:
                keep(out, edge, row, high, first, width)


def fits(codes: Tensor, scheme: Scheme, columns: int) -> bool:
    """Whether layers of such codes can go this way here."""
    return available() and panels.fits(codes, scheme, columns)


def product_(
    out: Tensor,
    x: Tensor,
    x_scale: Tensor,
    x_sums: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    bits: int,
) -> None:
    """out[p] = (x codes^T - zero sum(x)) scale x_scale + bias, each part p at its own values.

    Args:
        out: contiguous float32 (parts, tokens, outputs).
        x, x_scale, x_sums: rounded rows of all parts, and ROWS - 1 more (`rounded.Rows`).
        codes: int8 (outputs, columns), or uint8 packed.
        scale, zero: (parts, outputs, groups); parts and outputs may be 1.
        bias: (parts, outputs, 1), or None.
    """
    parts, tokens, outputs = out.shape
    target, data = out.view(-1, outputs).numpy(), x.contiguous().numpy()
    factors, sums = x_scale.view(-1).numpy(), x_sums.numpy()
    scales, zeros, biases = panels.numbers(scale, zero, bias)
    zeros = zeros if zero is not None else zeros[:0]
    words, layout, offset = panels.Laying.of(codes, bits, x.shape[-1])

    def work(chunk: int, start: int, stop: int) -> None:
        _product(target, data, factors, sums, tokens, words, layout, offset, scales, zeros, biases,
                 chunk, start, stop)  # fmt: skip

    panels.in_tasks(work, parts, tokens, outputs, x.shape[-1])
