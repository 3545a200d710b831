"""Perturbations that lie on a grid: whole codes for ZOQO, low-bit noise for QuZO."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zotune.core import noise, noise_reference
from zotune.core.block import Block, part
from zotune.core.noise import Key
from zotune.core.perturbation import Independent, Perturbation, part_shape, span
from zotune.errors import BadInput


@dataclass(frozen=True)
class Grid(Perturbation):
    """u uniform on the whole numbers {-M, ..., M}, for integer codes (ZOQO, arXiv 2501.06736).

    `radius` counts grid steps; with relative=False it is an absolute weight distance and
    M = max(floor(radius / s), 1) for a code worth s. Only a share `density` of the coordinates
    moves (1: the paper). Covariance M (M + 1) / 3 * density * I: the grid fixes it, not we.
    """

    radius: float = 1.0
    relative: bool = True
    density: float = 1.0

    def __post_init__(self) -> None:
        if not (self.radius > 0 and 0 < self.density <= 1):
            raise BadInput(
                f"radius={self.radius}, density={self.density}; want radius > 0, 0 < density <= 1"
            )

    def independent(self, block: Block) -> Independent | None:
        most = self.radius // 1 if self.radius >= 1 else 1.0
        if not self.relative or self.density < 1 or most > 127:
            return None
        return Independent("whole", most=int(most))

    def draw(self, key: Key, block: Block, start: int = 0, stop: int | None = None) -> Tensor:
        return self._whole(key, block, start, stop).float()

    def displacement(self, key: Key, block: Block) -> Tensor:
        return self._whole(key, block, 0, None)

    def draw_lanes(self, keys: Sequence[Key], block: Block) -> Tensor:
        most = grid_steps(self.radius, self.relative, block, 0, block.rows)
        starts, shape = [0] * len(keys), (len(keys), *block.shape)
        u = noise.draw_rows("uniform", keys, block.name, starts, block.numel, block.device)
        whole = noise_reference.whole(u.view(shape), most)
        if self.density < 1:
            mask = f"{block.name}#mask"
            chance = noise.draw_rows("uniform", keys, mask, starts, block.numel, block.device)
            whole *= (chance * 0.5 + 0.5 < self.density).view(shape)
        return whole

    def _whole(self, key: Key, block: Block, start: int, stop: int | None) -> Tensor:
        """int8 where one M <= 127 holds for all of the block, else float32."""
        low, high, shape = span(block, start, stop)
        most = grid_steps(self.radius, self.relative, block, start, stop or block.rows)
        if isinstance(most, float) and most <= 127:
            whole = noise.draw_whole(int(most), key, block.name, low, high, block.device)
            whole = whole.view(shape)
        else:
            u = noise.draw("uniform", key, block.name, low, high, block.device)
            whole = noise_reference.whole(u.view(shape), most)
        if self.density < 1:
            chance = noise.draw("uniform", key, f"{block.name}#mask", low, high, block.device)
            whole *= (chance * 0.5 + 0.5 < self.density).view(shape)
        return whole


def grid_steps(
    amount: float, relative: bool, block: Block, start: int, stop: int
) -> Tensor | float:
    """max(floor(amount / s), 1): a distance as a whole number of codes, s = 1 if relative."""
    if relative:
        return max(amount // 1, 1.0)
    if block.grid is None:
        raise BadInput(
            f"block {block.name!r} has no grid; absolute grid distances need the 'codes' space"
        )
    scale = part(block.grid, start, stop, block.rows)
    assert isinstance(scale, Tensor)
    return (amount / scale).floor().clamp_min(1.0)


@dataclass(frozen=True)
class Rounded(Perturbation):
    """Gaussian u rounded stochastically to a `bits`-bit grid, twice and independently (QuZO 2025,
    arXiv 2502.12346): u1 = SR_a(u) is probed, u2 = SR_b(u) is stepped along.

    SR(x) = clamp(floor(k x) + Bernoulli(frac(k x))) / k with k = 2^(bits-1) / 4, so that the grid
    spans four standard deviations. E[u2 u1^T | u] = u u^T inside the range; with one shared
    rounding (as the released code does) the diagonal is biased by f (1 - f) / k^2.
    """

    bits: int = 4

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise BadInput(f"bits={self.bits}; noise is rounded to 2..8 bits")

    def draw(self, key: Key, block: Block, start: int = 0, stop: int | None = None) -> Tensor:
        return self._rounded("a", key, block, start, stop)

    def combine(
        self,
        keys: Sequence[Key],
        coefficients: Sequence[float],
        block: Block,
        start: int,
        stop: int,
    ) -> Tensor:
        total = torch.zeros(part_shape(block, start, stop), device=block.device)
        for key, c in zip(keys, coefficients, strict=True):
            total.add_(self._rounded("b", key, block, start, stop), alpha=c)
        return total

    def _rounded(self, which: str, key: Key, block: Block, start: int, stop: int | None) -> Tensor:
        low, high, shape = span(block, start, stop)
        k = 2.0 ** (self.bits - 1) / 4
        x = noise.draw("gaussian", key, block.name, low, high, block.device).mul_(k)
        chance = noise.draw("uniform", key, f"{block.name}#{which}", low, high, block.device)
        half = 2 ** (self.bits - 1)
        x.add_(chance.mul_(0.5).add_(0.5)).floor_().clamp_(-half, half - 1)
        return x.div_(k).view(shape)
