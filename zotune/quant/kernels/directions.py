# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""What a kernel must know to draw the directions of a layer's parts in its own registers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from zotune.quant.kernels.philox import LAWS

_jit: Any = triton.jit


@dataclass(frozen=True)
class Drawn:
    """Directions that a kernel draws by itself, and how far they reach in one block.

    streams (parts, 6) as in `noise_triton.table`, a row's weight being the probe's step. `lanes`
    parts lie between two parts that share a stream if `shared`. reach: float32, one number for
    every `over` numbers of the block, or None for `reach_value`.
    """

    streams: Tensor
    words: tuple[int, int]
    law: str
    gain: float
    most: int
    reach: Tensor | None
    reach_value: float
    over: int
    minimum: float | None
    shared: bool
    lanes: int

    @property
    def parts(self) -> int:
        return len(self.streams)

    @property
    def pairs(self) -> int:
        """Parts that one program serves: two where they share a stream."""
        return 2 if self.shared else 1

    @property
    def numbers(self) -> tuple[int, int, int, float, float]:
        """k0, k1, most, reach, minimum."""
        return (*self.words, self.most, self.reach_value, self.minimum or 0.0)

    @property
    def constants(self) -> dict[str, Any]:
        return {
            "law": LAWS[self.law], "gain": self.gain, "spread": self.reach is not None,
            "bounded": self.minimum is not None, "enable_fp_fusion": False,
        }  # fmt: skip


@_jit
def moved(theta, u, step, reach, minimum, gain: tl.constexpr, bounded: tl.constexpr):
    """theta + step reach u, clamped from below; theta itself at the base point."""
    if gain != 1.0:
        u = u * gain
    value = theta + (step * reach) * u
    if bounded:
        value = tl.where(value < minimum, minimum, value)
    return tl.where(step == 0.0, theta, value)
