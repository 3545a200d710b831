"""Method: one frozen record of choices, so that a run can be rebuilt from its first line."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from zotune.core.estimator import Estimator, TwoSided
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
class Method:
    """A published method: where directions come from, what is measured, how it becomes a step.

    units="relative" counts eps and lr in each block's own unit (a scale's size, an adapter's
    output), "absolute" in the weights' numbers, as papers do. `eval(repr(m)) == m`.

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

    def __post_init__(self) -> None:
        if not (math.isfinite(self.lr) and self.lr >= 0):
            raise BadInput(f"lr={self.lr}; want a finite lr >= 0")
        if self.weight_decay < 0:
            raise BadInput(f"weight_decay={self.weight_decay}; want >= 0")
        if self.units not in ("relative", "absolute"):
            raise BadInput(f"units={self.units!r}; want 'relative' or 'absolute'")

    @property
    def forwards(self) -> int:
        """Forward passes per step."""
        return self.estimator.forwards

    def but(self, **changes: Any) -> Method:
        """The same method with other lr, schedule, ... (a copy)."""
        return replace(self, **changes)
