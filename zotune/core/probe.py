"""Probes: points whose loss is wanted, and the losses that come back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from zotune.core.noise import Key


@dataclass(frozen=True, slots=True)
class Probe:
    """The point theta + step * u(key); `step = 0` is the base point.

    With `per_example`, example b of the batch sees theta + step * u(key.fold(lane=b)): one
    forward probes as many directions as the batch has examples.
    """

    key: Key
    step: float
    per_example: bool = False


@dataclass(frozen=True)
class Losses:
    """What an evaluator measured: one loss per probe and example, in float64.

    per_example: (probes, examples). weights: (examples,), the share of each example in the batch
    loss (tokens for language models), summing to 1. A loss without examples has one column.
    exact: by block, the gradient of the mean over the probes of the batch loss, where it is exact.
    """

    per_example: Tensor
    weights: Tensor
    exact: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, values: list[float]) -> Losses:
        """From one number per probe.

        >>> Losses.of([1.0, 3.0]).mean.tolist()
        [1.0, 3.0]
        """
        column = torch.tensor(values, dtype=torch.float64).view(-1, 1)
        return cls(column, torch.ones(1, dtype=torch.float64))

    @classmethod
    def none(cls, probes: int) -> Losses:
        """Of a batch without examples.

        >>> Losses.none(2).per_example.shape
        torch.Size([2, 0])
        """
        nothing = torch.zeros(0, dtype=torch.float64)
        return cls(nothing.expand(probes, 0), nothing)

    def put_among(self, others: Losses, theirs: Sequence[bool]) -> Losses:
        """These losses and `others` of the same batch, in the order that `theirs` tells.

        >>> Losses.of([1.0, 3.0]).put_among(Losses.of([2.0]), [False, True, False]).mean.tolist()
        [1.0, 2.0, 3.0]
        """
        mine, more = iter(self.per_example), iter(others.per_example)
        rows = [next(more) if other else next(mine) for other in theirs]
        return Losses(torch.stack(rows), self.weights, self.exact)

    @property
    def mean(self) -> Tensor:
        """The batch loss of each probe: (probes,)."""
        return self.per_example @ self.weights
