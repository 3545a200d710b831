"""One step, for every method on every space.

    ask ─► probes ─► evaluator ─► losses ─► tell ─► estimate ─► record (durable) ─► apply_

`apply_` is all that resume and replay need: it draws g block by block, run by run, from the
estimate's keys, asks the rule for a step and lets the block move.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from zotune.core.block import Block, part
from zotune.core.estimator import Estimate
from zotune.core.evaluator import Evaluator
from zotune.core.method import Method
from zotune.core.noise import Key
from zotune.core.probe import Losses, Probe
from zotune.core.space import Space
from zotune.errors import BadInput

RUN = 1 << 20  # elements of g alive at once: the largest scratch of an update

Record = Callable[[int, Estimate], None]


@dataclass(frozen=True)
class StepReport:
    """What a step tells the outside."""

    step: int
    loss: float
    lr: float
    applied: bool
    estimate: Estimate | None = None


class Tuner:
    """Trains a space with a method. `step(batch)` is a whole step; `ask` and `tell` are its halves.

    `record(step, estimate)` is called after the losses are known and before anything moves: what
    it has made durable can be replayed. `total` steps fix the schedule.

    >>> import torch
    >>> from zotune.core.evaluator import FunctionEvaluator
    >>> from zotune.core.space import tensors
    >>> space = tensors({"x": torch.ones(10)})
    >>> sphere = FunctionEvaluator(space, lambda values, _: float(values["x"].square().sum()))
    >>> tuner = Tuner(space, Method("mezo", lr=0.02), seed=0, evaluator=sphere, total=200)
    >>> for _ in range(200): report = tuner.step(None)
    >>> report.loss < 1e-2
    True
    """

    def __init__(
        self,
        space: Space,
        method: Method,
        seed: int,
        *,
        evaluator: Evaluator | None = None,
        record: Record | None = None,
        total: int = 1,
    ) -> None:
        if not 0 <= seed < 1 << 63:
            raise BadInput(f"seed={seed}; want 0 <= seed < 2**63")
        space.bind_(method.estimator.eps, method.lr, method.units)
        space.check_decay(method.weight_decay)
        self.space, self.method, self.seed = space, method, seed
        self.evaluator, self.record, self.total = evaluator, record, total
        self.done = 0
        self.applied = 0
        self.recent: deque[Estimate] = deque(maxlen=method.rule.window)
        self.state = {b.name: method.rule.state(b) for b in space}

    @property
    def key(self) -> Key:
        return Key(self.seed, step=self.done)

    @property
    def lr(self) -> float:
        return self.method.lr * self.method.schedule.factor(self.done, self.total)

    def ask(self) -> list[Probe]:
        """The points whose losses this step wants."""
        return self.method.estimator.ask(self.key)

    def tell(self, losses: Losses) -> StepReport:
        """Estimate, shape, record, apply. A loss that is not finite is recorded, never applied."""
        estimate = self.method.estimator.tell(self.key, losses)
        if estimate.finite:  # a clip would make a number of an infinity, a sign one of a NaN
            coefficients = torch.tensor(estimate.coefficients, dtype=torch.float64)
            for shaping in self.method.shaping:
                coefficients = shaping(coefficients)
            estimate = replace(estimate, coefficients=tuple(coefficients.tolist()))
        if self.record is not None:
            self.record(self.done, estimate)
        return self.apply_(estimate)

    def step(self, batch: Any) -> StepReport:
        """Measure and move: one whole step on one batch."""
        if self.evaluator is None:
            raise BadInput("this tuner has no evaluator; use ask() and tell(), or give it one")
        return self.tell(self.evaluator.losses(self.ask(), batch, self.method.perturbation))

    @torch.no_grad()
    def apply_(self, estimate: Estimate) -> StepReport:
        """Move every block by this estimate; nothing but the estimate is needed (replay)."""
        report = StepReport(self.done, estimate.loss, self.lr, estimate.finite, estimate)
        if estimate.finite:
            self.recent.appendleft(estimate)
            self.applied += 1
            for block in self.space:
                self._move_(block, report.lr, estimate.key)
        self.done += 1
        return report

    def _move_(self, block: Block, lr: float, key: Key) -> None:
        if self.method.weight_decay and block.decay:
            block.decay_(lr * block.lr_ratio * self.method.weight_decay, key)
        width = max(1, block.numel // max(1, block.rows))
        run = max(1, RUN // width)
        for start in range(0, block.rows, run):
            stop = min(start + run, block.rows)
            state = {
                k: (v[start:stop] if v.dim() else v) for k, v in self.state[block.name].items()
            }

            def grads(k: int, start: int = start, stop: int = stop) -> Tensor:
                past = self.recent[k]
                share = 1.0 / (len(past.keys) * block.eps_ratio)
                weights = [c * share for c in past.coefficients]
                return self.method.perturbation.combine(past.keys, weights, block, start, stop)

            step = self.method.rule.step(grads, state, self.applied, lr, block, start)
            block.move_(start, stop, _scaled(step, block.stride, start, stop, block), key)

    def state_tensors(self) -> dict[str, Tensor]:
        """Everything but the journal that a bitwise resume needs, flat, for safetensors."""
        out = {f"block/{name}": value for name, value in self.space.state().items()}
        for block, state in self.state.items():
            out.update({f"rule/{block}/{k}": v for k, v in state.items()})
        return out

    def load_(self, tensors: Mapping[str, Tensor], done: int, applied: int) -> None:
        """Go back to a saved state; `recent` is refilled by the caller with `remember_`."""
        blocks = {k[6:]: v for k, v in tensors.items() if k.startswith("block/")}
        self.space.load_(blocks)
        for block, state in self.state.items():
            for k, v in state.items():
                v.copy_(tensors[f"rule/{block}/{k}"])
        self.done, self.applied = done, applied
        self.recent.clear()

    def remember_(self, estimate: Estimate) -> None:
        """Refill the window of past estimates, oldest first, without moving anything."""
        if estimate.finite:
            self.recent.appendleft(estimate)


def _scaled(step: Tensor, stride: Tensor | float, start: int, stop: int, block: Block) -> Tensor:
    stride = part(stride, start, stop, block.rows)
    return step if isinstance(stride, float) and stride == 1.0 else step.mul_(stride)
