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
from zotune.core.space import Space
from zotune.errors import BadInput

_TILE = 1 << 18  # elements of a product alive in float64


@dataclass(frozen=True)
class Subspace(Perturbation):
    """u = expand(z, key), z ~ N(0, I); blocks with `inner` None are drawn Gaussian as a whole.

    `expand` may change with the step (a basis drawn anew every so often), never between the
    queries or examples of one step. E[u u^T] = I over bases where a subclass does not say
    otherwise.
    """

    def check(self, space: Space) -> None:
        if all(self.inner(block) is None for block in space.probed):
            raise BadInput(
                f"{self}: this space has no matrix with more rows and columns than a subspace "
                "takes, so this would be plain MeZO; use method='mezo', or tune larger matrices"
            )

    @abstractmethod
    def inner(self, block: Block) -> tuple[int, ...] | None:
        """Shape of z for this block."""

    @abstractmethod
    def expand(
        self, z: Tensor, key: Key, block: Block, start: int = 0, stop: int | None = None
    ) -> Tensor:
        """Rows start:stop of what the coordinates z stand for at `key`; linear in z."""

    def share(self, block: Block) -> float:
        """The size of u on a block with `inner` None, where N(0, I) is 1."""
        return 1.0

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
            return self._shared(Gaussian().draw(key, block, start, stop), block)
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
            return self._shared(Gaussian().combine(keys, coefficients, block, start, stop), block)
        z = self.combine_inner(keys, coefficients, block)
        return self.expand(z, keys[0], block, start, stop)

    def _shared(self, u: Tensor, block: Block) -> Tensor:
        share = self.share(block)
        return u if share == 1.0 else u.mul_(share)


def sides(block: Block) -> tuple[int, int]:
    """Rows and columns of a block read as a matrix: dimensions beyond the first are columns."""
    return block.rows, block.numel // max(block.rows, 1)


def epoch(key: Key, steps: int) -> Key:
    """The key of what is drawn anew every `steps` steps.

    >>> epoch(Key(7, step=205, query=3), steps=100)
    Key(seed=7, step=2, query=0, lane=0)
    """
    return Key(key.seed, step=key.step // steps)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b as float32, summed in float64: the same numbers however the rows are cut, whatever the
    threads (sums in float32 differ in their last bits; these in one number of 10^8)."""
    out, wide = a.new_empty(len(a), b.shape[1]), b.double()
    rows = max(1, _TILE // max(1, b.shape[1]))
    for start in range(0, len(a), rows):
        out[start : start + rows] = a[start : start + rows].double() @ wide
    return out


@dataclass(frozen=True)
class Factored(Subspace):
    """u = left @ right, for matrices: a few rows of u need no others (an embedding's)."""

    @abstractmethod
    def left(self, z: Tensor, key: Key, block: Block, start: int, stop: int) -> Tensor:
        """Rows start:stop of the left factor: (stop - start, k)."""

    @abstractmethod
    def right(self, z: Tensor, key: Key, block: Block) -> Tensor:
        """The right factor: (k, columns)."""

    def expand(
        self, z: Tensor, key: Key, block: Block, start: int = 0, stop: int | None = None
    ) -> Tensor:
        stop = block.rows if stop is None else stop
        u = product(self.left(z, key, block, start, stop), self.right(z, key, block))
        return u.view(len(u), *block.shape[1:])

    def factors(
        self, keys: Sequence[Key], block: Block, start: int = 0, stop: int | None = None
    ) -> tuple[Tensor, Tensor] | None:
        if self.inner(block) is None:
            return None
        stop = block.rows if stop is None else stop
        drawn = [(self.draw_inner(key, block), key) for key in keys]
        left = torch.stack([self.left(z, key, block, start, stop) for z, key in drawn])
        return left, torch.stack([self.right(z, key, block) for z, key in drawn])

    def draw_rows(self, key: Key, block: Block, rows: Sequence[int]) -> Tensor:
        if self.inner(block) is None:
            return self._shared(Gaussian().draw_rows(key, block, rows), block)
        z = self.draw_inner(key, block)
        left = torch.cat([self.left(z, key, block, row, row + 1) for row in rows])
        return product(left, self.right(z, key, block)).view(len(rows), *block.shape[1:])
