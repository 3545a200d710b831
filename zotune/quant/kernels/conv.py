"""The forward of a quantized convolution, reference and fast.

Without quantized activations both dequantize and convolve; on CPUs the weight is made in a scratch
by one compiled pass, and images go to the product with their channels last, which oneDNN likes
best. With int8 activations each example has one scale, so that it is the same alone and in company;
whole codes with one scale per output then meet them in an exact integer product over patches.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from zotune.quant import affine, kernels
from zotune.quant.kernels import integer_matmul, reference, refuse_gradient
from zotune.quant.scheme import Scheme


@dataclass(frozen=True)
class Geometry:
    """Where a kernel goes over an image.

    kernel, stride, dilation: (height, width). padding: (left, right, top, bottom), filled by
    `mode` as in F.pad. groups: parts of the channels that do not see each other.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    mode: str = "constant"

    @property
    def area(self) -> int:
        return self.kernel[0] * self.kernel[1]

    def padded(self, x: Tensor) -> Tensor:
        """x (batch, channels, height, width) with its border."""
        return F.pad(x, self.padding, mode=self.mode) if any(self.padding) else x

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The convolution with a weight (out, columns) or (out, in / groups, *kernel)."""
        weight = weight.reshape(len(weight), -1, *self.kernel)
        left, right, top, bottom = self.padding
        even = (left, top) == (right, bottom) and self.mode == "constant"
        x, border = (x, (top, left)) if even else (self.padded(x), (0, 0))
        return F.conv2d(x, weight, bias, self.stride, border, self.dilation, self.groups)

    def patches(self, x: Tensor) -> Tensor:
        """x (batch, height, width, channels), padded -> (batch, height', width', patch): what each
        place sees, by rows of the kernel, its columns, and channels."""
        x = x.contiguous()
        _, height, width, channels = x.shape
        (kh, kw), (sh, sw), (dh, dw) = self.kernel, self.stride, self.dilation
        down = (height - dh * (kh - 1) - 1) // sh + 1
        across = (width - dw * (kw - 1) - 1) // sw + 1
        b, h, w, c = x.stride()
        windows = x.as_strided(
            (len(x), down, across, kh, kw, channels), (b, sh * h, sw * w, dh * h, dw * w, c)
        )
        return windows.reshape(len(x), down, across, -1)


def conv2d(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    scheme: Scheme,
    geometry: Geometry,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """x (batch, in, height, width) convolved with (codes - zero) * scale, by the chosen kernel.

    codes, scale, zero and bias as in `kernels.linear`, with one column per number of a patch, in
    the order (in / groups, *kernel).
    """
    columns = x.shape[1] // geometry.groups * geometry.area
    codes = reference.one_per_weight(codes, scheme.bits, columns)
    fast = kernels.chosen(x, scale, zero, bias) == "cpu"
    if fast and scheme.integer_inputs and whole(codes, scale, geometry):
        return _integer(x, codes, scale, zero, bias, geometry)
    inputs, dtype = x, compute_dtype or x.dtype
    if scheme.act_bits is not None:
        inputs, dtype = fake_quantize(x, scheme), torch.float32
    if fast:
        from zotune.quant.kernels import cpu

        refuse_gradient("cpu", x, scale, zero, bias)
        weight = cpu.weight_scratch(
            codes, scale, zero, scheme.bits, columns, dtype, scheme.group_size
        )
        inputs = inputs.to(dtype, memory_format=torch.channels_last)
    else:
        weight = affine.dequantize(codes, scale, zero, scheme.group_size).to(dtype)
    bias = None if bias is None else bias.to(dtype)
    return geometry.convolve(inputs.to(dtype), weight, bias).to(x.dtype)


def whole(codes: Tensor, scale: Tensor, geometry: Geometry) -> bool:
    """Whether an integer product will do: whole codes, at most one scale per output, one group."""
    return (
        scale.shape[1] == 1 and codes.dtype == torch.int8
        and geometry.groups == 1 and geometry.mode == "constant"
    )  # fmt: skip


def integer_sums(x: Tensor, codes: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor, Tensor]:
    """The integer product over patches, before any scale.

    Args:
        x: (batch, in, height, width) float, quantized here to int8 per example.
        codes: int8 (out, columns).

    Returns:
        int32 sums (batch, height', width', out), int8 patches (places, columns), and the examples'
        scales float32 (batch, 1, 1, 1).
    """
    last = x.permute(0, 2, 3, 1)
    flat, x_scale = kernels.quantize_rows(last.reshape(len(x), -1))
    left, right, top, bottom = geometry.padding
    border = (0, 0, left, right, top, bottom)
    images = F.pad(flat.view(last.shape), border) if any(border) else flat.view(last.shape)
    patches = geometry.patches(images)
    weight = codes.view(len(codes), -1, *geometry.kernel).permute(0, 2, 3, 1)
    rows = patches.reshape(-1, patches.shape[-1])
    sums = integer_matmul(rows, weight.reshape(len(codes), -1))
    return sums.view(*patches.shape[:3], -1), rows, x_scale.view(-1, 1, 1, 1)


def _integer(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None,
    geometry: Geometry,
) -> Tensor:  # fmt: skip
    """(patches @ codes.T - sum(patches) * zero) * x_scale * scale + bias."""
    from zotune.quant.kernels import rounded

    refuse_gradient("cpu", x, scale, zero, bias)
    sums, rows, x_scale = integer_sums(x, codes, geometry)
    each = x_scale.expand(*sums.shape[:3], 1).reshape(-1, 1)
    totals = rows.sum(-1, keepdim=True, dtype=torch.int32)
    flat = sums.view(-1, len(codes))
    y = rounded.rescale_(torch.empty(flat.shape), flat, totals, each, scale, zero, bias)
    return y.view(sums.shape).permute(0, 3, 1, 2).to(x.dtype)


def fake_quantize(x: Tensor, scheme: Scheme) -> Tensor:
    """Images rounded to the grid of each example, float32; the gradient passes straight."""
    assert scheme.act_bits is not None
    flat = reference.fake_quantize_rows(x.flatten(1), scheme.act_bits, scheme.act_symmetric)
    return flat.view(x.shape)
