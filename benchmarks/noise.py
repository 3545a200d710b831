"""Directions against torch's own random numbers, on the same cores and the shapes of MiniLM.

    python benchmarks/noise.py

draw: u as a tensor, against torch.randn. sum: g += c u without a tensor for u, against torch.randn
and an addition. The last rows draw every block of the model once, as a dense step does. Blocks of
a few hundred numbers show what a call costs, not a generator; they have no target.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor

from benchmarks.contenders import minilm
from benchmarks.harness import Rounds, Row, Work, begin, interleave, parser, report
from zotune.core import noise
from zotune.core.noise import Key, Law
from zotune.models import load

LAWS: tuple[Law, ...] = ("gaussian", "rademacher", "uniform")
SMALL = 1 << 16  # numbers below which the call, not the generator, takes the time
AT_LEAST = 1 << 22  # numbers that one call draws, so that small blocks are timed as well


def options(words: Sequence[str] | None = None) -> argparse.Namespace:
    assert __doc__ is not None
    return parser(__doc__, rounds=9, warmup=2).parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    given = options(words)
    begin(given)
    model = load(given.model or minilm(), kind="encoder").model
    blocks = [p.numel() for p in model.parameters()]
    rows: list[Row] = []
    seconds: dict[str, dict[str, list[float]]] = {}
    series = {f"{n:,} numbers": [n] for n in spread(blocks)} | {"all blocks": blocks}
    for name, sizes in series.items():
        repeats = max(1, AT_LEAST // sum(sizes))
        contenders = contenders_for(sizes * repeats)
        rounds = interleave(contenders, rounds=given.rounds, calls=1, warmup=given.warmup)
        rows += rows_of(name, rounds, sum(sizes) * repeats, sum(sizes) >= SMALL)
        seconds[name] = rounds.seconds
    report("noise", rows, given, seconds_per_round=seconds)


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
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(max(sizes))
    key = Key(0)

    def randn() -> None:
        for n in sizes:
            torch.randn(n, generator=generator)

    def add_randn() -> None:
        for n in sizes:
            total[:n].add_(torch.randn(n, generator=generator), alpha=0.5)

    def draw(law: Law) -> None:
        for n in sizes:
            noise.draw(law, key, "block", 0, n)

    def add() -> None:
        for n in sizes:
            part: Tensor = total[:n]
            noise.combine_(part, "gaussian", [key], [0.5], "block")

    laws: dict[str, Work] = {law: partial(draw, law) for law in LAWS}
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


if __name__ == "__main__":
    main()
