"""Perturbations: where directions come from.

A direction is never stored: `draw` gives it again whenever it is wanted, for a whole block or for
a run of its rows, and `combine` gives g = sum_k c_k u_k from the same numbers. What was probed is
what is stepped along, because both come from here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from zotune.core import noise
from zotune.core.block import Block
from zotune.core.noise import Key, Law
from zotune.errors import BadInput

if TYPE_CHECKING:
    from zotune.core.estimator import Estimate
    from zotune.core.space import Space


@dataclass(frozen=True)
class Independent:
    """A direction whose elements are drawn from one law each, as kernels can do it in place:
    u_i = gain x_i, x_i the number i of the block's stream; `most` for whole numbers only."""

    law: Law | Literal["whole"]
    gain: float = 1.0
    most: int = 0


@dataclass(frozen=True)
class Perturbation(ABC):
    """A law for u. Laws have E[u] = 0 and E[u u^T] = I per block unless their docstring says so.

    Most are pure functions of the key. One that learns keeps tensors in `block.memory`: `state`
    gives them before the first step, `leave_` and `learn_` change them before and behind each, and
    snapshots hold them.
    One that `observes` sees the inputs of the layers it perturbs before its directions are drawn;
    its directions depend on data, so a journal alone cannot replay them.
    """

    observes: ClassVar[bool] = False

    def check(self, space: Space) -> None:
        """Refuse blocks that this law cannot perturb, before the first forward."""

    def notes(self, space: Space) -> list[str]:
        """What a user should know of this law on this space, said once at the start."""
        return []

    def state(self, block: Block) -> dict[str, Tensor]:
        """Fresh memory of a block."""
        return {}

    def states(self, space: Space) -> dict[str, dict[str, Tensor]]:
        """Fresh memory of all blocks by name, for laws that need to see the whole space."""
        return {block.name: self.state(block) for block in space.probed}

    def leave_(self, space: Space, estimate: Estimate) -> None:
        """Change the blocks' memory, before they are moved by `estimate`."""

    def learn_(self, space: Space, estimate: Estimate) -> None:
        """Change the blocks' memory, after they were moved by `estimate`."""

    def begin_(self, block: Block) -> None:
        """Forget what was observed: another batch follows, in one piece or several."""

    def observe_(self, block: Block, x: Tensor) -> None:
        """What flows into the block's module at the base point: (..., features), a piece of this
        batch. Modules that read one tensor are given the same object."""

    @abstractmethod
    def draw(self, key: Key, block: Block, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows start:stop of u(key) for `block`; float32, shape (stop - start, *shape[1:])."""

    def independent(self, block: Block) -> Independent | None:
        """How a kernel may draw u of this block by itself; None where only `draw` can."""
        return None

    def displacement(self, key: Key, block: Block) -> Tensor:
        """u(key) for `block.at`: int8 where the law has whole numbers only, else as drawn."""
        return self.draw(key, block)

    def draw_lanes(self, keys: Sequence[Key], block: Block) -> Tensor:
        """Directions of several keys at once: (len(keys), *block.shape)."""
        return torch.stack([self.draw(key, block) for key in keys])

    def draw_rows(self, key: Key, block: Block, rows: Sequence[int]) -> Tensor:
        """Chosen rows of u(key): (len(rows), *shape[1:]); an embedding needs no others."""
        return self.draw(key, block)[list(rows)]

    def factors(
        self, keys: Sequence[Key], block: Block, start: int = 0, stop: int | None = None
    ) -> tuple[Tensor, Tensor] | None:
        """left (len(keys), stop - start, r), right (len(keys), r, columns): rows start:stop of
        u(keys[k]) are left[k] @ right[k]. None where directions are no such product."""
        return None

    def combine(
        self,
        keys: Sequence[Key],
        coefficients: Sequence[float],
        block: Block,
        start: int,
        stop: int,
    ) -> Tensor:
        """g[start:stop] = sum_k coefficients[k] * u_k[start:stop]."""
        total = torch.zeros(part_shape(block, start, stop), device=block.device)
        for key, c in zip(keys, coefficients, strict=True):
            total.add_(self.draw(key, block, start, stop), alpha=c)
        return total


def part_shape(block: Block, start: int, stop: int) -> tuple[int, ...]:
    """Shape of rows start:stop."""
    return (stop - start, *block.shape[1:]) if block.shape else ()


def span(block: Block, start: int, stop: int | None) -> tuple[int, int, tuple[int, ...]]:
    """Flat index range and shape of rows start:stop."""
    stop = block.rows if stop is None else stop
    width = block.numel // max(block.rows, 1)
    return start * width, stop * width, part_shape(block, start, stop)


@dataclass(frozen=True)
class _Independent(Perturbation):
    """Elements drawn independently from one law: compiled, chunked and summed without a tensor."""

    law: ClassVar[Law]
    gain: ClassVar[float] = 1.0

    def independent(self, block: Block) -> Independent | None:
        return Independent(self.law, self.gain)

    def draw(self, key: Key, block: Block, start: int = 0, stop: int | None = None) -> Tensor:
        low, high, shape = span(block, start, stop)
        u = noise.draw(self.law, key, block.name, low, high, block.device).view(shape)
        return u if self.gain == 1.0 else u.mul_(self.gain)

    def draw_lanes(self, keys: Sequence[Key], block: Block) -> Tensor:
        starts = [0] * len(keys)
        u = noise.draw_rows(self.law, keys, block.name, starts, block.numel, block.device)
        u = u.view(len(keys), *block.shape)
        return u if self.gain == 1.0 else u.mul_(self.gain)

    def draw_rows(self, key: Key, block: Block, rows: Sequence[int]) -> Tensor:
        width = block.numel // block.rows
        starts = [r * width for r in rows]
        u = noise.draw_rows(self.law, [key] * len(starts), block.name, starts, width, block.device)
        u = u.view(len(starts), *block.shape[1:])
        return u if self.gain == 1.0 else u.mul_(self.gain)

    def combine(
        self,
        keys: Sequence[Key],
        coefficients: Sequence[float],
        block: Block,
        start: int,
        stop: int,
    ) -> Tensor:
        low, high, shape = span(block, start, stop)
        total = torch.zeros(high - low, device=block.device)
        scaled = [c * self.gain for c in coefficients]
        return noise.combine_(total, self.law, keys, scaled, block.name, low).view(shape)


@dataclass(frozen=True)
class Gaussian(_Independent):
    """u ~ N(0, I), as MeZO (Malladi et al. 2023, arXiv 2305.17333)."""

    law: ClassVar[Law] = "gaussian"


@dataclass(frozen=True)
class Rademacher(_Independent):
    """u uniform on {-1, +1}^d: mean and covariance as Gaussian, less variance, one bit each.

    >>> import torch; from zotune.core.block import FloatBlock
    >>> block = FloatBlock.of("w", torch.zeros(2, 3))
    >>> sorted(set(Rademacher().draw(Key(0), block).abs().flatten().tolist()))
    [1.0]
    """

    law: ClassVar[Law] = "rademacher"


@dataclass(frozen=True)
class Uniform(_Independent):
    """u uniform on [-sqrt 3, sqrt 3)^d, variance 1."""

    law: ClassVar[Law] = "uniform"
    gain: ClassVar[float] = 3.0**0.5


@dataclass(frozen=True)
class Sphere(Perturbation):
    """u uniform on the sphere of radius sqrt(numel) in each block: u = z sqrt(n) / ||z||."""

    def draw(self, key: Key, block: Block, start: int = 0, stop: int | None = None) -> Tensor:
        whole = Gaussian().draw(key, block)
        whole = whole * (block.numel**0.5 / float(whole.double().norm()))
        return whole[start:stop] if block.shape else whole


@dataclass(frozen=True)
class Sparse(Perturbation):
    """A random share `density` of coordinates moves: u = m z / sqrt(density), m ~ Bernoulli."""

    density: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise BadInput(f"density={self.density}; want 0 < density <= 1")

    def draw(self, key: Key, block: Block, start: int = 0, stop: int | None = None) -> Tensor:
        low, high, shape = span(block, start, stop)
        chance = noise.draw("uniform", key, f"{block.name}#mask", low, high, block.device)
        kept = (chance * 0.5 + 0.5 < self.density).view(shape)
        return Gaussian().draw(key, block, start, stop) * kept * self.density**-0.5
