"""Subspaces: directions with few coordinates, and rules that live in those coordinates.

u = expand(z): a law draws z, `inner(block)` numbers instead of the block's own many, and a linear
map that a key fixes lays them out over the block. Since the map is linear, g of a step has
coordinates of its own, and a rule's momentum, signs or orthogonalization act on them: a state of
r (m + n) numbers instead of m n.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zotune.core import noise
from zotune.core.block import Block
from zotune.core.noise import Key
from zotune.core.perturbation import Gaussian, Perturbation


@dataclass(frozen=True)
class Subspace(Perturbation):
    """u = expand(z, key), z ~ N(0, I); blocks with `inner` None are drawn Gaussian as a whole.

    `expand` may change with the step (a basis drawn anew every so often), never between the
    queries or examples of one step. E[u u^T] = I over bases where a subclass does not say
    otherwise.
    """

    @abstractmethod
    def inner(self, block: Block) -> tuple[int, ...] | None:
        """Shape of z for this block."""

    @abstractmethod
    def expand(
        self, z: Tensor, key: Key, block: Block, start: int = 0, stop: int | None = None
    ) -> Tensor:
        """Rows start:stop of what the coordinates z stand for at `key`; linear in z."""

    def draw_inner(self, key: Key, block: Block) -> Tensor:
        """z(key): float32, shape `inner(block)`."""
        shape = self.inner(block)
        assert shape is not None
        count = torch.Size(shape).numel()
        return noise.draw("gaussian", key, f"{block.name}#z", 0, count, block.device).view(shape)

    def combine_inner(
        self, keys: Sequence[Key], coefficients: Sequence[float], block: Block
    ) -> Tensor:
        """Coordinates of g = sum_k coefficients[k] u_k, for keys of one step."""
        shape = self.inner(block)
        assert shape is not None
        total = torch.zeros(shape, device=block.device)
        for key, c in zip(keys, coefficients, strict=True):
            total.add_(self.draw_inner(key, block), alpha=c)
        return total

    def carry(self, z: Tensor, block: Block, old: Key, new: Key) -> Tensor:
        """Coordinates at `new` of what z stands for at `old`: a rule's state, when bases change."""
        return z

    def draw(self, key: Key, block: Block, start: int = 0, stop: int | None = None) -> Tensor:
        if self.inner(block) is None:
            return Gaussian().draw(key, block, start, stop)
        return self.expand(self.draw_inner(key, block), key, block, start, stop)

    def combine(
        self,
        keys: Sequence[Key],
        coefficients: Sequence[float],
        block: Block,
        start: int,
        stop: int,
    ) -> Tensor:
        if self.inner(block) is None:
            return Gaussian().combine(keys, coefficients, block, start, stop)
        z = self.combine_inner(keys, coefficients, block)
        return self.expand(z, keys[0], block, start, stop)
