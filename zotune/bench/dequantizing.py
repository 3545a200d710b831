"""A quantized layer as most libraries run it: the float weight is made anew in every forward, and
once more in the backward pass of a layer whose input wants a gradient (as bitsandbytes does)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zotune.errors import BadInput
from zotune.quant.linear import QuantLinear
from zotune.quant.model import replace_
from zotune.quant.packing import unpack


class Dequantizing(nn.Module):
    """y = x @ (codes * scale).T + bias for packed codes of symmetric groups, in plain torch.

    >>> from zotune.quant.scheme import Scheme
    >>> layer = QuantLinear.from_linear(nn.Linear(16, 4), Scheme.parse("int4-g8"))
    >>> x = torch.ones(2, 16)
    >>> torch.allclose(Dequantizing(layer)(x), x @ layer.dequantize().T + layer.bias, atol=1e-5)
    True
    """

    codes: Tensor
    scale: Tensor

    def __init__(self, layer: QuantLinear) -> None:
        super().__init__()
        if layer.zero is not None or layer.order is not None or layer.scheme.kind != "int":
            raise BadInput(
                f"the restated peers take symmetric integer codes, not {layer.scheme} with zeros "
                "or reordered columns; give --scheme int4-g64"
            )
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.bits, self.product_dtype = layer.scheme.bits, layer.compute_dtype
        self.register_buffer("codes", layer.codes)
        self.register_buffer("scale", layer.scale)
        self.bias = layer.bias

    @property
    def qweight(self) -> Tensor:
        """The codes, under the name by which peft finds a quantized layer's device."""
        return self.codes

    def weight_in(self, dtype: torch.dtype) -> Tensor:
        """The float weight (out, in)."""
        codes = unpack(self.codes, self.bits, self.in_features).to(dtype)
        rows, groups = self.scale.shape
        grouped = codes.view(self.out_features, groups, -1)
        scale = self.scale.to(dtype).view(rows, groups, 1)
        return (grouped * scale).view(self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in x's dtype."""
        dtype = self.product_dtype or x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        if torch.is_grad_enabled() and x.requires_grad:
            y: Tensor = _Product.apply(x.to(dtype), self)  # type: ignore[no-untyped-call]
            return (y if bias is None else y + bias).to(x.dtype)
        return F.linear(x.to(dtype), self.weight_in(dtype), bias).to(x.dtype)


class _Product(torch.autograd.Function):
    """x @ W.T that keeps no weight for the backward pass, where it is made again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Dequantizing) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.weight_in(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] @ ctx.layer.weight_in(grads[0].dtype), None


def dequantizing_(model: nn.Module) -> list[Dequantizing]:
    """Put a `Dequantizing` in the place of every quantized linear layer; these, in order."""
    found = []
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantLinear):
            found.append(Dequantizing(module))
            replace_(model, name, found[-1])
    return found
