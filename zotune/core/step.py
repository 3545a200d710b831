"""One step, for every method on every space.

    ask ─► probes ─► evaluator ─► losses ─► tell ─► estimate ─► record (durable) ─► apply_

`apply_` is all that resume and replay need: it draws g block by block, run by run, from the
estimate's keys, asks the rule for a step and lets the block move.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from zotune.core.block import Block, part
from zotune.core.estimator import Estimate
from zotune.core.evaluator import Evaluator
from zotune.core.method import Method
from zotune.core.noise import Key
from zotune.core.perturbation import Perturbation
from zotune.core.probe import Losses, Probe
from zotune.core.space import Space
from zotune.core.subspace import Subspace
from zotune.core.sweep import Sweeps
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


class Elsewhere(Protocol):
    """Where blocks lie that are not always in memory."""

    def waiting(self) -> Set[str]:
        """Names of the blocks that are better moved when they are next in memory."""

    def visit(self, block: Block) -> None:
        """Bring a block in, to be moved; the one before may go."""

    def rest(self) -> None:
        """All may go."""


class Tuner:
    """Trains a space with a method. `step(batch)` is a whole step; `ask` and `tell` are its halves.

    `record(step, estimate)` is called after the losses are known and before anything moves: what
    it has made durable can be replayed. `total` steps fix the schedule.

    Where blocks lie `elsewhere`, a step may leave some of them to be moved later, by `arrived_`;
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
        self.sweeps = Sweeps()
        self.elsewhere: Elsewhere | None = None
        self.left: dict[str, Block] = {}  # blocks that the last estimate has not moved yet
        self._turn = (0, 0.0, self.key, self.key)  # its step, lr, key, and the key before
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
        self.state = {stage.name: _rule_state(stage, space) for stage in method.stages}
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
            self._turn = (self.done, report.lr, estimate.key, before)
            self.left = {block.name: block for block in self.active if not block.still}
            self.settle_(self.left.keys() - self._waiting())
            self.now.perturbation.learn_(self.active, estimate)
        self.done += 1
        return report

    def settle_(self, names: Iterable[str] | None = None) -> None:
        """Move blocks that the last estimate has not moved yet; all of them by default."""
        if not self.left:
            return
        chosen = set(self.left if names is None else names)
        self._move_left_([b for b in self.left.values() if b.name in chosen])
        if self.elsewhere is not None:
            self.elsewhere.rest()

    def arrived_(self, names: Iterable[str]) -> None:
        """These blocks are in memory now: move those that are left."""
        if self.left:
            self._move_left_([self.left[name] for name in names if name in self.left])

    def _waiting(self) -> Set[str]:
        """Blocks that may be moved later: none where directions are measured anew by the next
        forwards, or learn from the moved blocks."""
        learns = type(self.now.perturbation).learn_ is not Perturbation.learn_
        if self.elsewhere is None or learns or not self.method.replayable:
            return frozenset()
        return self.elsewhere.waiting()

    @torch.no_grad()
    def _move_left_(self, blocks: Sequence[Block]) -> None:
        (step, lr, key, before), done = self._turn, self.done
        self.done = step  # the method whose turn it was
        for group in [blocks] if self.elsewhere is None else [[block] for block in blocks]:
            if self.elsewhere is not None:
                self.elsewhere.visit(group[0])
            swept = self.sweeps(group, self.now, self.recent[0], lr)
            for block in group:
                if block.name not in swept:
                    self._move_(block, lr, key, before)
                del self.left[block.name]
        self.done = done

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

    def _move_(self, block: Block, lr: float, key: Key, before: Key) -> None:
        now = self.now
        if now.weight_decay and block.decay:
            block.decay_(lr * block.lr_ratio * now.weight_decay, key)
        state = self.state[now.name][block.name]
        directions = now.perturbation
        if isinstance(directions, Subspace) and _inner(directions, block) is not None:
            for held in state.values():
                held.copy_(directions.carry(held, block, before, key))
            z = now.rule.step(partial(self._inner, block, key), state, self.applied, lr, block, 0)
            for start, stop in runs(block):
                step = directions.expand(z, key, block, start, stop)
                block.move_(start, stop, _scaled(step, block.stride, start, stop, block), key)
            return
        for start, stop in [(0, block.rows)] if now.rule.whole else runs(block):
            here = {k: (v[start:stop] if v.dim() else v) for k, v in state.items()}
            grads = partial(self._rows, block, start, stop)
            step = now.rule.step(grads, here, self.applied, lr, block, start)
            block.move_(start, stop, _scaled(step, block.stride, start, stop, block), key)

    def _rows(self, block: Block, start: int, stop: int, k: int) -> Tensor:
        """Rows start:stop of g from k steps ago."""
        past = self.recent[k]
        if block.exact:
            unit = part(block.reach, start, stop, block.rows)
            return past.exact[block.name][start:stop] * unit / block.eps_ratio
        return self.now.perturbation.combine(past.keys, past.weights(block), block, start, stop)

    def _inner(self, block: Block, key: Key, k: int) -> Tensor:
        """The coordinates of g from k steps ago, in the subspace of `key`."""
        directions, past = self.now.perturbation, self.recent[k]
        assert isinstance(directions, Subspace)
        z = directions.combine_inner(past.keys, past.weights(block), block)
        return directions.carry(z, block, past.key, key)

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
        self.left.clear()
        self.space.load_(tensors, "block/")
        for name, held in self._kept().items():
            held.copy_(tensors[name])
        self.done, self.applied = done, applied
        self.recent.clear()

    def remember_(self, estimate: Estimate) -> None:
        """Refill the window of past estimates, oldest first, without moving anything."""
        if estimate.finite:
            self.recent.appendleft(estimate)


def runs(block: Block) -> Iterator[tuple[int, int]]:
    """Ranges of rows of a block, each of about `RUN` elements."""
    run = max(1, RUN // max(1, block.numel // max(1, block.rows)))
    for start in range(0, block.rows, run):
        yield start, min(start + run, block.rows)


def _rule_state(method: Method, space: Space) -> dict[str, dict[str, Tensor]]:
    def shape(block: Block) -> tuple[int, ...]:
        inside = _inner(method.perturbation, block)
        return block.shape if inside is None else inside

    return {b.name: method.rule.state(b, shape(b)) for b in space}


def _inner(perturbation: Perturbation, block: Block) -> tuple[int, ...] | None:
    """Shape of the coordinates that a rule sees of this block, None for the block's own."""
    if block.exact or not isinstance(perturbation, Subspace):
        return None
    return perturbation.inner(block)


def _scaled(step: Tensor, stride: Tensor | float, start: int, stop: int, block: Block) -> Tensor:
    stride = part(stride, start, stop, block.rows)
    return step if isinstance(stride, float) and stride == 1.0 else step.mul_(stride)
