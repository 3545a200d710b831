"""Method: one frozen record of choices, so that a run can be rebuilt from its first line."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from zotune.core.estimator import Estimator, OneSided, TwoSided
from zotune.core.perturbation import Gaussian, Perturbation
from zotune.core.rule import SGD, Rule
from zotune.core.shaping import Shaping
from zotune.errors import BadInput

Units = Literal["relative", "absolute"]
Decay = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class Schedule:
    """The share of lr in force at a step: warm-up from 0, then constant, linear or cosine to 0.

    >>> Schedule("linear").factor(50, 100)
    0.5
    """

    kind: Decay = "constant"
    warmup: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("constant", "linear", "cosine"):
            raise BadInput(f"schedule {self.kind!r}; want 'constant', 'linear' or 'cosine'")

    def factor(self, step: int, total: int) -> float:
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        done = (step - self.warmup) / max(1, total - self.warmup)
        if self.kind == "linear":
            return max(0.0, 1 - done)
        if self.kind == "cosine":
            return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        return 1.0


@dataclass(frozen=True)
class Interlude:
    """Every `every` steps, `steps` steps of another method on the same blocks."""

    every: int
    steps: int
    method: Method

    def __post_init__(self) -> None:
        if self.every < 1 or self.steps < 1:
            raise BadInput(f"every={self.every}, steps={self.steps}; want both at least 1")


@dataclass(frozen=True)
class Method:
    """A published method: where directions come from, what is measured, how it becomes a step.

    units="relative" counts eps and lr in each block's own unit (a scale's size, an adapter's
    output), "absolute" in the weights' numbers, as papers do. `batches` is how many of a run's
    batches one step is measured on. `eval(repr(m)) == m`.

    >>> m = Method("mine", lr=1e-2)
    >>> from zotune.core.nouns import *
    >>> eval(repr(m)) == m
    True
    """

    name: str
    estimator: Estimator = field(default_factory=TwoSided)
    perturbation: Perturbation = field(default_factory=Gaussian)
    rule: Rule = field(default_factory=SGD)
    shaping: tuple[Shaping, ...] = ()
    lr: float = 1e-6
    schedule: Schedule = field(default_factory=Schedule)
    weight_decay: float = 0.0
    units: Units = "relative"
    interlude: Interlude | None = None
    batches: int = 1

    def __post_init__(self) -> None:
        if not (math.isfinite(self.lr) and self.lr >= 0):
            raise BadInput(f"lr={self.lr}; want a finite lr >= 0")
        if self.weight_decay < 0:
            raise BadInput(f"weight_decay={self.weight_decay}; want >= 0")
        if self.batches < 1:
            raise BadInput(f"batches={self.batches}; want at least 1")
        if self.units not in ("relative", "absolute"):
            raise BadInput(f"units={self.units!r}; want 'relative' or 'absolute'")
        for stage in self.stages[1:]:
            if stage.units != self.units or stage.interlude is not None:
                raise BadInput("an interlude has its method's units and no interlude of its own")
            if stage.estimator.count(2) != self.estimator.count(2):
                raise BadInput("an interlude leaves as many scalars a step as its method")

    @property
    def stages(self) -> tuple[Method, ...]:
        """The methods that take turns: this one, and its interlude's if it has one."""
        return (self,) if self.interlude is None else (self, self.interlude.method)

    def at(self, step: int) -> Method:
        """The method whose turn it is.

        >>> m = Method("mine", interlude=Interlude(3, 2, Method("other")))
        >>> [m.at(t).name for t in range(6)]
        ['mine', 'mine', 'mine', 'other', 'other', 'mine']
        """
        if self.interlude is None:
            return self
        place = step % (self.interlude.every + self.interlude.steps)
        return self if place < self.interlude.every else self.interlude.method

    def forwards_at(self, step: int) -> int:
        """Forward passes over a batch of one step."""
        now = self.at(step)
        observed = now.perturbation.observes and not isinstance(now.estimator, OneSided)
        return now.batches * (now.estimator.forwards + observed)

    @property
    def forwards(self) -> int:
        """Forward passes over a batch per step: the mean over a turn, rounded up.

        >>> Method("mine", batches=5, interlude=Interlude(1, 2, Method("other"))).forwards
        5
        """
        turn = 1 if self.interlude is None else self.interlude.every + self.interlude.steps
        return -(-sum(map(self.forwards_at, range(turn))) // turn)

    @property
    def replayable(self) -> bool:
        """Whether base model and journal are all that its steps come from."""
        return not any(stage.perturbation.observes for stage in self.stages)

    def but(self, **changes: Any) -> Method:
        """The same method with other lr, schedule, ... (a copy)."""
        return replace(self, **changes)
