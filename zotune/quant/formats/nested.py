"""Scales that are quantized themselves, as bitsandbytes' nested quantization stores them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

STEP: Final = 1.25
_STEPS: Final = 64


@dataclass(frozen=True, eq=False)
class NestedScales:
    """scale = numbers[code] * absmax + offset, one absmax for `size` scales in a row.

    Storing keeps the file's absmax as long as its scales lie within reach, and otherwise multiplies
    it by 1.25 until they do (64 times at most). So tuning writes codes and, rarely, absmax, and
    never the offset.

    numbers: float32 (256,), ascending. absmax: float32 (blocks,), at least 0, as the file has it.

    >>> scales = NestedScales(torch.linspace(-1, 1, 256), torch.tensor([0.1]), 0.5)
    >>> codes, absmax = scales.store(torch.tensor([0.5, 0.4, 0.612]))
    >>> codes.tolist(), absmax.tolist()
    ([127, 26, 242], [0.125])
    """

    numbers: Tensor
    absmax: Tensor
    offset: float
    size: int = 256

    def load(self, codes: Tensor, absmax: Tensor) -> Tensor:
        """float32 (scales,) of uint8 codes (scales,)."""
        each = absmax.repeat_interleave(self.size)[: len(codes)]
        return self.numbers[codes.int()] * each + self.offset

    def store(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Codes uint8 and absmax of the nearest scales that can be stored.

        Rounding may bring a block's scales within reach of a smaller absmax, on whose finer grid
        they would be rounded once more; so this goes on until nothing changes.
        """
        while True:
            absmax = self._absmax(scale)
            codes = self._codes(scale, absmax)
            found = self.load(codes, absmax)
            if torch.equal(self._absmax(found), absmax):
                return codes, absmax
            scale = found

    def _absmax(self, scale: Tensor) -> Tensor:
        blocks, absmax = self._blocks(scale), self.absmax
        low, high = blocks.amin(1), blocks.amax(1)
        for _ in range(_STEPS):
            first, last = (absmax * n + self.offset for n in (self.numbers[0], self.numbers[-1]))
            short = (low < first) | (high > last)
            if not short.any():
                break
            # Blocks of equal scales have an absmax of 0, from which no factor leads away.
            wider = (absmax * STEP).clamp_min(abs(self.offset) / 4096)
            absmax = torch.where(short, wider, absmax)
        return absmax

    def _codes(self, scale: Tensor, absmax: Tensor) -> Tensor:
        blocks = self._blocks(scale)
        grid = absmax.unsqueeze(1) * self.numbers + self.offset
        above = torch.searchsorted(grid, blocks).clamp(1, len(self.numbers) - 1)
        down = blocks - grid.gather(1, above - 1) <= grid.gather(1, above) - blocks
        return (above - down.long()).flatten()[: len(scale)].to(torch.uint8)

    def _blocks(self, scale: Tensor) -> Tensor:
        """(blocks, size); the last one is filled up with its last scale."""
        missing = -len(scale) % self.size
        return torch.cat([scale, scale[-1:].expand(missing)]).reshape(-1, self.size)
