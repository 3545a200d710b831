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
from zotune.quant.kernels.directions import Drawn
from zotune.quant.kernels.product import product
from zotune.quant.packing import packed_columns
from zotune.quant.scheme import Scheme

# The interpreter's products take the bits of a bfloat16 for a whole number.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
MOST = 65534  # parts of one launch: a GPU's limit, made even
DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
}


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
    most = 32 if dtype == tl.float32 else 64  # float32 needs twice the registers
    bm, bn, bk = min(most, max(16, triton.next_power_of_2(tokens))), most, min(most, bk)
    both = 2 - parts // each % 2
    product[triton.cdiv(tokens, bm), triton.cdiv(outputs, bn), parts // both](
        inputs, x_scale, codes, scales, zeros, biases, _table(scheme, x.device), out,
        *tensors, tokens, outputs, columns, layout.width, scales.shape[-1], group, codes.shape[1],
        _step(scales), _step(zeros), _step(biases), *numbers,
        bits=layout.bits, planes=layout.planes, parts=both, uniform=uniform,
        zeroed=zero is not None, biased=bias is not None, lookup=layout.lookup,
        rounded=scheme.integer_inputs,
        integer=scheme.integer_inputs and whole and uniform and zero is None,
        dtype=dtype, held=tl.float32 if INTERPRETED else dtype, bm=bm, bn=bn, bk=bk,
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
        return [scales, scales], [1, 1, 0, 0, 0, 0.0, 0.0], {**law, "enable_fp_fusion": False}
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
