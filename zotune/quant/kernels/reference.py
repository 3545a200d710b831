"""The truth every other kernel is tested against: plain torch, any device, differentiable."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zotune.quant.affine import dequantize
from zotune.quant.packing import unpack
from zotune.quant.scheme import Scheme


def one_per_weight(codes: Tensor, bits: int, columns: int) -> Tensor:
    """Codes (out, in) with one number per weight: unpacks uint8, passes anything else through.

    >>> one_per_weight(torch.zeros(1, 4, dtype=torch.uint8), 4, 8).tolist()
    [[-8, -8, -8, -8, -8, -8, -8, -8]]
    """
    return unpack(codes, bits, columns) if codes.dtype == torch.uint8 else codes


def quantize_rows(x: Tensor, bits: int = 8) -> tuple[Tensor, Tensor]:
    """Quantize activations to integers, one scale per row.

    scale = max|x| / n,  code = round(x * n / max|x|)

    with n = 127 and codes within -127..127 for 8 bits, as the integer products of vLLM have it, and
    n = 2^(bits-1) - 1/2 and codes within -2^(bits-1)..2^(bits-1) - 1 for fewer, as
    compressed-tensors has it: there every code counts, and the largest positive number gives up
    half a step.

    Args:
        x: (tokens, in), any float dtype.

    Returns:
        codes int8 (tokens, in) and scale float32 (tokens, 1); a row of zeros gets scale 0.

    >>> codes, scale = quantize_rows(torch.tensor([[1.0, -0.5]]))
    >>> codes.tolist(), round(scale.item() * 127, 6)
    ([[127, -64]], 1.0)
    >>> codes, scale = quantize_rows(torch.tensor([[7.5, -7.5, 3.4]]), bits=4)
    >>> codes.tolist(), scale.item()
    ([[7, -8, 3]], 1.0)
    """
    x = x.float()
    if x.numel() == 0:
        return x.to(torch.int8), x.new_zeros(x.shape[0], 1)
    largest = x.abs().amax(-1, keepdim=True)
    if bits == 8:
        scale = largest * (1 / 127.0)
        codes = (x * torch.where(largest > 0, 127.0 / largest, 0.0)).round_().clamp_(-127, 127)
    else:
        # The largest number lies between two codes: only that library's own operations, in its
        # order, send it the same way.
        half = float(1 << (bits - 1))
        scale = largest / (half - 0.5)
        codes = (x / scale).round_().clamp_(-half, half - 1)
    # NaN has no code; the scale carries it to the output so that it is never mistaken for a number.
    return codes.nan_to_num_(0.0).to(torch.int8), scale


def ends(x: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest and the largest number of each row, (..., 1), or 0 where all lie on one side."""
    return x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)


def quantize_rows_unevenly(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize activations to integers by a scale and a zero point per row, which is what
    compressed-tensors does.

    scale = (high - low) / (2^bits - 1),  zero = round(-2^(bits-1) - low / scale),
    code = round(x / scale + zero) within -2^(bits-1)..2^(bits-1) - 1

    for the `ends` low <= 0 <= high of a row.

    Args:
        x: (tokens, in), any float dtype.

    Returns:
        codes int8 (tokens, in), scale and whole zero float32 (tokens, 1).

    >>> codes, scale, zero = quantize_rows_unevenly(torch.tensor([[14.0, -1.0, 3.3]]), bits=4)
    >>> codes.tolist(), scale.item(), zero.item()
    ([[7, -8, -4]], 1.0, -7.0)
    """
    x, half = x.float(), float(1 << (bits - 1))
    if x.numel() == 0:
        empty = x.new_zeros(x.shape[0], 1)
        return x.to(torch.int8), empty, empty
    low, high = ends(x)
    scale = (high - low) / (2 * half - 1)
    zero = (-half - low / scale).clamp_(-half, half - 1).round_().nan_to_num_(0.0)
    codes = (x / scale).add_(zero).clamp_(-half, half - 1).round_()
    return codes.nan_to_num_(0.0).to(torch.int8), scale, zero


def fake_quantize_rows(x: Tensor, bits: int = 8, symmetric: bool = True) -> Tensor:
    """Activations rounded to their grid, float32; the gradient passes straight through."""
    flat = x.float().reshape(-1, x.shape[-1])
    with torch.no_grad():
        if symmetric:
            codes, scale = quantize_rows(flat, bits)
            rounded = codes.float() * scale
        else:
            codes, scale, zero = quantize_rows_unevenly(flat, bits)
            rounded = (codes.float() - zero) * scale
    if x.requires_grad:
        rounded = flat + (rounded - flat).detach()
    return rounded.reshape(x.shape)


def linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    scheme: Scheme,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """x @ dequantize(codes).T + bias, the product taken in `compute_dtype` or x's dtype.

    With `scheme.integer_inputs` the activations are first rounded to int8 per token and the product
    is taken in float32, as the integer product is exact.
    """
    codes = one_per_weight(codes, scheme.bits, x.shape[-1])
    weight = dequantize(codes, scale, zero, scheme.group_size)
    dtype = compute_dtype or x.dtype
    inputs = x
    if scheme.integer_inputs:
        inputs, dtype = fake_quantize_rows(x), torch.float32
    y = F.linear(inputs.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    return y.to(x.dtype)
