"""How many numbers may go into a forward, from the memory that is free.

The bytes that a forward holds are taken for a line in the numbers of its input. Two small trials
give the line, a third one, at the size chosen, must keep to it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

from zotune.core.meter import peak_of
from zotune.tasks.batch import Batch

log = logging.getLogger("zotune")
SHARE = 0.7  # of what is free: kernels' own scratch and longer texts than the trial's need some

Trial = Callable[[int], int]
"""Run a forward of about so many numbers; how many it were."""


@dataclass(frozen=True)
class Room:
    """numbers: the most that go into a forward. each: bytes per number; fixed: bytes of any
    forward; free: bytes that there were."""

    numbers: int
    each: float
    fixed: float
    free: int

    def __str__(self) -> str:
        return (
            f"at most {self.numbers:,} numbers per forward ({self.fixed / 1e6:,.0f} MB and "
            f"{self.each:,.0f} bytes per number, of {self.free / 1e6:,.0f} MB free)"
        )


def fitted(trial: Trial, least: int, few: int, most: int, free: int, device: torch.device) -> Room:
    """The largest size from `least` on whose forward keeps to its share; tried up to `most`, which
    is what a step wants. The line begins at `few` numbers: all probes, of one example.

    >>> def trial(numbers):
    ...     held = torch.ones(numbers) + 1
    ...     return numbers
    >>> fitted(trial, 10, 20, 1000, free=4000, device=torch.device("cpu")).numbers
    350
    """
    budget = SHARE * free
    (few, low), (more, high) = (_measured(trial, n, device) for n in (few, min(4 * few, most)))
    each = max(0.0, (high - low) / max(1, more - few)) if more > few else low / max(1, few)
    fixed = max(0.0, low - each * few)
    numbers = max(least, int((budget - fixed) / each) if each else most)
    while numbers > least:
        ran, taken = _measured(trial, min(numbers, most), device)
        if taken <= budget:
            break
        each = max(each, (taken - fixed) / max(1, ran))
        numbers = max(least, min(numbers, most) // 2)
    return Room(numbers, each, fixed, free)


def _measured(trial: Trial, numbers: int, device: torch.device) -> tuple[int, int]:
    ran: list[int] = []
    peak = peak_of(lambda: ran.append(trial(numbers)), device)
    return ran[0], peak


def trial_of(run: Callable[[Batch, int], object], batch: Batch, probes: int) -> Trial:
    """run(part of a batch, probes) of about a wanted size: first more probes, then examples."""

    def trial(numbers: int) -> int:
        each = batch.numbers // batch.size
        together = min(probes, max(1, numbers // each))
        part = batch.select(0, min(batch.size, max(1, numbers // (together * each))))
        run(part, together)
        return together * part.numbers

    return trial
