"""A convolution whose weight is codes and scales."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zotune.errors import BadInput
from zotune.quant import affine
from zotune.quant.kernels import code_dtype
from zotune.quant.kernels.conv import Geometry, conv2d, fake_quantize, integer_sums, whole
from zotune.quant.layer import QuantLayer
from zotune.quant.scheme import Scheme


class QuantConv2d(QuantLayer):
    """y = conv2d(x, (codes - zero) * scale) + bias, with the weight kept as codes.

    A new layer holds nothing useful: use `from_conv`, `set_codes_` or a checkpoint.

    Tensors as in `QuantLayer`, with a row per output channel and columns in the order
    (in / groups, height, width) of the kernel: groups of a scheme are runs of these. With int8
    activations (-a8) each example has one scale.

    Args:
        in_channels, out_channels: sizes of the layer.
        scheme: how the weight is quantized.
        geometry: kernel, stride, padding, dilation, groups.
        bias: whether there is a bias.
        dtype: the bias's dtype.
        device: where the tensors lie; "meta" when they are assigned later.

    >>> layer = QuantConv2d(4, 8, Scheme.parse("int8-channel"), Geometry((3, 3)), bias=False)
    >>> layer(torch.ones(2, 4, 5, 5)).shape, layer.codes.shape
    (torch.Size([2, 8, 3, 3]), torch.Size([8, 36]))
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        scheme: Scheme,
        geometry: Geometry,
        *,
        bias: bool = True,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> None:
        columns = in_channels // geometry.groups * geometry.area
        super().__init__(columns, out_channels, scheme, bias=bias, dtype=dtype, device=device)
        self.in_channels, self.out_channels, self.geometry = in_channels, out_channels, geometry
        # Under nn.Conv2d's names, for models that look at their layers to pad an image.
        self.kernel_size, self.stride = geometry.kernel, geometry.stride
        self.dilation, self.groups = geometry.dilation, geometry.groups

    @property
    def weight(self) -> Tensor:
        """What `dequantize` gives, for models that ask for its dtype; the bias's, if there is one.

        Not a parameter: writing it changes nothing.
        """
        weight = self.dequantize()
        return weight if self.bias is None else weight.to(self.bias.dtype)

    @classmethod
    def from_conv(cls, module: nn.Conv2d, scheme: Scheme, name: str = "") -> QuantConv2d:
        """Quantize an nn.Conv2d to the nearest codes; shares the bias.

        Raises:
            BadInput: if the weight cannot take the scheme; the message names the layer.
        """
        layer, weight = cls.like(module, scheme), module.weight.detach().flatten(1)
        layer.hold_(*affine.quantize(weight, scheme, name or type(module).__name__), module.bias)
        return layer.train(module.training)

    @classmethod
    def like(cls, module: nn.Conv2d, scheme: Scheme) -> QuantConv2d:
        """A layer of the same sizes, its tensors on the meta device."""
        return cls(
            module.in_channels,
            module.out_channels,
            scheme,
            geometry_of(module),
            bias=module.bias is not None,
            device="meta",
        )

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in, height, width) -> (batch, out, height', width'), in x's dtype."""
        self._check(x)
        return conv2d(
            x,
            self.codes,
            self.scale,
            self.zero,
            self.bias,
            self.scheme,
            self.geometry,
            self.compute_dtype,
        )

    def dequantize(self) -> Tensor:
        """The float32 weight (out, in / groups, height, width)."""
        weight = affine.dequantize(self.unpacked(), self.scale, self.zero, self.scheme.group_size)
        return weight.view(self.rows, -1, *self.geometry.kernel)

    def unscaled(self, x: Tensor) -> Tensor:
        """x convolved with the codes in float32 (times the activations' own scales)."""
        self._check(x)
        codes = self.unpacked()
        if self.scheme.integer_inputs and whole(codes, self.scale, self.geometry):
            sums, _, x_scale = integer_sums(x, codes, self.geometry)
            return (sums * x_scale).permute(0, 3, 1, 2)
        dtype = code_dtype(self.compute_dtype or x.dtype)
        if self.scheme.act_bits is not None:
            x, dtype = fake_quantize(x, self.scheme), torch.float32
        x = x.to(dtype, memory_format=torch.channels_last)
        return self.geometry.convolve(x, codes.to(dtype)).float()

    def _check(self, x: Tensor) -> None:
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise BadInput(
                f"a convolution of {self.in_channels} channels got {tuple(x.shape)}; want "
                f"(batch, {self.in_channels}, height, width)"
            )

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, scheme={self.scheme}, {self.geometry}, "
            f"bias={self.bias is not None}"
        )


def geometry_of(module: nn.Conv2d, groups: int | None = None) -> Geometry:
    """How an nn.Conv2d goes over an image, "same" and padding modes included."""
    pads = module._reversed_padding_repeated_twice
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return Geometry(
        tuple(module.kernel_size),  # type: ignore[arg-type]
        tuple(module.stride),  # type: ignore[arg-type]
        tuple(pads),  # type: ignore[arg-type]
        tuple(module.dilation),  # type: ignore[arg-type]
        groups or module.groups,
        mode,
    )
