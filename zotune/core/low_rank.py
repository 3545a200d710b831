"""Low-rank directions: a matrix moves along a few outer products, which are seldom made.

A layer under such a direction is y = x W^T + step (x R^T) L^T, with the weight as it stands
(`forwards.py`), and g of many directions is one product of their factors side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zotune.core import noise
from zotune.core.block import Block
from zotune.core.noise import Key
from zotune.core.perturbation import Gaussian, Perturbation
from zotune.errors import BadInput


@dataclass(frozen=True)
class LowRank(Perturbation):
    """u = U V^T / sqrt(rank) for matrices, U and V Gaussian (EGGROLL 2025, arXiv 2511.16652).

    Blocks that are not matrices, or not larger than the factors, are drawn Gaussian.
    """

    rank: int = 1

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise BadInput(f"rank={self.rank}; want rank >= 1")

    def draw(self, key: Key, block: Block, start: int = 0, stop: int | None = None) -> Tensor:
        found = self.factors([key], block, start, stop)
        if found is None:
            return Gaussian().draw(key, block, start, stop)
        left, right = found
        return left[0] @ right[0]

    def factors(
        self, keys: Sequence[Key], block: Block, start: int = 0, stop: int | None = None
    ) -> tuple[Tensor, Tensor] | None:
        if len(block.shape) != 2 or self.rank >= min(block.shape):
            return None
        r, many = self.rank, len(keys)
        height, width = (block.rows if stop is None else stop) - start, block.shape[1]
        u, v = f"{block.name}#u", f"{block.name}#v"
        left = noise.draw_rows("gaussian", keys, u, [start * r] * many, height * r, block.device)
        right = noise.draw_rows("gaussian", keys, v, [0] * many, width * r, block.device)
        return left.mul_(r**-0.5).view(many, height, r), right.view(many, r, width)

    def draw_rows(self, key: Key, block: Block, rows: Sequence[int]) -> Tensor:
        found = self.factors([key], block)
        if found is None:
            return Gaussian().draw_rows(key, block, rows)
        left, right = found
        return left[0, list(rows)] @ right[0]

    def combine(
        self,
        keys: Sequence[Key],
        coefficients: Sequence[float],
        block: Block,
        start: int,
        stop: int,
    ) -> Tensor:
        found = self.factors(keys, block, start, stop)
        if found is None:
            return Gaussian().combine(keys, coefficients, block, start, stop)
        left, right = found
        weighted = left * torch.tensor(coefficients, device=block.device).view(-1, 1, 1)
        return weighted.transpose(0, 1).flatten(1) @ right.flatten(0, 1)
