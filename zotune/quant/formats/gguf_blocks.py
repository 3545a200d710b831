"""ggml's block types: how the bytes of a block hold codes, scales and offsets.

A row is cut into blocks of 32 or 256 weights; a weight of code q >= 0 is

    Q4_0, Q5_0, Q8_0        d (q - half)
    Q4_1, Q5_1              d q + m
    Q4_K, Q5_K              (d s) q - (dmin t)        s, t: 6 bits, one of each per 32 weights
    Q6_K                    (d s) (q - half)          s: int8, one per 16 weights

with half = 2^(b-1), and d, m, dmin float16, one per block. d is a layer's `scale`, m and dmin are
its `zero` (offsets in weights, not in codes); s and t stay as they are. Layouts and formulas:
ggml-quants.c of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
from torch import Tensor

from zotune.quant.formats.layout import Layout, Values
from zotune.quant.scheme import Scheme


class Plane(NamedTuple):
    """Bytes start to stop of a block hold `width` bits of every code.

    Of `run` bytes in a row the lowest bits are those of as many codes in a row, the next bits
    those of the codes behind them.
    """

    start: int
    stop: int
    width: int
    run: int


@dataclass(frozen=True)
class BlockType:
    """One of ggml's types.

    d, offset: where the block's float16 lie; offset None for none. subs: where the integers beside
    them lie, one for each `group` weights; None for none.
    """

    bits: int
    weights: int
    group: int
    planes: tuple[Plane, ...]
    d: int = 0
    offset: int | None = None
    subs: tuple[int, int] | None = None


BLOCKS: Final[dict[str, BlockType]] = {
    "Q4_0": BlockType(4, 32, 32, (Plane(2, 18, 4, 16),)),
    "Q4_1": BlockType(4, 32, 32, (Plane(4, 20, 4, 16),), offset=2),
    "Q5_0": BlockType(5, 32, 32, (Plane(6, 22, 4, 16), Plane(2, 6, 1, 1))),
    "Q5_1": BlockType(5, 32, 32, (Plane(8, 24, 4, 16), Plane(4, 8, 1, 1)), offset=2),
    "Q8_0": BlockType(8, 32, 32, (Plane(2, 34, 8, 1),)),
    "Q4_K": BlockType(4, 256, 32, (Plane(16, 144, 4, 32),), offset=2, subs=(4, 16)),
    "Q5_K": BlockType(
        5, 256, 32, (Plane(48, 176, 4, 32), Plane(16, 48, 1, 32)), offset=2, subs=(4, 16)
    ),
    "Q6_K": BlockType(
        6, 256, 16, (Plane(0, 128, 4, 64), Plane(128, 192, 2, 32)), d=208, subs=(192, 208)
    ),
}


class BlockScheme(Scheme):
    """Scheme of a layer of ggml's blocks, which also come with 5 and 6 bits."""

    def __post_init__(self) -> None:
        """The types above are all there are."""


@dataclass(frozen=True)
class BlockLayout(Layout):
    """A matrix of one type; order: see `ordered`."""

    scheme: Scheme
    type: BlockType
    order: tuple[int, int] | None = None

    @classmethod
    def of(cls, name: str, order: tuple[int, int] | None = None) -> BlockLayout:
        """The layout of a type by ggml's name."""
        kind = BLOCKS[name]
        scheme = BlockScheme(kind.bits, kind.offset is None, kind.weights)
        return cls(scheme, kind, order)

    def decode(self, stored: Mapping[str, Tensor]) -> Values:
        """Centred codes (rows, columns), d and offset float32 (rows, blocks)."""
        blocks = self._blocks(stored["weight"])
        kind, rows = self.type, blocks.shape[0]
        scale = _halves(blocks, kind.d)
        zero = None if kind.offset is None else _halves(blocks, kind.offset)
        codes = torch.zeros(*blocks.shape[:2], kind.weights, dtype=torch.uint8)
        shift = 0
        for start, stop, width, run in kind.planes:
            codes |= _fields(blocks[..., start:stop], width, run) << shift
            shift += width
        if kind.bits < 8:  # bytes are signed as they are
            codes -= 1 << (kind.bits - 1)
        return Values(codes.reshape(rows, -1).view(torch.int8), scale, zero)

    def subs(self, raw: Tensor) -> tuple[Tensor, Tensor | None] | None:
        """Integers beside d and beside the offset: int8 (rows, groups)."""
        if self.type.subs is None:
            return None
        blocks = self._blocks(raw)
        packed = blocks[..., slice(*self.type.subs)]
        if self.type.offset is None:
            return packed.flatten(1).view(torch.int8), None
        scale, offset = _six_bits(packed)
        return scale.flatten(1).view(torch.int8), offset.flatten(1).view(torch.int8)

    def merged(self, raw: Tensor, values: Values) -> Tensor:
        """The file's bytes with codes, d and offset in their places."""
        blocks, kind = self._blocks(raw).clone(), self.type
        codes = values.codes.view(torch.uint8).reshape(*blocks.shape[:2], kind.weights)
        if kind.bits < 8:
            codes = codes + (1 << (kind.bits - 1))
        shift = 0
        for start, stop, width, run in kind.planes:
            part = (codes >> shift) & ((1 << width) - 1)
            blocks[..., start:stop] = _packed(part, width, run)
            shift += width
        _put_halves(blocks, kind.d, values.scale)
        if kind.offset is not None and values.zero is not None:
            _put_halves(blocks, kind.offset, values.zero)
        return unordered(blocks.flatten(1), self.order)

    def encode(self, values: Values) -> dict[str, Tensor]:
        """Codes, d and offset; the sub-scales are the file's."""
        halves = {"scale": values.scale, "zero": values.zero}
        return {"codes": values.codes} | {
            k: v.to(torch.float16) for k, v in halves.items() if v is not None
        }

    def rounded(self, scale: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """float16."""
        return scale.half().float(), None if zero is None else zero.half().float()

    def _blocks(self, raw: Tensor) -> Tensor:
        """(rows, blocks, bytes) in the model's order of rows."""
        size = max(plane.stop for plane in self.type.planes)
        size = max(size, self.type.d + 2, self.type.subs[1] if self.type.subs else 0)
        return ordered(raw, self.order).reshape(len(raw), -1, size)


def ordered(raw: Tensor, order: tuple[int, int] | None) -> Tensor:
    """Rows of the file in the model's order; `order` is heads and width of a head, None: as is.

    llama.cpp turns neighbours (2k, 2k + 1) of a head where transformers turns halves (k, k + n/2);
    converting a Llama therefore interleaves the halves of every head of q and k.

    >>> ordered(torch.tensor([0, 2, 1, 3]), (1, 4)).tolist()
    [0, 1, 2, 3]
    """
    if order is None:
        return raw
    heads, width = order
    return raw.reshape(heads, width // 2, 2, -1).transpose(1, 2).reshape(raw.shape)


def unordered(rows: Tensor, order: tuple[int, int] | None) -> Tensor:
    """The inverse of `ordered`.

    >>> unordered(torch.tensor([0, 1, 2, 3]), (1, 4)).tolist()
    [0, 2, 1, 3]
    """
    if order is None:
        return rows
    heads, width = order
    return rows.reshape(heads, 2, width // 2, -1).transpose(1, 2).reshape(rows.shape)


def _halves(blocks: Tensor, start: int) -> Tensor:
    return blocks[..., start : start + 2].contiguous().view(torch.float16)[..., 0].float()


def _put_halves(blocks: Tensor, start: int, values: Tensor) -> None:
    blocks[..., start : start + 2] = values.half().unsqueeze(-1).contiguous().view(torch.uint8)


def _fields(data: Tensor, width: int, run: int) -> Tensor:
    """Codes of `width` bits: (rows, blocks, bytes * 8 / width)."""
    runs = data.reshape(*data.shape[:2], -1, 1, run)
    shifts = torch.arange(0, 8, width, dtype=torch.uint8).unsqueeze(-1)
    return ((runs >> shifts) & ((1 << width) - 1)).flatten(2)


def _packed(codes: Tensor, width: int, run: int) -> Tensor:
    """The inverse of `_fields`."""
    parts = codes.reshape(*codes.shape[:2], -1, 8 // width, run)
    data = parts[..., 0, :].clone()
    for k in range(1, 8 // width):
        data |= parts[..., k, :] << (k * width)
    return data.flatten(2)


def _six_bits(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Eight scales and eight offsets of 6 bits out of 12 bytes.

    Bytes 0-3 hold scales 0-3 and bytes 4-7 offsets 0-3; their upper two bits are those of numbers
    4-7, whose lower four bits are the halves of bytes 8-11.
    """
    low, mid, last = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scale = torch.cat([low & 63, (last & 15) | (low >> 6 << 4)], -1)
    offset = torch.cat([mid & 63, (last >> 4) | (mid >> 6 << 4)], -1)
    return scale, offset
