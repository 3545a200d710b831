"""`zotune bench noise`: directions against torch's own random numbers, on the shapes of a model.

draw: u as a tensor, against torch.randn. sum: g += c u without a tensor for u, against torch.randn
and an addition. The last rows draw every block of the model once, as a dense step does. Blocks of
a few hundred numbers show what a call costs, not a generator; they have no target.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from zotune.bench import plot
from zotune.bench.models import parameter_sizes, shape_of
from zotune.bench.rows import Row
from zotune.bench.settings import BenchConfig
from zotune.bench.timing import Rounds, Work, interleave
from zotune.core import noise
from zotune.core.noise import Key, Law

LAWS: tuple[Law, ...] = ("gaussian", "rademacher", "uniform")
SMALL = 1 << 16  # numbers below which the call, not the generator, takes the time
AT_LEAST = 1 << 22  # numbers that one call draws, so that small blocks are timed as well


def measure(config: BenchConfig) -> tuple[list[Row], dict[str, Any]]:
    """Rows and what they were computed from."""
    blocks = parameter_sizes(config.model_name_or_path)
    rows: list[Row] = []
    details: dict[str, Any] = {"seconds_per_round": {}, "numbers": {}}
    series = {f"{n:,} numbers": [n] for n in spread(blocks)} | {"all blocks": blocks}
    for name, sizes in series.items():
        repeats = max(1, AT_LEAST // sum(sizes))
        works = contenders_for(sizes * repeats)
        times = config.rounds or shape_of(config.model_name_or_path).rounds
        rounds = interleave(works, rounds=times, calls=config.calls or 1, warmup=config.warmup)
        count = sum(sizes) * repeats
        rows += rows_of(name, rounds, count, sum(sizes) >= SMALL)
        details["seconds_per_round"][name] = rounds.seconds
        details["numbers"][name] = count
    return rows, details


def spread(sizes: Sequence[int]) -> list[int]:
    """Different sizes, each at least three times the one before.

    >>> spread([384, 768, 384, 1536])
    [384, 1536]
    """
    kept: list[int] = []
    for n in sorted(set(sizes)):
        if not kept or n >= 3 * kept[-1]:
            kept.append(n)
    return kept


def contenders_for(sizes: Sequence[int]) -> dict[str, Work]:
    """One call draws every size once. The sums go into one buffer as large as the largest."""
    generator = torch.Generator()
    total = torch.zeros(max(sizes))
    key = Key(0)

    def randn() -> None:
        for n in sizes:
            torch.randn(n, generator=generator)

    def add_randn() -> None:
        for n in sizes:
            total[:n].add_(torch.randn(n, generator=generator), alpha=0.5)

    def drawn(law: Law) -> None:
        for n in sizes:
            noise.draw(law, key, "block", 0, n)

    def add() -> None:
        for n in sizes:
            part: Tensor = total[:n]
            noise.combine_(part, "gaussian", [key], [0.5], "block")

    laws: dict[str, Work] = {law: partial(drawn, law) for law in LAWS}
    return {"randn": randn, "add randn": add_randn, **laws, "sum": add}


def rows_of(name: str, rounds: Rounds, count: int, large: bool) -> list[Row]:
    """zotune's time over torch's, and both as numbers per second."""
    most = 1.0 if large else None
    rows = [
        Row(f"{name}: gaussian draw", rounds.ratio("gaussian", "randn"), "x", "randn", most),
        Row(f"{name}: gaussian sum", rounds.ratio("sum", "add randn"), "x", "randn, add_", most),
        Row(f"{name}: rademacher draw", rounds.ratio("rademacher", "randn"), "x", "randn"),
        Row(f"{name}: uniform draw", rounds.ratio("uniform", "randn"), "x", "randn"),
    ]
    for contender in ("gaussian", "randn"):
        seconds = rounds.median(contender)
        rate = None if seconds is None else count / seconds / 1e6
        rows.append(Row(f"{name}: {contender}", rate, "million/s"))
    return rows


def draw(made: Mapping[str, Any]) -> Any:
    """Numbers per second by size of block, ours and torch's."""
    return plot.noise(made)
