"""Layers whose weight lies in ggml's blocks.

Their weight is W = (scale * subs) * q + zero, or - zero * zero_subs in K-quants. `scale` and `zero`
float32 (out, blocks) are the file's d and its offset; `subs` and `zero_subs` int8 (out, groups), or
None for ones, are the integers beside them. q = codes + 2^(b-1) with offsets, codes without.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zotune.quant import kernels
from zotune.quant.formats.gguf_blocks import BlockLayout
from zotune.quant.linear import QuantLinear
from zotune.quant.packing import pack, unpack
from zotune.quant.scheme import Scheme


class Blocks(NamedTuple):
    """A matrix as above; codes packed below 8 bits, or one number per weight."""

    codes: Tensor
    scale: Tensor
    subs: Tensor | None
    zero: Tensor | None
    zero_subs: Tensor | None

    def scales(self) -> Tensor:
        """Weight per code, (out, groups)."""
        return _times(self.scale, self.subs)

    def offsets(self) -> Tensor | None:
        """Weight of q = 0, (out, groups); None for none."""
        if self.zero is None or self.zero_subs is None:
            return self.zero
        return -_times(self.zero, self.zero_subs)

    def rows(self, here: Tensor) -> Blocks:
        """Some rows."""
        return Blocks(*(None if t is None else t[here] for t in self))  # type: ignore[arg-type]


def read_blocks(layout: BlockLayout, raw: Tensor) -> Blocks:
    """A matrix out of the file's bytes."""
    codes, scale, zero, _ = layout.decode({"weight": raw})
    bits, subs = layout.type.bits, layout.subs(raw) or (None, None)
    return Blocks(codes if bits == 8 else pack(codes, bits), scale, subs[0], zero, subs[1])


def dequantize(blocks: Blocks, layout: BlockLayout) -> Tensor:
    """The float32 weight (out, in), in the order of ggml's own operations."""
    codes, bits, group = blocks.codes, layout.type.bits, layout.type.group
    if codes.dtype == torch.uint8:
        columns = blocks.scale.shape[1] * layout.type.weights
        codes = unpack(codes, bits, columns)
    q = codes.float().reshape(len(codes), -1, group)
    offsets = blocks.offsets()
    if offsets is None:
        return (blocks.scales().unsqueeze(-1) * q).flatten(1)
    q += 1 << (bits - 1)
    return (blocks.scales().unsqueeze(-1) * q + offsets.unsqueeze(-1)).flatten(1)


def product(
    x: Tensor,
    blocks: Blocks,
    layout: BlockLayout,
    bias: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """x @ W.T + bias, (..., in) -> (..., out) in x's dtype.

    The offsets' share is their product with the sums of x over groups, so that the kernels see
    codes and scales alone.
    """
    codes, bits, group = blocks.codes, layout.type.bits, layout.type.group
    if codes.dtype == torch.uint8 and bits != 4:
        codes = unpack(codes, bits, x.shape[-1])  # the kernels' packed codes have 2, 3 or 4
    scale, offsets = blocks.scales(), blocks.offsets()
    scheme = Scheme(4 if codes.dtype == torch.uint8 else 8, True, group)
    y = kernels.linear(x, codes, scale, None, bias, scheme, compute_dtype)
    if offsets is None:
        return y
    sums = x.float().reshape(*x.shape[:-1], -1, group).sum(-1)
    return y + F.linear(sums, offsets + scale * (1 << (bits - 1))).to(x.dtype)


class BlockLinear(QuantLinear):
    """y = x @ W.T + bias; what is tuned is `scale`, `zero` and `codes`.

    >>> BlockLinear(256, 2, BlockLayout.of("Q4_K")).scale.shape
    torch.Size([2, 1])
    """

    subs: Tensor | None
    zero_subs: Tensor | None

    def __init__(self, columns: int, rows: int, layout: BlockLayout, *, bias: bool = False) -> None:
        super().__init__(columns, rows, layout.scheme, bias=bias, device="meta")
        self.layout = self.storage = layout
        self.register_buffer("subs", None)
        self.register_buffer("zero_subs", None)

    @property
    def blocks(self) -> Blocks:
        """The weight."""
        return Blocks(self.codes, self.scale, self.subs, self.zero, self.zero_subs)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in x's dtype."""
        return product(x, self.blocks, self.layout, self.bias, self.compute_dtype)

    def dequantize(self) -> Tensor:
        """The float32 weight (out, in), as ggml computes it."""
        return dequantize(self.blocks, self.layout)

    @property
    def grid(self) -> Tensor:
        """Weight per code, (out, in)."""
        return self.blocks.scales().repeat_interleave(self.layout.type.group, dim=1)

    @property
    def zero_unit(self) -> Tensor | float:
        """d where the offset is a weight; dmin itself where it is a scale of offsets."""
        assert self.zero is not None
        return (self.scale if self.zero_subs is None else self.zero).detach().abs()


class BlockEmbedding(nn.Module):
    """A table of words in blocks; rows are dequantized when they are looked up. Not tuned."""

    def __init__(self, blocks: Blocks, layout: BlockLayout) -> None:
        super().__init__()
        self.layout = layout
        for name, tensor in blocks._asdict().items():
            self.register_buffer(name, tensor)

    @property
    def blocks(self) -> Blocks:
        """The table."""
        return Blocks(*(getattr(self, name) for name in Blocks._fields))

    def forward(self, ids: Tensor) -> Tensor:
        """ids (...) -> float32 (..., in)."""
        found = dequantize(self.blocks.rows(ids.flatten()), self.layout)
        return found.reshape(*ids.shape, -1)

    def _apply(self, fn: object, recurse: bool = True) -> BlockEmbedding:
        """Move with the model but stay float32, as `QuantLinear` does."""
        kept = {name: getattr(self, name) for name in ("scale", "zero")}
        super()._apply(fn, recurse)  # type: ignore[arg-type, no-untyped-call]
        for name, values in kept.items():
            moved = getattr(self, name)
            if moved is not None and moved.dtype != values.dtype:
                setattr(self, name, values.to(moved.device))
        return self


class TiedHead(nn.Module):
    """The output layer of a model whose file has none: the embedding's table. Not tuned."""

    def __init__(self, table: BlockEmbedding) -> None:
        super().__init__()
        self.table = table

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., words), in x's dtype."""
        return product(x, self.table.blocks, self.table.layout)


def _times(values: Tensor, subs: Tensor | None) -> Tensor:
    """Values of blocks times the integers of their groups."""
    if subs is None:
        return values
    return (values.unsqueeze(-1) * subs.reshape(*values.shape, -1)).flatten(1)
