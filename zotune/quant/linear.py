"""A linear layer whose weight is codes and scales."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from zotune.errors import BadInput
from zotune.quant import affine, kernels
from zotune.quant.affine import Scheme
from zotune.quant.codebooks import look_up
from zotune.quant.packing import pack, packed_columns, unpack


class Conv1DLike(Protocol):
    """transformers' Conv1D: a linear layer whose weight lies (in, out)."""

    nf: int
    nx: int
    weight: Tensor
    bias: Tensor


class Storage(Protocol):
    """How a layer lies in a checkpoint, as far as the layer must know."""

    def rounded(self, scale: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Scale and zero, float32, as they come back from the checkpoint."""


class QuantLinear(nn.Module):
    """y = x @ ((codes - zero) * scale).T + bias, with the weight kept as codes.

    A new layer holds nothing useful: use `from_linear`, `set_codes_` or a checkpoint.

    Buffers: `codes` (uint8 packed (out, bytes) below 8 bits, else int8 or float8 (out, in)),
    `scale` float32 (out, groups), (out, 1) or (1, 1), `zero` like scale or None. `order` int32
    (in,), or None: the input column that each column of codes belongs to, so that columns of a
    group lie side by side (GPTQ's act-order). `bias` is a parameter (out,) or None. While a forward
    runs, `codes` may be replaced by a tensor of any dtype but uint8, shaped (out, in): one number
    per weight, fractions included.

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

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    order: Tensor | None
    input_clip: Tensor | None
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
        ordered: bool = False,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.scheme = in_features, out_features, scheme
        # Dtype of the product; None: the input's.
        self.compute_dtype: torch.dtype | None = None
        # What a saved checkpoint holds: dtype of scale and zero, or all that `storage` knows.
        self.scale_dtype: torch.dtype = torch.float32
        self.storage: Storage | None = None
        shape = scheme.scale_shape(out_features, in_features)
        width = packed_columns(scheme.bits, in_features)
        codes = torch.zeros(out_features, width, dtype=scheme.stored, device=device)
        self.register_buffer("codes", codes)
        self.register_buffer("scale", torch.full(shape, affine.EMPTY_SCALE, device=device))
        zero = None if scheme.symmetric else torch.zeros(shape, device=device)
        self.register_buffer("zero", zero)
        columns = torch.arange(in_features, dtype=torch.int32, device=device)
        self.register_buffer("order", columns if ordered else None)
        self.register_buffer("input_clip", None)
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
        rows, columns = codes.shape
        layer = cls(columns, rows, scheme, bias=False, device="meta")
        layer.codes, layer.scale, layer.zero = pack(codes, scheme.bits), scale, zero
        layer.order, layer.bias = order, module.bias  # type: ignore[assignment]
        return layer.train(module.training)  # type: ignore[union-attr]

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
            x = kernels.clip_rows(x, self.input_clip)
        return kernels.rounded_inputs(x, self.scheme)

    def unpacked(self) -> Tensor:
        """Codes (out, in), one number per weight; a copy only where they are packed."""
        if self.codes.dtype != torch.uint8:
            return self.codes
        codes = unpack(self.codes, self.scheme.bits, self.in_features)
        return look_up(codes, self.scheme.kind, self.scheme.bits)

    def dequantize(self) -> Tensor:
        """The float32 weight (out, in), columns in the order of the inputs."""
        codes, group_size = self.unpacked(), self.scheme.group_size
        weight = affine.dequantize(codes, self.scale, self.zero, group_size)
        if self.order is None:
            return weight
        return torch.empty_like(weight).index_copy_(1, self.order.long(), weight)

    def set_codes_(self, codes: Tensor) -> None:
        """Write int8 codes (out, in) into the existing storage.

        Raises:
            BadInput: for another shape or dtype, or codes outside the grid.
        """
        wanted = (self.out_features, self.in_features)
        if tuple(codes.shape) != wanted:
            raise BadInput(f"codes have shape {tuple(codes.shape)}; this layer wants {wanted}")
        self.codes.copy_(pack(codes, self.scheme.bits))

    @property
    def grid(self) -> Tensor:
        """Weight per code, broadcastable to (out, in)."""
        return affine.per_weight(self.scale, self.in_features, self.scheme.group_size)

    @property
    def zero_unit(self) -> Tensor | float:
        """The natural size of a change of `zero`: one code."""
        return 1.0

    def round_to_storage_(self) -> None:
        """Round scale and zero to what a checkpoint will hold, in place."""
        if self.storage is not None:
            scale, zero = self.storage.rounded(self.scale, self.zero)
        else:
            scale = self.scale.to(self.scale_dtype)
            zero = None if self.zero is None else self.zero.to(self.scale_dtype)
        self.scale.copy_(scale)
        if self.zero is not None and zero is not None:
            self.zero.copy_(zero)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"scheme={self.scheme}, bias={self.bias is not None}"
        )

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> QuantLinear:
        """Move with the model but stay float32: `.to(bfloat16)` must not round a scale."""
        kept = {name: getattr(self, name) for name in ("scale", "zero", "input_clip")}
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


def matrix(module: nn.Linear | Conv1DLike) -> Tensor:
    """The weight of an nn.Linear or a transformers Conv1D as (out, in).

    >>> matrix(nn.Linear(3, 2)).shape
    torch.Size([2, 3])
    """
    weight = module.weight.detach()
    return weight.t() if is_conv1d(module) else weight


def is_conv1d(module: object) -> bool:
    """Whether this is transformers' Conv1D, told by its class without importing transformers.

    >>> is_conv1d(nn.Linear(2, 2))
    False
    """
    return any(
        c.__name__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils"
        for c in type(module).__mro__
    )
