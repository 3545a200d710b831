# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
"""Products of codes in bfloat16 on AVX-512, their dequantized weight never in memory.

A thread lays a panel of 64 outputs once, dequantizes it for each probe's scales into its nearest
cache, two columns to a lane, and meets it with that probe's rows. vdpbf16ps multiplies pairs of
bfloat16 exactly and adds them up in float32; outputs leave in float32, bias added.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from torch import Tensor

from zotune.quant.kernels import panels
from zotune.quant.kernels.compiled import to_bfloat16
from zotune.quant.kernels.panels import PANEL, ROWS, VECTORS, columns_of, keep, lay, place
from zotune.quant.kernels.vectors import FLOATS, LANES, WORD, WORDS, Code, processor_has
from zotune.quant.scheme import Scheme

_inlined: Any = njit(nogil=True, cache=True, forceinline=True)
_compiled: Any = njit(nogil=True, cache=True)
_f, _i = np.float32, np.int32


def available() -> bool:
    """Whether this processor has the instructions, and not AMX, where oneDNN is faster."""
    return processor_has("avx512bf16", "avx512bw") and not processor_has("amx-bf16")


def _emit(typingctx, out, out_at, out_width, x, row, panel, steps, bias):  # type: ignore[no-untyped-def]
    """out[r, c] = sum over k < 2 steps of x[row + r, k] panel[k, c], + bias[c]."""
    kinds = (out, out_at, out_width, x, row, panel, steps, bias)

    def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        code, b = Code(context, builder), builder
        out, out_at, out_width, x, row, panel, steps, bias = (
            code.data(kind, value)
            if n in (0, 3, 5, 7)
            else context.cast(b, value, kind, types.intp)
            for n, (kind, value) in enumerate(zip(signature.args, arguments, strict=True))
        )
        size = steps.type
        dot = b.module.declare_intrinsic(
            "llvm.x86.avx512bf16.dpbf16ps.512", (), ir.FunctionType(FLOATS, [FLOATS, WORDS, WORDS])
        )
        rows = [b.mul(b.mul(b.add(row, size(r)), steps), size(4)) for r in range(ROWS)]

        def place(r: int, j: int) -> Any:
            start = b.add(out_at, b.mul(out_width, size(r)))
            return b.mul(b.add(start, size(LANES * j)), size(4))

        for r in range(ROWS):  # what the next rows of this panel will write comes meanwhile
            for j in range(VECTORS):
                code.fetch(out, place(ROWS + r, j))

        def more(k: Any, held: Any) -> Any:
            base, column = b.mul(k, size(4 * PANEL)), b.mul(k, size(4))
            weights = [
                code.load(panel, b.add(base, size(4 * LANES * j)), WORDS) for j in range(VECTORS)
            ]
            pairs = [code.spread(code.load(x, b.add(start, column), WORD)) for start in rows]
            return [[b.call(dot, [held[r][j], weights[j], pairs[r]]) for j in range(VECTORS)]
                    for r in range(ROWS)]  # fmt: skip

        sums = code.accumulate([[code.constant(0.0)] * VECTORS] * ROWS, steps, more)
        for r in range(ROWS):
            for j in range(VECTORS):
                value = b.fadd(sums[r][j], code.load(bias, size(4 * LANES * j), FLOATS))
                b.store(value, code.at(out, place(r, j), FLOATS), align=4)
        return context.get_dummy_value()

    return types.void(*kinds), codegen


_tile: Any = intrinsic(_emit)


@_inlined
def _dequantize(weights, codes, offset, scale, zero, group):  # type: ignore[no-untyped-def]
    """weights[k / 2, c] = the pair (codes - zero) scale of columns k and k + 1."""
    for k in range(codes.shape[0] // PANEL):
        g = 4 * k // group
        scales, zeros = scale[g], zero[g]
        source = codes[k * PANEL : (k + 1) * PANEL]
        for pair in range(2):
            to = weights[(2 * k + pair) * PANEL : (2 * k + pair + 1) * PANEL]
            low, high = _i(16 * pair), _i(16 * pair + 8)
            for c in range(PANEL):
                a = _f(_i(_i(_i(source[c] >> low) & _i(255)) - offset)) - zeros[c]
                b = _f(_i(_i(_i(source[c] >> high) & _i(255)) - offset)) - zeros[c]
                first, second = to_bfloat16(a * scales[c]), to_bfloat16(b * scales[c])
                to[c] = _i(_i(first) | _i(_i(second) << _i(16)))


@_compiled
def _product(out, x, tokens, words, layout, offset, scale, zero, bias, columns, chunk, start, stop):  # type: ignore[no-untyped-def]
    """Outputs of tasks start..stop. x int32 (rows + at least ROWS - 1, columns / 2), pairs of
    bfloat16; the rest as in `vnni._product`, where `zero` always has parts."""
    rows, outputs = out.shape
    groups, parts = scale.shape[2], rows // tokens
    codes = np.zeros((columns // 4) * PANEL, np.int32)
    weights = np.empty((columns // 2) * PANEL, np.int32)
    scales, zeros = np.zeros((groups, PANEL), np.float32), np.zeros((groups, PANEL), np.float32)
    biases = np.zeros((1, PANEL), np.float32)
    edge, flat = np.empty(ROWS * PANEL, np.float32), out.reshape(-1)
    laid, seen, less = -1, -1, _i(offset)
    for task in range(start, stop):
        first, p, low, high = place(task, chunk, parts, tokens)
        width = min(PANEL, outputs - first)
        if first != laid:
            lay(codes, words, layout, first, width, columns // 4)
            laid, seen = first, -1
        if p != seen:
            columns_of(scales, scale, p, first, width)
            columns_of(zeros, zero, p, first, width)
            columns_of(biases, bias, p, first, width)
            _dequantize(weights, codes, less, scales, zeros, columns // groups)
            seen = p
        for row in range(low, high, ROWS):
            if width == PANEL and row + ROWS <= high:
                _tile(flat, row * outputs + first, outputs, x, row, weights, columns // 2, biases)
                continue
            _tile(edge, 0, PANEL, x, row, weights, columns // 2, biases)
            keep(out, edge, row, high, first, width)


def fits(codes: Tensor, scheme: Scheme, columns: int) -> bool:
    """Whether layers of such codes can go this way here."""
    return available() and panels.fits(codes, scheme, columns)


def product_(
    out: Tensor,
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    bits: int,
) -> None:
    """out[p] = x[p] ((codes - zero) scale)^T + bias, each part p at its own values.

    Args:
        out: contiguous float32 (parts, tokens, outputs).
        x: (parts, tokens, columns), rounded here to bfloat16.
        codes: int8 (outputs, columns), or uint8 packed.
        scale, zero: (parts, outputs, groups); parts and outputs may be 1.
        bias: (parts, outputs, 1), or None.
    """
    parts, tokens, columns = x.shape
    held = torch.empty(parts * tokens + ROWS - 1, columns, dtype=torch.bfloat16)
    held[: parts * tokens].copy_(x.view(-1, columns))
    held[parts * tokens :] = 0
    pairs = held.view(torch.int32).numpy()
    target = out.view(-1, out.shape[-1]).numpy()
    scales, zeros, biases = panels.numbers(scale, zero, bias)
    words, layout, offset = panels.Laying.of(codes, bits, columns)
    zeros = zeros if zero is not None else np.zeros((1, 1, scales.shape[2]), np.float32)

    def work(chunk: int, start: int, stop: int) -> None:
        _product(target, pairs, tokens, words, layout, offset, scales, zeros, biases, columns,
                 chunk, start, stop)  # fmt: skip

    panels.in_tasks(work, parts, tokens, out.shape[-1], columns)
