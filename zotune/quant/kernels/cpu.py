"""Fast forward on CPUs: compiled dequantization into a scratch, or an exact int8 product.

Without quantized activations the codes are unpacked, scaled and rounded to the product's dtype in
one pass over memory, into a scratch the size of one layer, and `F.linear` does the rest. With int8
activations and one scale per row the product is `torch._int_mm` on the codes themselves; group
scales cannot leave the sum, so there the activations are rounded and the dequantized product taken.
"""

from __future__ import annotations

import threading
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from zotune.quant.kernels import compiled, integer_matmul, refuse_gradient
from zotune.quant.kernels.threads import parallel_ranges
from zotune.quant.packing import unpack
from zotune.quant.scheme import Scheme

# Elements a thread should have at least: waking one costs more than a smaller share takes.
GRAIN = 1 << 17
# Scratch above this size is given back after each use.
SCRATCH_BYTES = 1 << 26
# Widths that are unpacked and scaled in one pass; others are unpacked before.
PACKED = (2, 3, 4)
_local = threading.local()


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
    refuse_gradient("cpu", x, scale, zero, bias)
    dtype = compute_dtype or x.dtype
    if not scheme.integer_inputs:
        weight = weight_scratch(
            codes, scale, zero, scheme.bits, x.shape[-1], dtype, scheme.group_size
        )
        return F.linear(x.to(dtype), weight, None if bias is None else bias.to(dtype)).to(x.dtype)
    x_codes, x_scale = quantize_rows(x.reshape(-1, x.shape[-1]))
    if integer(codes, scale):
        y = integer_product(x_codes, x_scale, codes, scale, zero, bias, scheme.bits)
    else:
        # int8 codes are exact in every float dtype, so they enter the product unscaled.
        weight = weight_scratch(
            codes, scale, zero, scheme.bits, x.shape[-1], dtype, scheme.group_size
        )
        y = F.linear(x_codes.to(dtype), weight).float().mul_(x_scale)
        if bias is not None:
            y += bias
    return y.to(x.dtype).reshape(*x.shape[:-1], y.shape[-1])


def weight_scratch(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    columns: int,
    dtype: torch.dtype,
    group_size: int | None = None,
) -> Tensor:
    """The dequantized weight (out, in) in this thread's scratch; the next call overwrites it."""
    if dtype not in (torch.float32, torch.bfloat16):
        wide = weight_scratch(codes, scale, zero, bits, columns, torch.float32, group_size)
        return wide.to(dtype)
    out = _scratch("weight", codes.shape[0], columns, dtype)
    zeros = torch.zeros(1, scale.shape[1]) if zero is None else zero
    if codes.dtype == torch.uint8 and bits not in PACKED:
        codes = unpack(codes, bits, columns)
    if codes.dtype not in (torch.uint8, torch.int8):
        codes = codes.float()
    _fill(out, codes, scale, zeros, bits, group_size)
    return out


def codes_scratch(codes: Tensor, bits: int, columns: int) -> Tensor:
    """int8 codes (out, in); packed ones are unpacked into this thread's scratch."""
    if codes.dtype != torch.uint8:
        return codes.to(torch.int8)
    if bits not in PACKED:
        return unpack(codes, bits, columns)
    out = _scratch("codes", codes.shape[0], columns, torch.int8)
    _fill(out, codes, torch.ones(1, 1), torch.zeros(1, 1), bits)
    return out


def _fill(
    out: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    bits: int,
    group_size: int | None = None,
) -> None:
    """out = (codes - zero) * scale, rounded to out's dtype, rows shared between threads."""
    if out.numel() == 0:
        return
    target = (out.view(torch.uint16) if out.dtype == torch.bfloat16 else out).numpy()
    data, scales, zeros = (
        t.detach().contiguous().numpy() for t in (codes, scale.float(), zero.float())
    )
    grain = max(1, GRAIN // out.shape[1])
    group = group_size or out.shape[1] // scale.shape[1]
    if codes.dtype == torch.uint8:
        work = partial(compiled.scale_packed_rows, data, scales, zeros, target, bits, group)
    else:
        work = partial(compiled.scale_rows, data, scales, zeros, target, group)
    parallel_ranges(work, out.shape[0], grain)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Same codes and scales, bit for bit, as `zotune.quant.kernels.reference.quantize_rows`."""
    x = x.detach().float().contiguous()
    tokens, columns = x.shape
    codes = torch.empty(tokens, columns, dtype=torch.int8)
    scale = torch.zeros(tokens, 1)
    if x.numel():
        values, bits = x.numpy(), x.view(torch.int32).numpy()
        code_rows, scales = codes.numpy(), scale.view(-1).numpy()
        parallel_ranges(
            lambda a, b: compiled.quantize_rows(values, bits, code_rows, scales, a, b),
            tokens,
            max(1, GRAIN // columns),
        )
    return codes, scale


def integer(codes: Tensor, scale: Tensor) -> bool:
    """Whether an integer product will do: whole codes and one scale per row at most."""
    return scale.shape[1] == 1 and not codes.is_floating_point()


def integer_product(
    x_codes: Tensor,
    x_scale: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    bits: int,
    out: Tensor | None = None,
) -> Tensor:
    """(x_codes @ codes.T - sum(x_codes) * zero) * x_scale * scale + bias, float32."""
    sums = integer_sums(x_codes, codes, bits)
    return rescale(sums, x_codes, x_scale, scale, zero, bias, out)


def integer_sums(x_codes: Tensor, codes: Tensor, bits: int) -> Tensor:
    """x_codes @ codes.T, int32, in this thread's scratch; the next call overwrites it."""
    weight = codes_scratch(codes, bits, x_codes.shape[-1])
    # The sums are four times the activations: fresh pages for them cost more than their rescaling.
    sums = _scratch("sums", x_codes.shape[0], codes.shape[0], torch.int32)
    return integer_matmul(x_codes, weight, out=sums)


def rescale(
    acc: Tensor,
    x_codes: Tensor,
    x_scale: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    out: Tensor | None = None,
) -> Tensor:
    """Turn an integer product into float32 outputs in one pass.

    Args:
        acc: int32 (tokens, out) from `integer_matmul(x_codes, codes)`.
        x_codes: int8 (tokens, in), read only when there is a zero.
        x_scale: float32 (tokens, 1).
        scale: (out, 1) or (1, 1).
        zero: like scale, or None.
        bias: (out,) or None.
        out: contiguous float32 (tokens, out) to write into; fresh when left out.
    """
    tokens, outputs = acc.shape
    out = torch.empty(tokens, outputs) if out is None else out
    if out.numel() == 0:
        return out
    sums, factors = acc.numpy(), x_scale.reshape(-1).numpy()
    scales, biases = _row(scale, outputs), _row(bias, outputs)
    target = out.numpy()
    grain = max(1, GRAIN // outputs)
    if zero is None:
        parallel_ranges(
            lambda a, b: compiled.rescale_rows(sums, factors, scales, biases, target, a, b),
            tokens,
            grain,
        )
        return out
    totals = x_codes.sum(-1, dtype=torch.int32).numpy()
    zeros = _row(zero, outputs)
    parallel_ranges(
        lambda a, b: compiled.rescale_rows_zero(
            sums, totals, factors, scales, zeros, biases, target, a, b
        ),
        tokens,
        grain,
    )
    return out


def _row(values: Tensor | None, size: int) -> NDArray[Any]:
    """A float32 numpy vector of `size` values, one value repeated if need be, zeros for None."""
    if values is None:
        return torch.zeros(size).numpy()
    return values.detach().float().reshape(-1).expand(size).contiguous().numpy()


def _scratch(name: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """A matrix of this thread that the next call of the same name overwrites.

    Small ones are kept and grow with the largest layer; one above SCRATCH_BYTES is fresh.
    """
    elements = rows * columns
    if elements * dtype.itemsize > SCRATCH_BYTES:
        return torch.empty(rows, columns, dtype=dtype)
    held: dict[tuple[str, torch.dtype], Tensor] = _local.__dict__.setdefault("held", {})
    found = held.get((name, dtype))
    if found is None or found.numel() < elements:
        found = held[name, dtype] = torch.empty(elements, dtype=dtype)
    return found[:elements].view(rows, columns)
