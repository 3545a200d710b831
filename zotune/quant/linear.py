"""A linear layer whose weight is codes and scales."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zotune.quant import affine, kernels
from zotune.quant.layer import QuantLayer
from zotune.quant.scheme import Scheme


class Conv1DLike(Protocol):
    """transformers' Conv1D: a linear layer whose weight lies (in, out)."""

    nf: int
    nx: int
    weight: Tensor
    bias: Tensor


class QuantLinear(QuantLayer):
    """y = x @ ((codes - zero) * scale).T + bias, with the weight kept as codes.

    A new layer holds nothing useful: use `from_linear`, `set_codes_` or a checkpoint.

    Tensors as in `QuantLayer`, with rows = out_features and columns = in_features. `order` int32
    (in,), or None: the input column that each column of codes belongs to, so that columns of a
    group lie side by side (GPTQ's act-order).

    Args:
        in_features, out_features: sizes of the layer.
        scheme: how the weight is quantized.
        bias: whether there is a bias.
        name: the layer's name, for messages.
        dtype: the bias's dtype.
        device: where the tensors lie; "meta" when they are assigned later.
        ordered: whether there is an `order`; it starts as 0, 1, 2, ...

    >>> layer = QuantLinear(16, 4, Scheme.parse("int4-g8"), bias=False)
    >>> layer(torch.ones(2, 16)).shape, layer.scale.shape
    (torch.Size([2, 4]), torch.Size([4, 2]))
    """

    order: Tensor | None
    input_clip: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scheme: Scheme,
        *,
        bias: bool = True,
        name: str = "QuantLinear",
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        ordered: bool = False,
    ) -> None:
        super().__init__(in_features, out_features, scheme, bias=bias, dtype=dtype, device=device)
        self.in_features, self.out_features = in_features, out_features
        columns = torch.arange(in_features, dtype=torch.int32, device=device)
        self.register_buffer("order", columns if ordered else None)
        self.register_buffer("input_clip", None)

    @classmethod
    def from_linear(
        cls, module: nn.Linear | Conv1DLike, scheme: Scheme, name: str = ""
    ) -> QuantLinear:
        """Quantize an nn.Linear or a transformers Conv1D to the nearest codes; shares the bias.

        Raises:
            BadInput: if the layer's weight cannot take the scheme; the message names the layer.
        """
        name = name or type(module).__name__
        return cls.from_codes(module, scheme, *affine.quantize(matrix(module), scheme, name))

    @classmethod
    def from_codes(
        cls,
        module: nn.Linear | Conv1DLike,
        scheme: Scheme,
        codes: Tensor,
        scale: Tensor,
        zero: Tensor | None = None,
        order: Tensor | None = None,
    ) -> QuantLinear:
        """The layer that takes the place of `module`, with these values; shares its bias."""
        layer = cls.like(module, scheme)
        layer.hold_(codes, scale, zero, module.bias)
        layer.order = order
        return layer.train(module.training)  # type: ignore[union-attr]

    @classmethod
    def like(cls, module: nn.Linear | Conv1DLike, scheme: Scheme) -> QuantLinear:
        """A layer of the same sizes, its tensors on the meta device."""
        rows, columns = matrix(module).shape
        return cls(columns, rows, scheme, bias=module.bias is not None, device="meta")

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in x's dtype."""
        return kernels.linear(
            self.inputs(x),
            self.codes,
            self.scale,
            self.zero,
            self.bias,
            self.scheme,
            self.compute_dtype,
        )

    def inputs(self, x: Tensor) -> Tensor:
        """x as the kernels take it: in the order of the codes' columns, clipped, and rounded where
        the kernel does not do so itself."""
        if self.order is not None:
            x = x.index_select(-1, self.order)
        if self.input_clip is not None:
            x = kernels.clip_rows(x, self.input_clip, self.scheme.act_symmetric)
        return kernels.rounded_inputs(x, self.scheme)

    def dequantize(self) -> Tensor:
        """The float32 weight (out, in), columns in the order of the inputs."""
        codes, group_size = self.unpacked(), self.scheme.group_size
        weight = affine.dequantize(codes, self.scale, self.zero, group_size)
        if self.order is None:
            return weight
        return torch.empty_like(weight).index_copy_(1, self.order.long(), weight)

    def unscaled(self, x: Tensor) -> Tensor:
        """x @ codes^T in float32 (times the activations' own scales)."""
        codes, x = self.unpacked(), self.inputs(x)
        if self.scheme.integer_inputs and codes.dtype == torch.int8:
            product, x_scale = kernels.int8_product(x.reshape(-1, x.shape[-1]), codes)
            return (product * x_scale).view(*x.shape[:-1], -1)
        dtype = kernels.code_dtype(self.compute_dtype or x.dtype)
        return F.linear(x.to(dtype), codes.to(dtype)).float()

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"scheme={self.scheme}, bias={self.bias is not None}"
        )


def matrix(module: nn.Linear | nn.Conv2d | Conv1DLike) -> Tensor:
    """The weight of an nn.Linear, a convolution or a transformers Conv1D as (out, in).

    >>> matrix(nn.Linear(3, 2)).shape
    torch.Size([2, 3])
    """
    weight = module.weight.detach()
    return weight.t() if is_conv1d(module) else weight.flatten(1)


def is_conv1d(module: object) -> bool:
    """Whether this is transformers' Conv1D, told by its class without importing transformers.

    >>> is_conv1d(nn.Linear(2, 2))
    False
    """
    return any(
        c.__name__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils"
        for c in type(module).__mro__
    )
