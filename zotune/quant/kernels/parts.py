"""One layer at several points: each part of the rows meets a weight of its own.

What all parts share is done once: inputs are cast, or rounded to int8, as a whole, and outputs
are written into one tensor. Every number is that of the layer's own forward on the part alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from zotune.quant import kernels
from zotune.quant.kernels import bf16, cpu, rounded
from zotune.quant.kernels.rounded import Point
from zotune.quant.scheme import Scheme


def product_(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """out = x @ weight.T + bias, all of one dtype; x (tokens, in), out (tokens, out).

    >>> product_(torch.empty(1, 1), torch.ones(1, 2), torch.ones(1, 2), torch.ones(1))
    tensor([[3.]])
    """
    if bias is None:
        return torch.mm(x, weight.t(), out=out)
    return torch.addmm(bias, x, weight.t(), out=out)


def linear(
    x: Tensor,
    points: Iterable[Point],
    outputs: int,
    scheme: Scheme,
    compute_dtype: torch.dtype | None = None,
    *,
    same_codes: bool = False,
) -> Tensor:
    """x (parts, tokens, in) -> (parts, tokens, outputs) in x's dtype, by the kernel "cpu".

    x is what the layer's `inputs` gives. `points` are used one after the other, so that each may
    lie in the scratch of the one before. With `same_codes` they differ in nothing but scale, zero
    and bias, and what codes alone decide is done once for all of them.
    """
    dtype = compute_dtype or x.dtype
    out = x.new_empty(*x.shape[:-1], outputs)
    batches = [list(points)] if same_codes else ([point] for point in points)
    if scheme.integer_inputs:
        return rounded.linear_(out, x, batches, scheme, dtype)
    first = 0
    for batch in batches:
        here = slice(first, first + len(batch))
        _meet_(out[here], x[here], batch, scheme, dtype)
        first = here.stop
    return out


def _meet_(
    out: Tensor, x: Tensor, points: Sequence[Point], scheme: Scheme, dtype: torch.dtype
) -> None:
    codes = points[0].codes
    in_registers = dtype == torch.bfloat16 and bf16.fits(codes, scheme, x.shape[-1])
    if in_registers and out.numel() and kernels.forced_way() != "dequantized":
        y = _as(out, torch.float32)
        bf16.product_(y, x, codes, *rounded.stacked(points), scheme.bits)
        out.copy_(y)
        return
    for target, source, point in zip(out, x.to(dtype), points, strict=True):
        y = _as(target, dtype)
        bias = None if point.bias is None else point.bias.to(dtype)
        product_(y, source, _weight(point, scheme, dtype, x.shape[-1]), bias)
        target.copy_(y)


def _as(target: Tensor, dtype: torch.dtype) -> Tensor:
    """Room for what `target` will hold: itself where it has that dtype (copying is then free)."""
    return target if target.dtype == dtype else torch.empty_like(target, dtype=dtype)


def _weight(point: Point, scheme: Scheme, dtype: torch.dtype, columns: int) -> Tensor:
    codes, scale, zero, _ = point
    return cpu.weight_scratch(codes, scale, zero, scheme.bits, columns, dtype, scheme.group_size)
