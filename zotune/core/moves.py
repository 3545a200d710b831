"""The second half of a step: blocks move by an estimate, at once or when they are next in memory.

g is drawn block by block, run by run, from the estimate's keys; the rule makes a step of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from zotune.core.block import Block, part
from zotune.core.estimator import Estimate
from zotune.core.method import Method
from zotune.core.noise import Key
from zotune.core.perturbation import Perturbation
from zotune.core.space import Space
from zotune.core.subspace import Subspace
from zotune.core.sweep import Sweeps

RUN = 1 << 20  # elements of g alive at once: the largest scratch of an update

State = dict[str, dict[str, dict[str, Tensor]]]
"""What rules keep: stage, block and name to tensor."""


class Elsewhere(Protocol):
    """Where blocks lie that are not always in memory."""

    def waiting(self) -> Set[str]:
        """Names of the blocks that are better moved when they are next in memory."""

    def visit(self, block: Block) -> None:
        """Bring a block in, to be moved; the one before may go."""

    def rest(self) -> None:
        """All may go."""


@dataclass(frozen=True)
class Turn:
    """What one step moves blocks by.

    recent: the estimates that the rule looks at, this step's first. before: the key of the step
    that moved blocks last. applied: steps that have moved them, this one among them.
    """

    method: Method
    lr: float
    recent: tuple[Estimate, ...]
    before: Key
    applied: int

    @property
    def key(self) -> Key:
        return self.recent[0].key

    def rows(self, block: Block, start: int, stop: int, k: int) -> Tensor:
        """Rows start:stop of g from k steps ago."""
        past = self.recent[k]
        if block.exact:
            unit = part(block.reach, start, stop, block.rows)
            return past.exact[block.name][start:stop] * unit / block.eps_ratio
        return self.method.perturbation.combine(past.keys, past.weights(block), block, start, stop)

    def inner(self, block: Block, k: int) -> Tensor:
        """The coordinates of g from k steps ago, in this step's subspace."""
        directions, past = self.method.perturbation, self.recent[k]
        assert isinstance(directions, Subspace)
        z = directions.combine_inner(past.keys, past.weights(block), block)
        return directions.carry(z, block, past.key, self.key)


class Moves:
    """Moves blocks by a turn, now or, where they lie `elsewhere`, as they come into memory.

    state: what the rules keep, which moves with the blocks.
    """

    def __init__(self, state: State) -> None:
        self.state = state
        self.elsewhere: Elsewhere | None = None
        self.left: dict[str, Block] = {}  # blocks that the turn has not moved yet
        self._turn: Turn | None = None
        self.sweeps = Sweeps()

    def begin_(self, turn: Turn, blocks: Iterable[Block]) -> None:
        """Move these blocks, but for those that are better moved later."""
        self._turn = turn
        self.left = {block.name: block for block in blocks if not block.still}
        self.settle_(self.left.keys() - self._waiting(turn.method))

    def settle_(self, names: Iterable[str] | None = None) -> None:
        """Move blocks that the turn has not moved yet; all of them by default."""
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

    def _waiting(self, method: Method) -> Set[str]:
        """Blocks that may be moved later: none where directions are measured anew by the next
        forwards, or learn from the moved blocks."""
        learns = type(method.perturbation).learn_ is not Perturbation.learn_
        if self.elsewhere is None or learns or not method.replayable:
            return frozenset()
        return self.elsewhere.waiting()

    @torch.no_grad()
    def _move_left_(self, blocks: Sequence[Block]) -> None:
        turn = self._turn
        assert turn is not None
        for group in [blocks] if self.elsewhere is None else [[block] for block in blocks]:
            if self.elsewhere is not None:
                self.elsewhere.visit(group[0])
            swept = self.sweeps(group, turn.method, turn.recent[0], turn.lr)
            for block in group:
                if block.name not in swept:
                    self._move_(block, turn)
                del self.left[block.name]

    def _move_(self, block: Block, turn: Turn) -> None:
        method, key, lr = turn.method, turn.key, turn.lr
        if method.weight_decay and block.decay:
            block.decay_(lr * block.lr_ratio * method.weight_decay, key)
        state, rule = self.state[method.name][block.name], method.rule
        directions = method.perturbation
        if isinstance(directions, Subspace) and inner_shape(directions, block) is not None:
            for held in state.values():
                held.copy_(directions.carry(held, block, turn.before, key))
            z = rule.step(partial(turn.inner, block), state, turn.applied, lr, block, 0)
            for start, stop in runs(block):
                step = directions.expand(z, key, block, start, stop)
                block.move_(start, stop, _scaled(step, block, start, stop), key)
            return
        for start, stop in [(0, block.rows)] if rule.whole else runs(block):
            here = {k: (v[start:stop] if v.dim() else v) for k, v in state.items()}
            grads = partial(turn.rows, block, start, stop)
            step = rule.step(grads, here, turn.applied, lr, block, start)
            block.move_(start, stop, _scaled(step, block, start, stop), key)


def rule_state(method: Method, space: Space) -> dict[str, dict[str, Tensor]]:
    """What the method's rule keeps of each block, as it begins."""

    def shape(block: Block) -> tuple[int, ...]:
        inside = inner_shape(method.perturbation, block)
        return block.shape if inside is None else inside

    return {b.name: method.rule.state(b, shape(b)) for b in space}


def inner_shape(perturbation: Perturbation, block: Block) -> tuple[int, ...] | None:
    """Shape of the coordinates that a rule sees of this block, None for the block's own."""
    if block.exact or not isinstance(perturbation, Subspace):
        return None
    return perturbation.inner(block)


def runs(block: Block) -> Iterator[tuple[int, int]]:
    """Ranges of rows of a block, each of about `RUN` elements."""
    run = max(1, RUN // max(1, block.numel // max(1, block.rows)))
    for start in range(0, block.rows, run):
        yield start, min(start + run, block.rows)


def _scaled(step: Tensor, block: Block, start: int, stop: int) -> Tensor:
    stride = part(block.stride, start, stop, block.rows)
    return step if isinstance(stride, float) and stride == 1.0 else step.mul_(stride)
