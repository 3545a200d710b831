"""Published layouts restated with Python integers and numpy's float64, apart from zotune's code."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from zotune.quant.formats.shards import Entry, entries

Whole = NDArray[np.int64]
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def words(codes: Sequence[int], bits: int) -> list[int]:
    """One row of codes as a stream of bits, cut into signed 32-bit words."""
    count = math.ceil(len(codes) * bits / 32)
    stream = sum(int(code) << (bits * k) for k, code in enumerate(codes))
    data = stream.to_bytes(count * 4, "little")
    return [int.from_bytes(data[4 * k : 4 * k + 4], "little", signed=True) for k in range(count)]


def rows_of_words(matrix: Whole, bits: int) -> Tensor:
    return torch.tensor([words(row, bits) for row in matrix.tolist()], dtype=torch.int32)


def gptq(
    codes: Whole, zeros: Whole, scales: Tensor, bits: int, version: int, g_idx: Whole | None
) -> dict[str, Tensor]:
    """codes (in, out), zeros (groups, out) >= 1 for version 1, scales (groups, out)."""
    stored = {
        "qweight": rows_of_words(codes.T, bits).T.contiguous(),
        "qzeros": rows_of_words(zeros - (1 if version == 1 else 0), bits),
        "scales": scales,
    }
    if g_idx is not None:
        stored["g_idx"] = torch.from_numpy(g_idx.astype(np.int32))
    return stored


def awq(codes: Whole, zeros: Whole, scales: Tensor) -> dict[str, Tensor]:
    """codes (in, out), zeros (groups, out), scales (groups, out); out a multiple of 8."""

    def pack(matrix: Whole) -> Tensor:
        eights = matrix.reshape(len(matrix), -1, 8)[:, :, AWQ_ORDER].reshape(len(matrix), -1)
        return rows_of_words(eights, 4)

    return {"qweight": pack(codes), "qzeros": pack(zeros), "scales": scales}


def weight(codes: Whole, zeros: Whole, scales: Tensor, g_idx: Whole) -> NDArray[np.float64]:
    """(out, in): (code - zero) * scale of each input's group."""
    return ((codes - zeros[g_idx]) * scales.double().numpy()[g_idx]).T


def headers(folder: Path, tensors: dict[str, Tensor]) -> dict[str, Entry]:
    """The tensors in a file, as a format sees them before it reads any."""
    save_file(tensors, folder / "model.safetensors")
    return entries(folder)
