"""A linear layer whose weight is integer codes and scales."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from zotune.errors import BadInput
from zotune.quant import affine, kernels
from zotune.quant.affine import Scheme
from zotune.quant.packing import pack, packed_columns, unpack


class Conv1DLike(Protocol):
    """transformers' Conv1D: a linear layer whose weight lies (in, out)."""

    nf: int
    nx: int
    weight: Tensor
    bias: Tensor


class QuantLinear(nn.Module):
    """y = x @ ((codes - zero) * scale).T + bias, with the weight kept as codes.

    A new layer holds nothing useful: use `from_linear`, `set_codes_` or a checkpoint.

    Buffers: `codes` (uint8 packed (out, bytes) below 8 bits, int8 (out, in) at 8), `scale` float32
    (out, groups), (out, 1) or (1, 1), `zero` like scale or None. `bias` is a parameter (out,) or
    None. While a forward runs, `codes` may be replaced by a tensor of any dtype but uint8, shaped
    (out, in): one number per weight, fractions included.

    Args:
        in_features, out_features: sizes of the layer.
        scheme: how the weight is quantized.
        bias: whether there is a bias.
        name: the layer's name, for messages.
        dtype: the bias's dtype.
        device: where the tensors lie; "meta" when they are assigned later.

    Raises:
        BadInput: if the scheme's group size does not divide in_features.

    >>> layer = QuantLinear(16, 4, Scheme.parse("int4-g8"), bias=False)
    >>> layer(torch.ones(2, 16)).shape, layer.scale.shape
    (torch.Size([2, 4]), torch.Size([4, 2]))
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    bias: nn.Parameter | None

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
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.scheme = in_features, out_features, scheme
        # Dtype of the product (None: the input's) and of scale and zero in a saved checkpoint.
        self.compute_dtype: torch.dtype | None = None
        self.scale_dtype: torch.dtype = torch.float32
        shape = scheme.scale_shape(out_features, in_features, name)
        stored = torch.int8 if scheme.bits == 8 else torch.uint8
        width = packed_columns(scheme.bits, in_features)
        self.register_buffer("codes", torch.zeros(out_features, width, dtype=stored, device=device))
        self.register_buffer("scale", torch.full(shape, affine.EMPTY_SCALE, device=device))
        zero = None if scheme.symmetric else torch.zeros(shape, device=device)
        self.register_buffer("zero", zero)
        self.bias = None
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device))

    @classmethod
    def from_linear(
        cls, module: nn.Linear | Conv1DLike, scheme: Scheme, name: str = ""
    ) -> QuantLinear:
        """Quantize an nn.Linear or a transformers Conv1D to the nearest codes; shares the bias.

        Raises:
            BadInput: if the layer's weight cannot take the scheme; the message names the layer.
        """
        name = name or type(module).__name__
        weight = module.weight.detach()
        if is_conv1d(module):
            weight = weight.t()
        codes, scale, zero = affine.quantize(weight, scheme, name)
        rows, columns = codes.shape
        layer = cls(columns, rows, scheme, bias=False, name=name, device="meta")
        layer.codes, layer.scale, layer.zero = pack(codes, scheme.bits), scale, zero
        layer.bias = module.bias  # type: ignore[assignment]
        return layer.train(module.training)  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in x's dtype."""
        return kernels.linear(
            x, self.codes, self.scale, self.zero, self.bias, self.scheme, self.compute_dtype
        )

    def unpacked(self) -> Tensor:
        """Codes (out, in), one number per weight; a copy only where they are packed."""
        if self.codes.dtype == torch.uint8:
            return unpack(self.codes, self.scheme.bits, self.in_features)
        return self.codes

    def dequantize(self) -> Tensor:
        """The float32 weight (out, in)."""
        return affine.dequantize(self.unpacked(), self.scale, self.zero)

    def set_codes_(self, codes: Tensor) -> None:
        """Write int8 codes (out, in) into the existing storage.

        Raises:
            BadInput: for another shape or dtype, or codes outside the grid.
        """
        wanted = (self.out_features, self.in_features)
        if tuple(codes.shape) != wanted:
            raise BadInput(f"codes have shape {tuple(codes.shape)}; this layer wants {wanted}")
        self.codes.copy_(pack(codes, self.scheme.bits))

    def round_to_storage_(self) -> None:
        """Round scale and zero to what a checkpoint will hold (`scale_dtype`), in place."""
        for values in (self.scale, self.zero):
            if values is not None:
                values.copy_(values.to(self.scale_dtype))

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"scheme={self.scheme}, bias={self.bias is not None}"
        )

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> QuantLinear:
        """Move with the model but stay float32: `.to(bfloat16)` must not round a scale."""
        kept = {name: getattr(self, name) for name in ("scale", "zero")}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, values in kept.items():
            moved = getattr(self, name)
            if moved is not None and moved.dtype != values.dtype:
                setattr(self, name, values.to(moved.device))
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Refuse a state of another bit width before copying anything."""
        codes = state_dict.get(prefix + "codes")
        wanted = (self.out_features, packed_columns(self.scheme.bits, self.in_features))
        if codes is not None and tuple(codes.shape) != wanted:
            raise BadInput(
                f"{prefix}codes has shape {tuple(codes.shape)}; scheme {self.scheme} wants {wanted}"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)


def is_conv1d(module: object) -> bool:
    """Whether this is transformers' Conv1D, told by its class without importing transformers.

    >>> is_conv1d(nn.Linear(2, 2))
    False
    """
    return any(
        c.__name__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils"
        for c in type(module).__mro__
    )
