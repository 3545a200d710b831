"""A layer whose weight is a matrix of codes and scales, whatever the layer does with it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from zotune.errors import BadInput
from zotune.quant import affine
from zotune.quant.codebooks import look_up
from zotune.quant.packing import pack, packed_columns, unpack
from zotune.quant.scheme import Scheme


class Storage(Protocol):
    """How a layer lies in a checkpoint, as far as the layer must know."""

    def rounded(self, scale: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Scale and zero, float32, as they come back from the checkpoint."""


class QuantLayer(nn.Module, ABC):
    """A weight (codes - zero) * scale as a matrix: one row per output, `columns` numbers each.

    Buffers: `codes` (uint8 packed (rows, bytes) below 8 bits, else int8 or float8 (rows, columns)),
    `scale` float32 (rows, groups), (rows, 1) or (1, 1), `zero` like scale or None. `bias` is a
    parameter (rows,) or None. While a forward runs, `codes` may be replaced by a tensor of any
    dtype but uint8, shaped (rows, columns): one number per weight, fractions included.

    Args:
        columns, rows: sizes of the matrix.
        scheme: how the weight is quantized.
        bias: whether there is a bias.
        dtype: the bias's dtype.
        device: where the tensors lie; "meta" when they are assigned later.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    bias: nn.Parameter | None

    def __init__(
        self,
        columns: int,
        rows: int,
        scheme: Scheme,
        *,
        bias: bool = True,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> None:
        super().__init__()
        self.columns, self.rows, self.scheme = columns, rows, scheme
        # Dtype of the product; None: the input's.
        self.compute_dtype: torch.dtype | None = None
        # What a saved checkpoint holds: dtype of scale and zero, or all that `storage` knows.
        self.scale_dtype: torch.dtype = torch.float32
        self.storage: Storage | None = None
        shape = scheme.scale_shape(rows, columns)
        width = packed_columns(scheme.bits, columns)
        codes = torch.zeros(rows, width, dtype=scheme.stored, device=device)
        self.register_buffer("codes", codes)
        self.register_buffer("scale", torch.full(shape, affine.EMPTY_SCALE, device=device))
        zero = None if scheme.symmetric else torch.zeros(shape, device=device)
        self.register_buffer("zero", zero)
        self.bias = None
        if bias:
            self.bias = nn.Parameter(torch.zeros(rows, dtype=dtype, device=device))

    def hold_(self, codes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None) -> None:
        """Take codes (rows, columns), and the others themselves, in place of the layer's own."""
        self.codes, self.scale, self.zero = pack(codes, self.scheme.bits), scale, zero
        self.bias = bias  # type: ignore[assignment]

    def unpacked(self) -> Tensor:
        """Codes (rows, columns), one number per weight; a copy only where they are packed."""
        if self.codes.dtype != torch.uint8:
            return self.codes
        codes = unpack(self.codes, self.scheme.bits, self.columns)
        return look_up(codes, self.scheme.kind, self.scheme.bits)

    @abstractmethod
    def dequantize(self) -> Tensor:
        """The float32 weight in the shape of the layer that was quantized."""

    @abstractmethod
    def unscaled(self, x: Tensor) -> Tensor:
        """What the layer makes of x by its codes, float32, before scale, zero and bias."""

    def set_codes_(self, codes: Tensor) -> None:
        """Write int8 codes (rows, columns) into the existing storage.

        Raises:
            BadInput: for another shape or dtype, or codes outside the grid.
        """
        wanted = (self.rows, self.columns)
        if tuple(codes.shape) != wanted:
            raise BadInput(f"codes have shape {tuple(codes.shape)}; this layer wants {wanted}")
        self.codes.copy_(pack(codes, self.scheme.bits))

    @property
    def grid(self) -> Tensor:
        """Weight per code, broadcastable to (rows, columns)."""
        return affine.per_weight(self.scale, self.columns, self.scheme.group_size)

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

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> QuantLayer:
        """Move with the model but stay float32: `.to(bfloat16)` must not round a scale."""
        kept = {name: getattr(self, name, None) for name in ("scale", "zero", "input_clip")}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, values in kept.items():
            if values is None:
                continue
            moved = getattr(self, name)
            if moved.dtype != values.dtype:
                setattr(self, name, values.to(moved.device))
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Refuse a state of another bit width before copying anything."""
        codes = state_dict.get(prefix + "codes")
        wanted = (self.rows, packed_columns(self.scheme.bits, self.columns))
        if codes is not None and tuple(codes.shape) != wanted:
            raise BadInput(
                f"{prefix}codes has shape {tuple(codes.shape)}; scheme {self.scheme} wants {wanted}"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)
