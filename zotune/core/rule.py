"""Rules: one block's g to one block's step, with its state (empty for SGD).

A rule works on runs of rows of a block, elementwise, so no gradient larger than a run exists.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from zotune.core.block import Block
from zotune.core.grid import grid_steps
from zotune.errors import BadInput

Grads = Callable[[int], Tensor]
"""grads(k): the same rows of g from k steps ago (k = 0: now), drawn again on demand."""


@dataclass(frozen=True)
class Elementwise:
    """A step that each number of g gives by itself: size * g, or size * sign(g)."""

    size: float
    sign: bool = False


@dataclass(frozen=True)
class Rule(ABC):
    """What is subtracted from a block.

    Rules act elementwise on runs of rows, but for those that are `whole`: they see all rows of a
    block at once (an orthogonalized matrix). Where the directions have coordinates of their own
    (`Subspace`), a rule acts on those and `state` is shaped like them.
    """

    whole: ClassVar[bool] = False

    @property
    def window(self) -> int:
        """How many recent estimates the rule wants to see, this step's included."""
        return 1

    def state(self, block: Block, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """Fresh state tensors for gradients of this shape: the block's, or its coordinates'."""
        return {}

    def elementwise(self, lr: float) -> Elementwise | None:
        """The same step as a kernel may take it without g as a tensor; None if there is more to
        it."""
        return None

    @abstractmethod
    def step(
        self, grads: Grads, state: dict[str, Tensor], t: int, lr: float, block: Block, start: int
    ) -> Tensor:
        """lr times the direction for the rows that `grads` gives; `state` holds the same rows and
        is updated in place. t counts applied steps from 1."""


@dataclass(frozen=True)
class SGD(Rule):
    """step = lr g."""

    def elementwise(self, lr: float) -> Elementwise | None:
        return Elementwise(lr)

    def step(
        self, grads: Grads, state: dict[str, Tensor], t: int, lr: float, block: Block, start: int
    ) -> Tensor:
        return grads(0).mul_(lr)


@dataclass(frozen=True)
class MomentumSGD(Rule):
    """m <- b1 m + (1 - b1) g from m = 0, step = lr m: one float32 per number of g."""

    b1: float = 0.9

    def __post_init__(self) -> None:
        if not 0 <= self.b1 < 1:
            raise BadInput(f"b1={self.b1}; want 0 <= b1 < 1")

    def state(self, block: Block, shape: tuple[int, ...]) -> dict[str, Tensor]:
        return {"m": torch.zeros(shape, device=block.device)}

    def step(
        self, grads: Grads, state: dict[str, Tensor], t: int, lr: float, block: Block, start: int
    ) -> Tensor:
        return state["m"].mul_(self.b1).add_(grads(0), alpha=1 - self.b1) * lr


@dataclass(frozen=True)
class SignSGD(Rule):
    """step = lr sign(g); elements with g = 0 stay."""

    def elementwise(self, lr: float) -> Elementwise | None:
        return Elementwise(lr, sign=True)

    def step(
        self, grads: Grads, state: dict[str, Tensor], t: int, lr: float, block: Block, start: int
    ) -> Tensor:
        return grads(0).sign_().mul_(lr)


@dataclass(frozen=True)
class GridSign(Rule):
    """step = max(floor(lr), 1) sign(g) in whole codes (ZOQO, arXiv 2501.06736).

    With relative=False lr is a weight distance: max(floor(lr / s), 1) codes of worth s.
    """

    relative: bool = True

    def elementwise(self, lr: float) -> Elementwise | None:
        return Elementwise(max(lr // 1, 1.0) if lr else 0.0, sign=True) if self.relative else None

    def step(
        self, grads: Grads, state: dict[str, Tensor], t: int, lr: float, block: Block, start: int
    ) -> Tensor:
        g = grads(0).sign_()
        if lr == 0:
            return torch.zeros_like(g)
        return g.mul_(grid_steps(lr, self.relative, block, start, start + g.shape[0]))


@dataclass(frozen=True)
class Adam(Rule):
    """Adam (Kingma & Ba 2014) on zeroth-order estimates.

        m = mean_b1 g, v = mean_b2 g^2 (bias-corrected), step = lr m / (sqrt v + floor)

    moments="stored" keeps m and v: two float32 numbers per tuned element. moments="rebuilt" keeps
    nothing and draws the last `window` gradients again from their coefficients (MeZO, appendix B):
    window times the noise per step, weights truncated at b^window.
    """

    b1: float = 0.9
    b2: float = 0.999
    floor: float = 1e-8
    moments: Literal["stored", "rebuilt"] = "stored"
    history: int = 32

    def __post_init__(self) -> None:
        if not (0 <= self.b1 < 1 and 0 <= self.b2 < 1):
            raise BadInput(f"b1={self.b1}, b2={self.b2}; want both in [0, 1)")
        if self.moments not in ("stored", "rebuilt"):
            raise BadInput(f"moments={self.moments!r}; want 'stored' or 'rebuilt'")
        if self.history < 1:
            raise BadInput(f"history={self.history}; want at least 1")

    @property
    def window(self) -> int:
        return self.history if self.moments == "rebuilt" else 1

    def state(self, block: Block, shape: tuple[int, ...]) -> dict[str, Tensor]:
        if self.moments == "rebuilt":
            return {}
        zero = torch.zeros(shape, device=block.device)
        return {"m": zero, "v": zero.clone()}

    def step(
        self, grads: Grads, state: dict[str, Tensor], t: int, lr: float, block: Block, start: int
    ) -> Tensor:
        if self.moments == "stored":
            g, m, v = grads(0), state["m"], state["v"]
            m.mul_(self.b1).add_(g, alpha=1 - self.b1)
            v.mul_(self.b2).addcmul_(g, g, value=1 - self.b2)
            count = t
        else:
            count = min(t, self.history)
            m = torch.zeros_like(grads(0))
            v = torch.zeros_like(m)
            for k in reversed(range(count)):
                g = grads(k)
                m.mul_(self.b1).add_(g, alpha=1 - self.b1)
                v.mul_(self.b2).addcmul_(g, g, value=1 - self.b2)
        scale = lr / (1 - self.b1**count)
        return scale * m / ((v / (1 - self.b2**count)).sqrt_() + self.floor)
