"""Interleaved timing.

Contenders are timed in turn, round after round, and a ratio is taken inside each round before the
median over rounds: whatever slows the machine for a minute slows both sides of the ratio.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

Work = Callable[[], object]


@dataclass
class Rounds:
    """Seconds per call of every contender: `seconds[name][k]` was measured in round k.

    >>> rounds = Rounds({"a": [1.0, 2.0, 9.0], "b": [2.0, 4.0, 4.0]})
    >>> rounds.median("a"), rounds.ratio("a", "b")
    (2.0, 0.5)
    """

    seconds: dict[str, list[float]]

    def median(self, name: str) -> float | None:
        return median(self.seconds[name]) if self.seconds.get(name) else None

    def ratio(self, name: str, base: str) -> float | None:
        """Median over rounds of the two contenders' ratio within a round."""
        pairs = zip(self.seconds.get(name, ()), self.seconds.get(base, ()), strict=False)
        ratios = [a / b for a, b in pairs]
        return median(ratios) if ratios else None


def interleave(
    contenders: Mapping[str, Work], *, rounds: int, calls: int, warmup: int = 2
) -> Rounds:
    """Time every contender once per round, `calls` calls each; each round starts with another one.

    >>> found = interleave({"a": lambda: None, "b": lambda: None}, rounds=3, calls=2)
    >>> {name: len(values) for name, values in found.seconds.items()}
    {'a': 3, 'b': 3}
    """
    names = list(contenders)
    for name in names:
        for _ in range(warmup):
            contenders[name]()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for k in range(rounds):
        first = k % len(names)
        for name in names[first:] + names[:first]:
            work = contenders[name]
            began = time.perf_counter()
            for _ in range(calls):
                work()
            seconds[name].append((time.perf_counter() - began) / calls)
    return Rounds(seconds)
