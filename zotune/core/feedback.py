"""Error feedback: what a step loses in rounding to whole codes is added to the next one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from zotune.core.block import Block, CodeBlock
from zotune.core.rule import Grads, Rule
from zotune.errors import BadInput
from zotune.quant.packing import unpack

Residual = Literal["stored", "rebuilt"]


@dataclass(frozen=True)
class ErrorFeedback(Rule):
    """Whole codes of lr g, and the rest later (QES 2026, arXiv 2602.03120):

        v = lr g + gamma e,  D = gate(round(v)),  W <- W - D,  e <- v - D

    The gate holds a code that would leave its range. With gamma = 1 and no code at an edge,
    W - e = W_0 - lr sum g: nothing is lost. With gamma < 1 a drift below (1 - gamma) / 2 codes a
    step never moves a code.

    residual="stored" keeps e, one float32 per code. "rebuilt" keeps nothing: it starts from e = 0
    `past` steps ago, with today's lr and codes; exact in a run that is younger, at a constant lr.
    """

    gamma: float = 0.9
    residual: Residual = "stored"
    past: int = 50

    def __post_init__(self) -> None:
        if not 0 <= self.gamma <= 1:
            raise BadInput(f"gamma={self.gamma}; want 0 <= gamma <= 1")
        if self.residual not in ("stored", "rebuilt"):
            raise BadInput(f"residual={self.residual!r}; want 'stored' or 'rebuilt'")
        if self.past < 1:
            raise BadInput(f"{self.past} past steps; want at least 1")

    @property
    def window(self) -> int:
        return 1 if self.residual == "stored" else 1 + self.past

    def state(self, block: Block, shape: tuple[int, ...]) -> dict[str, Tensor]:
        if self.residual == "rebuilt":
            return {}
        return {"residual": torch.zeros(shape, device=block.device)}

    def step(
        self, grads: Grads, state: dict[str, Tensor], t: int, lr: float, block: Block, start: int
    ) -> Tensor:
        g = grads(0)
        assert isinstance(block, CodeBlock)
        codes = _codes(block, start, start + len(g))
        if self.residual == "stored":
            residual = state["residual"]
        else:
            residual = torch.zeros_like(g)
            for k in range(min(t, self.window) - 1, 0, -1):
                self._moved(grads(k), residual, lr, codes, block)
        return self._moved(g, residual, lr, codes, block)

    def _moved(
        self, g: Tensor, residual: Tensor, lr: float, codes: Tensor, block: CodeBlock
    ) -> Tensor:
        """D for these codes; what it leaves of v becomes the residual."""
        v = residual.mul_(self.gamma).add_(g, alpha=lr)
        lowest, highest = block.limits
        moved = v.round()
        target = codes - moved
        moved *= (target >= lowest) & (target <= highest)
        v.sub_(moved)
        return moved


def _codes(block: CodeBlock, start: int, stop: int) -> Tensor:
    """Rows start:stop of the codes as they stand, float32."""
    stored, bits = block.module.codes[start:stop], block.module.scheme.bits
    return (stored if bits == 8 else unpack(stored, bits, block.shape[1])).float()
