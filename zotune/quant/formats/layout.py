"""How one quantized layer lies in a checkpoint: a pair of functions between two sets of tensors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final, NamedTuple

import torch
from torch import Tensor, nn

from zotune.errors import FormatError
from zotune.quant.formats.shards import Entry
from zotune.quant.linear import QuantLinear
from zotune.quant.model import replace_
from zotune.quant.packing import pack, unpack
from zotune.quant.scheme import Scheme

FLOATS: Final = (torch.float16, torch.bfloat16, torch.float32)


class Values(NamedTuple):
    """What a `QuantLinear` holds.

    codes: int8 (out, in) or float8, one number per weight, columns sorted by group; for 4-bit
    floats the bit pattern minus 8. scale, zero: float32, shaped as `Scheme.scale_shape` says; zero
    centred like the codes, None where every zero is 0. order: int32 (in,), the input column of each
    column of codes; None where they are the same.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None = None
    order: Tensor | None = None


class Layout(ABC):
    """A layer's place in a checkpoint. Frozen records; one object per layer.

    For values that came from `decode`, `decode(encode(values))` gives them back; for others it
    changes scale and zero, and as `rounded` says.
    """

    scheme: Scheme  # `symmetric` is told by what `decode` finds

    @abstractmethod
    def decode(self, stored: Mapping[str, Tensor]) -> Values:
        """The layer's values from its tensors, named without the layer's own name ("qweight").

        Raises:
            FormatError: if the tensors contradict each other.
        """

    @abstractmethod
    def encode(self, values: Values) -> dict[str, Tensor]:
        """The tensors that tuning can change, in the dtype and shape in which they are stored."""

    def whole(self, values: Values) -> dict[str, Tensor]:
        """All of the layer's tensors, those included that tuning cannot change."""
        return self.encode(values)

    @abstractmethod
    def rounded(self, scale: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Scale and zero, float32, as they come back from the checkpoint."""

    def layer(self, name: str, values: Values, bias: bool) -> QuantLinear:
        """A layer that holds the values; its bias is on the meta device."""
        codes, scale, zero, order = values
        scheme = replace(self.scheme, symmetric=zero is None)
        rows, columns = codes.shape
        layer = QuantLinear(columns, rows, scheme, bias=bias, name=name, device="meta")
        layer.codes = codes.contiguous() if scheme.bits == 8 else pack(codes, scheme.bits)
        layer.scale = scale.contiguous()
        layer.zero = None if zero is None else zero.contiguous()
        layer.order = order
        return layer


def place_(
    model: nn.Module, name: str, layout: Layout, stored: Mapping[str, Tensor], bias: bool
) -> QuantLinear:
    """Put a layer with the decoded tensors where `name` is; a bias is left to be assigned.

    Raises:
        FormatError: as `Layout.decode`.
    """
    layer = layout.layer(name, layout.decode(stored), bias)
    layer.storage = layout
    replace_(model, name, layer)
    return layer


def values_of(layer: QuantLinear) -> Values:
    """A layer's values on the CPU, ready for `Layout.encode`."""
    codes = layer.codes.cpu()
    if codes.dtype == torch.uint8:
        codes = unpack(codes, layer.scheme.bits, layer.in_features)
    rest = (None if t is None else t.cpu() for t in (layer.zero, layer.order))
    return Values(codes, layer.scale.cpu(), *rest)


def whole_zeros(zero: Tensor, bits: int) -> Tensor:
    """Zero points as integer formats store them: whole, within the codes' range; float32.

    >>> whole_zeros(torch.tensor([0.4, 9.0]), 4).tolist()
    [0.0, 7.0]
    """
    half = 1 << (bits - 1)
    return zero.round().clamp(-half, half - 1) + 0.0  # integers have no -0


def column_order(g_idx: Tensor | None, group_size: int | None) -> Tensor | None:
    """Columns sorted by their groups, int32; None where they are so already, or have no groups.

    Raises:
        FormatError: if a group but the last has not exactly `group_size` columns.

    >>> column_order(torch.tensor([1, 0, 0, 1]), 2).tolist()
    [1, 2, 0, 3]
    """
    if g_idx is None or group_size is None:
        return None
    plain = torch.arange(len(g_idx)) // group_size
    if torch.equal(g_idx.long(), plain):
        return None
    order = torch.argsort(g_idx, stable=True)
    if not torch.equal(g_idx.long()[order], plain):
        raise FormatError(
            f"g_idx gives groups other than {group_size} columns (the last one may be shorter); "
            "such a layer is not read"
        )
    return order.to(torch.int32)


def group_index(order: Tensor | None, columns: int, group_size: int | None) -> Tensor:
    """g_idx, each input's group, int32 (in,): the inverse of `column_order`.

    >>> group_index(torch.tensor([1, 2, 0, 3]), 4, 2).tolist()
    [1, 0, 0, 1]
    """
    groups = (torch.arange(columns) // (group_size or columns)).to(torch.int32)
    return groups if order is None else groups[torch.argsort(order)]


def check_tensors(
    name: str,
    stored: Mapping[str, Entry],
    wanted: Mapping[str, tuple[tuple[int, ...], Sequence[torch.dtype]]],
    optional: Sequence[str] = (),
) -> None:
    """Compare the headers of a layer's tensors with (shape, allowed dtypes), by last name.

    Raises:
        FormatError: naming the tensor that is missing, unknown, or of another shape or dtype.
    """
    for part, (shape, dtypes) in wanted.items():
        entry = stored.get(part)
        if entry is None:
            if part not in optional:
                raise FormatError(f"tensor '{name}.{part}' is missing; fetch the checkpoint again")
        elif entry.shape != shape or entry.dtype not in dtypes:
            raise FormatError(
                f"tensor '{name}.{part}' is {entry.dtype} {entry.shape}; wanted "
                f"{' or '.join(map(str, dtypes))} {shape}"
            )
    unknown = set(stored) - set(wanted) - {"bias"}
    if unknown:
        raise FormatError(f"layer {name!r} has tensors that are not understood: {sorted(unknown)}")
