"""Have the lower layers stopped changing?"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from zotune.core.block import Block
from zotune.tasks.batch import Batch
from zotune.training.freezing.cached import Border, pack
from zotune.training.freezing.schedule import Rate, Similar
from zotune.training.freezing.similarity import similarity

_ROWS = 512  # rows (tokens, pixels, examples) that features are compared on


class Watch:
    """Compares every layer with itself as it was at the last look, kept in `before`.

    border: the cut behind so many layers. blocks: the tuned blocks of one layer (1 for the first).
    """

    def __init__(
        self,
        rule: Similar | Rate,
        border: Callable[[int], Border],
        blocks: Callable[[int], list[Block]],
        probes: Batch,
    ) -> None:
        self.rule, self.border, self.blocks, self.probes = rule, border, blocks, probes
        self.before: dict[str, Tensor] = {}

    def due(self, step: int) -> bool:
        """Whether this is a step to look at."""
        return step % self.rule.every == 0

    def look_(self, frozen: int, most: int) -> int:
        """How many layers from below are calm, at least `frozen` and at most `most`."""
        now = self._now(frozen, most)
        depth, calm = frozen, True
        for layer in range(frozen + 1, most + 1):
            calm = calm and self._calm(now, layer)
            depth = layer if calm else depth
        self.before = now
        return depth

    def _now(self, frozen: int, most: int) -> dict[str, Tensor]:
        layers = range(frozen + 1, most + 1)
        if isinstance(self.rule, Rate):
            blocks = [block for n in layers for block in self.blocks(n)]
            return {b.name: b.value().detach().cpu().clone() for b in blocks}
        return {str(n): self._features(n) for n in layers}

    def _features(self, layer: int) -> Tensor:
        """(rows, features) of the probe batch: tokens, or pixels of all channels."""
        parts = pack(self.border(layer).state(self.probes), self.probes)
        rows = [p.flatten(2).movedim(1, -1).flatten(0, 1) if p.dim() > 3 else p.flatten(0, -2)
                for p in parts]  # fmt: skip
        whole = torch.cat(rows).float()
        return whole[:: -(-len(whole) // _ROWS)].clone()

    def _calm(self, now: dict[str, Tensor], layer: int) -> bool:
        if isinstance(self.rule, Similar):
            if str(layer) not in self.before:
                return False
            alike = similarity(self.rule.measure, now[str(layer)], self.before[str(layer)])
            return alike >= self.rule.threshold
        names = [b.name for b in self.blocks(layer)]
        if any(name not in self.before for name in names):
            return False
        moved = sum(_square(now[n].double() - self.before[n]) for n in names)
        whole = sum(_square(now[n].double()) for n in names)
        return moved <= self.rule.threshold**2 * whole


def _square(x: Tensor) -> float:
    return float(x.square().sum())
