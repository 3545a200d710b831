"""Unsigned codes as a stream of bits in 32-bit words, the lowest bit first.

GPTQ, AWQ and compressed-tensors all store codes so: code k of b bits fills the bits k*b ... k*b+b-1
of its row. Two, four or eight bits never cross a word; with three, 32 codes fill three words.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from zotune.errors import BadInput


def words_for(codes: int, bits: int) -> int:
    """Words that hold so many codes.

    >>> words_for(32, 3), words_for(10, 4)
    (3, 2)
    """
    return -(-codes * bits // 32)


def from_words(words: Tensor, bits: int, columns: int) -> Tensor:
    """The first `columns` codes of every row.

    Args:
        words: int32 (..., n).
        bits: 1 to 8.
        columns: how many codes a row holds.

    Returns:
        uint8 (..., columns).

    Raises:
        BadInput: if the rows are too short or long.

    >>> from_words(torch.tensor([[0x321]], dtype=torch.int32), 4, 3).tolist()
    [[1, 2, 3]]
    """
    if words.dtype != torch.int32 or words.shape[-1] != words_for(columns, bits):
        raise BadInput(
            f"{columns} codes of {bits} bits need int32 with {words_for(columns, bits)} words a "
            f"row; got {words.dtype} with {words.shape[-1]}"
        )
    data = words.contiguous().view(torch.uint8)
    if bits == 8:
        return data[..., :columns].clone()
    if 8 % bits:
        return _from_bytes(data, bits)[..., :columns]
    codes = torch.empty(*data.shape, 8 // bits, dtype=torch.uint8, device=data.device)
    for k in range(8 // bits):
        codes[..., k] = (data >> (bits * k)) & ((1 << bits) - 1)
    return codes.flatten(-2)[..., :columns]


def to_words(codes: Tensor, bits: int) -> Tensor:
    """The inverse of `from_words`: int32 (..., words); bits behind the last code are 0.

    >>> to_words(torch.tensor([[1, 2, 3]], dtype=torch.uint8), 4).tolist() == [[0x321]]
    True
    """
    columns = codes.shape[-1]
    padded = F.pad(codes, (0, -columns % 32))
    if 8 % bits:
        data = _to_bytes(padded, bits)
    else:
        shares = padded.reshape(*codes.shape[:-1], padded.shape[-1] * bits // 8, 8 // bits)
        data = shares[..., 0].clone()
        for k in range(1, 8 // bits):
            data |= shares[..., k] << (bits * k)
    words = data.reshape(-1).view(torch.int32)
    words = words.reshape(*codes.shape[:-1], padded.shape[-1] * bits // 32)
    return words[..., : words_for(columns, bits)].contiguous()


def _from_bytes(data: Tensor, bits: int) -> Tensor:
    """Codes that cross bytes: eight of them fill `bits` bytes, which one integer holds."""
    data = F.pad(data, (0, -data.shape[-1] % bits))
    eights = data.reshape(*data.shape[:-1], data.shape[-1] // bits, bits)
    packed = torch.zeros(eights.shape[:-1], dtype=torch.int64, device=data.device)
    for k in range(bits):
        packed |= eights[..., k].long() << (8 * k)
    codes = torch.empty(*packed.shape, 8, dtype=torch.uint8, device=data.device)
    for k in range(8):
        codes[..., k] = (packed >> (bits * k)) & ((1 << bits) - 1)
    return codes.flatten(-2)


def _to_bytes(codes: Tensor, bits: int) -> Tensor:
    """The inverse of `_from_bytes`, of a multiple of eight codes."""
    eights = codes.reshape(*codes.shape[:-1], codes.shape[-1] // 8, 8)
    packed = torch.zeros(eights.shape[:-1], dtype=torch.int64, device=codes.device)
    for k in range(8):
        packed |= eights[..., k].long() << (bits * k)
    data = torch.empty(*packed.shape, bits, dtype=torch.uint8, device=codes.device)
    for k in range(bits):
        data[..., k] = (packed >> (8 * k)) & 255
    return data.flatten(-2)
