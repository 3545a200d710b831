"""Examples of like length together: which go into one step, and which into one forward of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from zotune.training.order import permutation

FORWARD = 256
"""Tokens per probe, padding included, that one more forward of a step has to save: it reads all
weights and draws all noise again. Measured: of 64, 128, 256 and 512 the fastest on int4 MiniLM."""
MEGA = 50
"""Steps whose examples are sorted together: sorting whole epochs would make all runs alike."""
_ORDERS = 1 << 41  # Philox keys that no order of examples uses

Extent = tuple[int, int]
"""(rows, tokens of the longest) of one encoded example."""


def buckets(extents: Sequence[Extent], most: int) -> list[list[int]]:
    """The cheapest pieces of a batch: numbers of its examples, longest first, each piece of at most
    `most` tokens with their padding, a single example excepted.

    >>> buckets([(1, 9), (1, 400), (1, 380), (1, 12)], most=1000)
    [[1, 2], [3, 0]]
    >>> buckets([(1, 9), (1, 12), (1, 10)], most=1000)
    [[1, 2, 0]]
    """
    order = sorted(range(len(extents)), key=lambda i: -extents[i][1])
    best, cut = [0.0], [0]  # of the first k in order: the cost, and where the last piece begins
    for stop in range(1, len(order) + 1):
        found = (float("inf"), stop - 1)
        rows = 0
        for start in range(stop - 1, -1, -1):
            rows += extents[order[start]][0]
            tokens = rows * extents[order[start]][1]
            if tokens > most and start < stop - 1:
                break
            found = min(found, (best[start] + tokens + FORWARD, start))
        best.append(found[0])
        cut.append(found[1])
    pieces, stop = [], len(order)
    while stop:
        pieces.append(order[cut[stop] : stop])
        stop = cut[stop]
    return pieces[::-1]


def grouped(
    seed: int, epoch: int, size: int, lengths: Sequence[int]
) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The order of one epoch in which batches of `size` hold examples of like length.

    Examples are drawn as without, sorted by length within each `MEGA` batches, and the batches of
    these come in an order drawn anew.

    >>> sorted(grouped(0, 1, 2, (5, 1, 5, 1, 9)).tolist())
    [0, 1, 2, 3, 4]
    """
    count, known = len(lengths), np.array(lengths)
    order = permutation(seed, epoch, count)
    first = -(epoch * count) % size  # a batch that began in the epoch before ends here
    edges = [0, *range(first or size, count, size), count]
    found = np.empty_like(order)
    for low in range(0, len(edges) - 1, MEGA):
        slots = edges[low : low + MEGA + 1]
        members = order[slots[0] : slots[-1]]
        members = members[np.argsort(-known[members], kind="stable")]
        turns = permutation(seed, _ORDERS + epoch * len(edges) + low, len(slots) - 1)
        taken = 0
        for turn in turns.tolist():
            start, stop = slots[turn], slots[turn + 1]
            found[start:stop] = members[taken : taken + stop - start]
            taken += stop - start
    return found
