"""Which examples a step sees: a pure function of (seed, step), the same when a run is resumed."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from zotune.errors import DataError
from zotune.tasks.batch import Batch
from zotune.tasks.task import Task

log = logging.getLogger("zotune")
_KEPT = 1 << 13  # encoded examples kept in memory; larger data sets are encoded again when drawn


@lru_cache(maxsize=4)
def permutation(seed: int, epoch: int, count: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The order of one epoch, sorted by raw Philox words: the same on every machine and version.

    >>> sorted(permutation(0, 3, 5).tolist())
    [0, 1, 2, 3, 4]
    """
    words = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(count)
    return np.argsort(words, kind="stable")


def indices(seed: int, step: int, size: int, count: int) -> list[int]:
    """The examples of one step: `size` of `count`, epoch after epoch; batches are always full.

    >>> indices(0, 0, 3, 2)[:2] == permutation(0, 0, 2).tolist()
    True
    """
    places = range(step * size, (step + 1) * size)
    return [int(permutation(seed, place // count, count)[place % count]) for place in places]


class Batches:
    """Collated batches of a task's training examples by step number."""

    def __init__(self, task: Task, examples: Sequence[Any], size: int, seed: int) -> None:
        if not len(examples):
            raise DataError("the training split is empty; a run needs at least one example")
        if size > len(examples):
            log.warning(
                "batches of %d examples from %d: examples repeat within a batch",
                size,
                len(examples),
            )
        self.task, self.examples, self.size, self.seed = task, examples, size, seed
        self._features: dict[int, Any] = {}

    def __getitem__(self, step: int) -> Batch:
        chosen = indices(self.seed, step, self.size, len(self.examples))
        return self.task.collate([self._encoded(i) for i in chosen])

    def _encoded(self, index: int) -> Any:
        if index not in self._features:
            if len(self._features) >= _KEPT:
                self._features.clear()
            self._features[index] = self.task.encode(self.examples[index])
        return self._features[index]


def spread(examples: Sequence[Any], count: int | None) -> Sequence[Any]:
    """At most `count` examples, evenly spread over the data set.

    >>> spread(range(10), 3)
    [0, 3, 6]
    """
    if count is None or count >= len(examples):
        return examples
    return [examples[i * len(examples) // count] for i in range(count)]
