"""Planar packing of small codes into bytes.

A code of b bits is stored as q + 2^(b-1) >= 0, cut into parts of 4, 2 or 1 bits (3 = 2 + 1,
5 = 4 + 1, 6 = 4 + 2, 7 = 4 + 2 + 1). A part of width w fills 8 // w planes: plane k holds the
columns k*n/planes ... (k+1)*n/planes in a row. Unpacking a plane is therefore one shift and one
mask over contiguous bytes. Columns are padded to a multiple of 8 with code 0, so a row of n columns
takes exactly ceil(n / 8) * b bytes.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from zotune.errors import BadInput

WIDTHS: Final[dict[int, tuple[int, ...]]] = {
    7: (4, 2, 1), 6: (4, 2), 5: (4, 1), 4: (4,), 3: (2, 1), 2: (2,),
}  # fmt: skip


def packed_columns(bits: int, columns: int) -> int:
    """Bytes per row that `pack` produces.

    >>> packed_columns(3, 10), packed_columns(4, 64), packed_columns(8, 10)
    (6, 32, 10)
    """
    return columns if bits == 8 else -(-columns // 8) * bits


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack signed codes along the last axis.

    Args:
        codes: int8 (..., columns) within [-2^(b-1), 2^(b-1) - 1].
        bits: 2 to 8.

    Returns:
        uint8 (..., ceil(columns / 8) * bits); for 8 bits the codes themselves, still int8.

    Raises:
        BadInput: for codes that are not int8 or do not fit.

    >>> pack(torch.tensor([[-8, 7, 0, 0, 1, 0, 0, 0]], dtype=torch.int8), 4).tolist()
    [[144, 143, 136, 136]]
    """
    _check(codes, bits)
    if bits == 8:
        return codes
    offset = 1 << (bits - 1)
    stored = codes.to(torch.int16) + offset
    padding = -codes.shape[-1] % 8
    if padding:
        stored = torch.nn.functional.pad(stored, (0, padding), value=offset)
    stored = stored.to(torch.uint8)
    parts, shift = [], 0
    for width in WIDTHS[bits]:
        part = (stored >> shift) & ((1 << width) - 1)
        parts.append(_pack_part(part, width))
        shift += width
    return torch.cat(parts, dim=-1)


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of `pack`: int8 codes (..., columns).

    Raises:
        BadInput: if the number of bytes does not fit `columns`.

    >>> unpack(torch.tensor([[144, 143, 136, 136]], dtype=torch.uint8), 4, 8).tolist()
    [[-8, 7, 0, 0, 1, 0, 0, 0]]
    """
    if bits == 8:
        return packed.to(torch.int8)
    wanted = packed_columns(bits, columns)
    if packed.dtype != torch.uint8 or packed.shape[-1] != wanted:
        raise BadInput(
            f"packed codes are {packed.dtype} with {packed.shape[-1]} bytes a row; "
            f"{columns} columns of {bits} bits need torch.uint8 with {wanted}"
        )
    padded = wanted // bits * 8
    stored: Tensor | None = None
    start = shift = 0
    for width in WIDTHS[bits]:
        size = padded * width // 8
        part = _unpack_part(packed[..., start : start + size], width) << shift
        stored = part if stored is None else stored | part
        start, shift = start + size, shift + width
    assert stored is not None
    # A subtraction that wraps around in uint8 is the signed one seen as int8.
    return (stored - (1 << (bits - 1)))[..., :columns].contiguous().view(torch.int8)


def _pack_part(part: Tensor, width: int) -> Tensor:
    planes = part.reshape(*part.shape[:-1], 8 // width, part.shape[-1] * width // 8)
    packed = planes[..., 0, :]
    for k in range(1, 8 // width):
        packed = packed | planes[..., k, :] << (k * width)
    return packed


def _unpack_part(packed: Tensor, width: int) -> Tensor:
    mask = (1 << width) - 1
    return torch.cat([(packed >> (k * width)) & mask for k in range(8 // width)], dim=-1)


def _check(codes: Tensor, bits: int) -> None:
    if bits != 8 and bits not in WIDTHS:
        raise BadInput(f"bits={bits} cannot be packed; use one of {(*WIDTHS, 8)}")
    if codes.dtype != torch.int8:
        raise BadInput(f"codes are {codes.dtype}; pack wants torch.int8")
    limit = 1 << (bits - 1)
    if bits != 8 and codes.numel() and (codes.min() < -limit or codes.max() >= limit):
        raise BadInput(
            f"codes span [{int(codes.min())}, {int(codes.max())}]; {bits} bits hold "
            f"[{-limit}, {limit - 1}]; clamp them first"
        )
