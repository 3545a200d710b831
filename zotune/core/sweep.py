"""Updates in one sweep: g is drawn, made a step and subtracted where the numbers lie.

A rule that turns each number of g into a step by itself says so (`Rule.elementwise`), a law that a
kernel can draw says how (`Perturbation.independent`). Where both do, and the device has kernels, a
block is moved in one sweep, and g never exists. Everything else goes on as in `step.py`; both
leave the same bits. What changes from step to step lies in one small table, so that all launches
of a step can be recorded once (a CUDA graph) and replayed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from zotune.core.block import Block
from zotune.core.estimator import Estimate
from zotune.core.graphs import Cuda
from zotune.core.method import Method
from zotune.core.rule import Elementwise
from zotune.quant.kernels import has_triton

Record = Callable[[Callable[[], Any]], tuple[Callable[[], None], Any]]
log = logging.getLogger("zotune")


@dataclass
class Sweeps:
    """Moves blocks, one sweep each, on the CPU or on one GPU. `record` as in `graphs`: CUDA graphs
    where there are any."""

    record: Record | None = None
    replayed: int = field(default=0, init=False)
    _plan: Hashable = field(default=None, init=False)
    _table: Tensor = field(default_factory=lambda: torch.empty(0), init=False)
    _replay: Callable[[], None] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.record is None and torch.cuda.is_available():
            self.record = Cuda()

    def __call__(
        self, blocks: Iterable[Block], method: Method, past: Estimate, lr: float
    ) -> frozenset[str]:
        """Move what can be moved so by one estimate; the names of those blocks."""
        how = method.rule.elementwise(lr)
        if how is None:
            return frozenset()
        free = [b for b in blocks if not (b.exact or (method.weight_decay and b.decay))]
        drawn = [b for b in free if has_triton(b.device.type)]
        if drawn:
            return self._on_gpu(drawn, method, past, how)
        return _on_cpu([b for b in free if b.device.type == "cpu"], method, past, how)

    def _on_gpu(
        self, blocks: list[Block], method: Method, past: Estimate, how: Elementwise
    ) -> frozenset[str]:
        from zotune.core import sweep_triton

        law = method.perturbation
        chosen = [
            b for b in blocks if b.device == blocks[0].device and sweep_triton.sweepable(b, law)
        ]
        if not chosen:
            return frozenset()
        places = tuple(place for block in chosen for place in sweep_triton.places(block))
        plan = (places, law, how.sign, len(past.keys), past.key.seed)
        table = sweep_triton.table(chosen, law, past, how.size)
        self._run(plan, table, lambda at: sweep_triton.sweep_(chosen, law, past, how.sign, at))
        return frozenset(block.name for block in chosen)

    def _run(self, plan: Hashable, table: Tensor, launch: Callable[[Tensor], None]) -> None:
        """The first time plainly, then recorded, from then on replayed."""
        if plan != self._plan:
            self._plan, self._replay = plan, None
        elif self.record is not None:
            self._table = self._table if self._replay else table.clone()
            self._replay = self._replay or self._recorded(launch)
        if self._replay is None:
            launch(table)
            return
        self._table.copy_(table)
        self._replay()
        self.replayed += 1

    def _recorded(self, launch: Callable[[Tensor], None]) -> Callable[[], None] | None:
        assert self.record is not None
        try:
            return self.record(lambda: launch(self._table))[0]
        except Exception as error:  # whatever a recording raises, plain launches remain
            self.record = None
            why = f"{type(error).__name__}: {error}".split("\n")[0]
            log.warning("updates are not recorded as CUDA graphs but run as they are: %s", why)
            return None


def _on_cpu(
    blocks: list[Block], method: Method, past: Estimate, how: Elementwise
) -> frozenset[str]:
    from zotune.core import sweep_cpu

    law = method.perturbation
    chosen = [b for b in blocks if sweep_cpu.sweepable(b, law)]
    for block in chosen:
        sweep_cpu.sweep_(block, law, past, how)
    return frozenset(block.name for block in chosen)
