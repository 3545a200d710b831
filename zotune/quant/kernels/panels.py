# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
"""Panels of 64 outputs, laid from codes as they lie: what the kernels' tiles are fed with.

A tile is ROWS rows of activations by one panel; with four vectors a row, 24 of the 32 registers
hold sums. A task is a panel and a chunk of one part's rows; tasks go panel after panel, so that a
thread seldom lays one.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from zotune.quant.kernels.threads import parallel_ranges
from zotune.quant.kernels.vectors import LANES
from zotune.quant.packing import WIDTHS
from zotune.quant.scheme import Scheme

ROWS = 6
VECTORS = 4
PANEL = LANES * VECTORS
CHUNK = 192  # rows of a task at least: laying a panel takes as long as 20 rows do
TASK = 1 << 20  # multiplications that a thread should have at least

_inlined: Any = njit(nogil=True, cache=True, forceinline=True)
_i = np.int32


@_inlined
def lay(panel, words, layout, first, width, steps):  # type: ignore[no-untyped-def]
    """The codes of outputs first, first + 1, ... as the tile reads them, unsigned.

    layout: a row (bits, shift, first word, codes per plane) for each part of a packed code
    (`zotune.quant.packing`); none for int8 codes.
    """
    for k in range(steps):
        to = panel[k * PANEL : (k + 1) * PANEL]
        if layout.shape[0] == 0:
            for c in range(width):
                to[c] = words[first + c, k] ^ _i(-2139062144)  # 0x80808080
            continue
        for part in range(layout.shape[0]):
            bits, shift, begin, size = layout[part]
            plane = 4 * k // size
            at = begin + (4 * k - plane * size) // 4
            mask = _i(0x01010101) * _i((1 << bits) - 1)
            down = _i(plane * bits)
            for c in range(width):
                few = _i(_i(_i(words[first + c, at] >> down) & mask) << _i(shift))
                to[c] = few if part == 0 else to[c] | few


@_inlined
def columns_of(to, values, part, first, width):  # type: ignore[no-untyped-def]
    """to[g, c] = values[part, first + c, g]: the scales of a panel, outputs side by side."""
    source = values[part if values.shape[0] > 1 else 0]
    for c in range(width):
        row = source[first + c if source.shape[0] > 1 else 0]
        for g in range(row.shape[0]):
            to[g, c] = row[g]


@_inlined
def place(task, chunk, parts, tokens):  # type: ignore[no-untyped-def]
    """The first output of a task, its part, its first row and the one behind its last."""
    chunks = (tokens + chunk - 1) // chunk
    part = task // chunks % parts
    low = part * tokens + (task % chunks) * chunk
    return (task // (parts * chunks)) * PANEL, part, low, min(low + chunk, (part + 1) * tokens)


@_inlined
def keep(out, tile, row, high, first, width):  # type: ignore[no-untyped-def]
    """Write of a tile (ROWS, PANEL) what lies inside: rows before `high`, `width` outputs."""
    for r in range(min(ROWS, high - row)):
        out[row + r, first : first + width] = tile[r * PANEL : r * PANEL + width]


def fits(codes: Tensor, scheme: Scheme, columns: int) -> bool:
    """Whether panels can be laid from such codes: whole groups of whole words, and for packed codes
    planes of whole words too."""
    group = scheme.group_size or columns
    if codes.is_floating_point() or columns % group or group % 4:
        return False
    return codes.dtype != torch.uint8 or -(-columns // 8) * min(WIDTHS[scheme.bits]) % 4 == 0


class Laying(NamedTuple):
    """How a panel is laid: `words` int32 (outputs, words of a row), `layout` as `lay` reads it, and
    the `offset` that makes codes unsigned."""

    words: NDArray[np.int32]
    layout: NDArray[np.int64]
    offset: int

    @classmethod
    def of(cls, codes: Tensor, bits: int, columns: int) -> Laying:
        """Of int8 codes (outputs, columns), or packed ones."""
        bits = bits if codes.dtype == torch.uint8 else 8
        words = codes.contiguous().view(torch.int32).numpy()
        return cls(words, _layout(bits, columns), 1 << (bits - 1))


def numbers(*tensors: Tensor | None) -> list[NDArray[np.float32]]:
    """Values of parts (parts, outputs, groups) as compiled kernels take them; zeros for None."""
    nothing = torch.zeros(1, 1, 1)
    return [(nothing if t is None else t.contiguous()).numpy() for t in tensors]


def in_tasks(work: Any, parts: int, tokens: int, outputs: int, columns: int) -> None:
    """work(chunk, start, stop) over all tasks, in ranges."""
    panels = -(-outputs // PANEL)
    chunk = max(CHUNK, -(-tokens * panels // (4 * torch.get_num_threads())))
    chunk = min(tokens, -(-chunk // ROWS) * ROWS)
    tasks = panels * parts * -(-tokens // chunk)
    grain = max(1, TASK // (chunk * PANEL * columns))
    parallel_ranges(lambda start, stop: work(chunk, start, stop), tasks, grain)


@cache
def _layout(bits: int, columns: int) -> NDArray[np.int64]:
    """Where the parts of a packed code lie in a row: see `_lay`."""
    rows, begin, shift, eighth = [], 0, 0, -(-columns // 8)
    for width in WIDTHS.get(bits, ()):
        rows.append((width, shift, begin // 4, eighth * width))
        begin, shift = begin + eighth * width, shift + width
    return np.array(rows, np.int64).reshape(-1, 4)
