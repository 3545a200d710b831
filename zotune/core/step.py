"""One step, for every method on every space.

    ask ─► probes ─► evaluator ─► losses ─► tell ─► estimate ─► record (durable) ─► apply_

`apply_` is all that resume and replay need: it draws g from the estimate's keys, asks the rule for
a step and lets the blocks move (`zotune.core.moves`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from zotune.core.block import Block
from zotune.core.estimator import Estimate
from zotune.core.evaluator import Evaluator
from zotune.core.method import Method
from zotune.core.moves import Moves, Turn, rule_state
from zotune.core.noise import Key
from zotune.core.probe import Losses, Probe
from zotune.core.space import Space
from zotune.errors import BadInput

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

    A step may leave blocks that are not in memory to be moved later (`zotune.core.moves`);
    `settle_` moves all that are left, which whoever looks at the blocks asks for first.

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
        self.active = space
        self.evaluator, self.record, self.total = evaluator, record, total
        self.done = 0
        self.applied = 0
        window = max(stage.rule.window for stage in method.stages)
        self.recent: deque[Estimate] = deque(maxlen=window)
        for block in space:
            block.memory.clear()
        for stage in method.stages:
            stage.estimator.check(space)
            stage.perturbation.check(space)
            states = stage.perturbation.states(space)
            for block in space.probed:
                block.memory.update(states[block.name])
        self.state = {stage.name: rule_state(stage, space) for stage in method.stages}
        self.moves = Moves(self.state)
        if window > 1 and not self.replayable:
            raise BadInput(
                f"{method.name} looks back over {window} steps, which exact gradients and "
                "directions from activations do not allow; store its moments instead"
            )

    @property
    def key(self) -> Key:
        return Key(self.seed, step=self.done)

    @property
    def now(self) -> Method:
        """The method whose turn it is."""
        return self.method.at(self.done)

    @property
    def lr(self) -> float:
        return self.now.lr * self.now.schedule.factor(self.done, self.total)

    @property
    def replayable(self) -> bool:
        """Whether base model and journal are all that the steps come from."""
        return self.method.replayable and not any(b.exact for b in self.space)

    @property
    def notes(self) -> list[str]:
        """What a user should know of this method on this space."""
        return [n for stage in self.method.stages for n in stage.perturbation.notes(self.space)]

    def ask(self) -> list[Probe]:
        """The points whose losses this step wants."""
        return self.now.estimator.ask(self.key)

    def tell(self, losses: Losses) -> StepReport:
        """Estimate, shape, record, apply. A loss that is not finite is recorded, never applied."""
        estimate = replace(self.now.estimator.tell(self.key, losses), exact=losses.exact)
        if estimate.finite:  # a clip would make a number of an infinity, a sign one of a NaN
            coefficients = torch.tensor(estimate.coefficients, dtype=torch.float64)
            for shaping in self.now.shaping:
                coefficients = shaping(coefficients)
            estimate = replace(estimate, coefficients=tuple(coefficients.tolist()))
        if self.record is not None:
            self.record(self.done, estimate)
        return self.apply_(estimate)

    def step(self, batch: Any) -> StepReport:
        """Measure and move: one whole step on one batch."""
        if self.evaluator is None:
            raise BadInput("this tuner has no evaluator; use ask() and tell(), or give it one")
        probes = self.ask()
        losses = self.evaluator.losses(probes, batch, self.now.perturbation)
        self.evaluator.forwards += (self.now.batches - 1) * len(probes)  # it has counted one each
        return self.tell(losses)

    @torch.no_grad()
    def apply_(self, estimate: Estimate) -> StepReport:
        """Move every block by this estimate; nothing but the estimate is needed (replay)."""
        self.settle_()
        report = StepReport(self.done, estimate.loss, self.lr, estimate.finite, estimate)
        if estimate.finite:
            before = self.recent[0].key if self.recent else estimate.key
            self.recent.appendleft(estimate)
            self.applied += 1
            self.now.perturbation.leave_(self.active, estimate)
            turn = Turn(self.now, report.lr, tuple(self.recent), before, self.applied)
            self.moves.begin_(turn, self.active)
            self.now.perturbation.learn_(self.active, estimate)
        self.done += 1
        return report

    def settle_(self) -> None:
        """Move the blocks that the last estimate has not moved yet."""
        self.moves.settle_()

    def freeze_(self, names: Iterable[str]) -> None:
        """From now on these blocks stay as they are; what the method kept of them goes."""
        self.settle_()
        gone = set(names)
        self.active = self.active.without(gone)
        for block in self.space:
            if block.name in gone:
                block.memory.clear()
                for state in self.state.values():
                    state.pop(block.name, None)

    @torch.no_grad()
    def estimated(self, block: Block, estimate: Estimate) -> Tensor:
        """g of a probed block, in its own unit: float32, block-shaped."""
        weights = estimate.weights(block)
        return self.now.perturbation.combine(estimate.keys, weights, block, 0, block.rows)

    def state_tensors(self) -> dict[str, Tensor]:
        """Everything but the journal that a bitwise resume needs, flat, for safetensors."""
        self.settle_()
        out = {f"block/{name}": value for name, value in self.space.state().items()}
        return out | self._kept()

    def _kept(self) -> dict[str, Tensor]:
        """What rules and perturbations keep beyond the blocks themselves."""
        out = {f"memory/{b.name}/{k}": v for b in self.space for k, v in b.memory.items()}
        for stage, blocks in self.state.items():
            for block, state in blocks.items():
                out.update({f"rule/{stage}/{block}/{k}": v for k, v in state.items()})
        return out

    @property
    def kept_bytes(self) -> int:
        """Memory of the method itself, beyond the model: what `list methods` puts in words."""
        return sum(t.numel() * t.element_size() for t in self._kept().values())

    def load_(self, tensors: Mapping[str, Tensor], done: int, applied: int) -> None:
        """Go back to a saved state; `recent` is refilled by the caller with `remember_`."""
        self.moves.left.clear()
        self.space.load_(tensors, "block/")
        for name, held in self._kept().items():
            held.copy_(tensors[name])
        self.done, self.applied = done, applied
        self.recent.clear()

    def remember_(self, estimate: Estimate) -> None:
        """Refill the window of past estimates, oldest first, without moving anything."""
        if estimate.finite:
            self.recent.appendleft(estimate)
