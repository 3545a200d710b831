"""Directions that read a short cycle of numbers over and over, as hardware without Gaussians would.

All numbers of a direction lie in one row, tensor behind tensor; the cycle turns under them. Where
a tensor lies in that row is kept in its memory.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from zotune.core import noise
from zotune.core.block import Block
from zotune.core.noise import Key
from zotune.core.perturbation import Perturbation
from zotune.core.registers import check_width
from zotune.core.space import Space
from zotune.errors import BadInput

Pointer = Literal["restart", "continue"]


@dataclass(frozen=True)
class Reused(Perturbation):
    """u reads a cycle of P = 2^bits - 1 numbers; E[u u^T] is far from I.

    A direction begins at a place drawn from its key (pointer="restart"), or where the one before
    it ended ("continue", with `queries` of them a step). `power_of_two` rounds the factor that
    brings the mean square to 1, as a shift of bits would.
    """

    bits: int = 13
    pointer: Pointer = "restart"
    power_of_two: bool = False
    queries: int = 1

    def __post_init__(self) -> None:
        check_width(self.bits)
        if self.pointer not in ("restart", "continue"):
            raise BadInput(f"pointer={self.pointer!r}; want 'restart' or 'continue'")

    @property
    def period(self) -> int:
        return 2**self.bits - 1

    @abstractmethod
    def ticks(self, count: int) -> int:
        """How far the cycle turns over so many numbers."""

    @abstractmethod
    def streams(self, sizes: list[int]) -> list[int]:
        """How many numbers tensors of these sizes read between two restarts."""

    @abstractmethod
    def read(self, key: Key, block: Block, low: int, high: int, total: int) -> Tensor:
        """u[low:high] of a direction of `total` numbers, where this block lies."""

    def states(self, space: Space) -> dict[str, dict[str, Tensor]]:
        total, first, found = sum(b.numel for b in space.probed), 0, {}
        for block in space.probed:
            found[block.name] = {"place": torch.tensor([first, total])}
            first += block.numel
        return found

    def draw(self, key: Key, block: Block, start: int = 0, stop: int | None = None) -> Tensor:
        place = block.memory.get("place")
        first, total = (0, block.numel) if place is None else place.tolist()
        width = block.numel // max(block.rows, 1)
        low, high = first + start * width, first + (block.rows if stop is None else stop) * width
        u = self.read(key, block, low, high, total)
        return u.view(-1, *block.shape[1:]) if block.shape else u[0]

    def begin(self, key: Key, name: str, total: int) -> int:
        """The place in the cycle at which a direction begins."""
        if self.pointer == "continue":
            direction = key.step * self.queries + key.query + key.lane
            return direction * self.ticks(total) % self.period
        return int((float(noise.draw("uniform", key, name, 0, 1)) + 1) / 2 * self.period)

    def scale(self, mean_square: float) -> float:
        """The factor that brings this mean square to 1, or the power of two next to it."""
        factor = mean_square**-0.5
        return 2.0 ** round(math.log2(factor)) if self.power_of_two else factor

    def check(self, space: Space) -> None:
        if self.pointer == "continue" and self._directions(space) == 1:
            raise BadInput(
                f"bits={self.bits}: each direction ends where it began, so that all would be the "
                "same; use other bits, or pointer='restart'"
            )

    def notes(self, space: Space) -> list[str]:
        streams = self.streams([b.numel for b in space.probed])
        total = sum(streams)
        tied = total - sum(min(n, self.period) for n in streams)
        drawn = f"{len(streams)}, {total // len(streams)} times fewer than Gaussian directions"
        if self.pointer == "continue":
            drawn = f"none; {self._directions(space)} directions, then the first again"
        return [
            f"period {self.period}: at least {tied} of {total} weights share another one's number "
            f"in every step; random numbers drawn per direction: {drawn}"
        ]

    def _directions(self, space: Space) -> int:
        ticks = self.ticks(sum(b.numel for b in space.probed))
        return self.period // math.gcd(ticks, self.period)


def run(cycle: Tensor, begin: int, count: int) -> Tensor:
    """`count` numbers of a cycle from place `begin` on.

    >>> run(torch.tensor([7.0, 8.0, 9.0]), 2, 5).tolist()
    [9.0, 7.0, 8.0, 9.0, 7.0]
    """
    return cycle.roll(-(begin % len(cycle))).repeat(-(-count // len(cycle)))[:count]
