"""Which examples a step sees: a pure function of (seed, step), the same when a run is resumed.

But for private runs: there chance picks them anew, and nobody can tell afterwards which.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zotune.core import noise, secret
from zotune.core.noise import Key
from zotune.errors import BadInput, DataError
from zotune.tasks.batch import Batch
from zotune.tasks.task import Draw, Task
from zotune.training.augmentation import Augmentation

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


class AbstractBatches(ABC):
    """Collated batches of a task's training examples by step number."""

    def __init__(self, task: Task, examples: Sequence[Any], size: int) -> None:
        if not len(examples):
            raise DataError("the training split is empty; a run needs at least one example")
        self.task, self.examples, self.size = task, examples, size
        self._features: dict[int, Any] = {}

    @abstractmethod
    def __getitem__(self, step: int) -> Batch | Sequence[Batch]:
        """The batch of a step, whole or in pieces to be run one by one."""

    def of(self, chosen: Sequence[int]) -> Batch:
        """A batch of these examples, by their numbers, as the task gives them."""
        return self.task.collate([self._encoded(i) for i in chosen])

    def _encoded(self, index: int) -> Any:
        if index not in self._features:
            if len(self._features) >= _KEPT:
                self._features.clear()
            self._features[index] = self.task.encode(self.examples[index])
        return self._features[index]


class Batches(AbstractBatches):
    """Batches of `size` examples each, epoch after epoch in orders that the seed fixes, as are the
    transforms of an augmentation."""

    def __init__(
        self,
        task: Task,
        examples: Sequence[Any],
        size: int,
        seed: int,
        augmentation: Augmentation | None = None,
    ) -> None:
        super().__init__(task, examples, size)
        self.seed, self.augmentation = seed, augmentation
        if size > len(examples):
            log.warning(
                "batches of %d examples from %d: examples repeat within a batch",
                size,
                len(examples),
            )

    def chosen(self, step: int) -> list[int]:
        """The numbers of a step's examples."""
        return indices(self.seed, step, self.size, len(self.examples))

    def transforms(self, step: int) -> list[int]:
        """The number of each example's transform in a step; 0 for none."""
        places = range(step * self.size, (step + 1) * self.size)
        drawn = self.augmentation.drawn if self.augmentation is not None else lambda *_: 0
        return [drawn(self.seed, place) for place in places]

    def __getitem__(self, step: int) -> Batch:
        batch = self.of(self.chosen(step))
        if self.augmentation is not None:
            batch = self.augmentation.of(batch, self.transforms(step))
        return self.task.varied(batch, drawing(Key(self.seed, step=step)))


def drawing(key: Key) -> Draw:
    """The keyed noise of a step as numbers for its examples; no block has such a name.

    >>> draw = drawing(Key(0, step=3))
    >>> bool((draw("noise", 9)[:2] == draw("noise", 2)).all())
    True
    """

    def numbers(name: str, count: int, normal: bool = False) -> Tensor:
        if normal:
            return noise.draw("gaussian", key, f"#{name}", 0, count)
        return noise.draw("uniform", key, f"#{name}", 0, count).mul_(0.5).add_(0.5)

    return numbers


class PoissonBatches(AbstractBatches):
    """Each example is in a step's batch with probability size / n, whatever the others do.

    This is the sampling that privacy is accounted with. It is drawn from secret entropy, anew at
    every look: batches vary in size, may be empty and do not come again. They come in pieces of
    `together` examples, each padded by itself. A piece of one is what its example alone makes it,
    to the last bit; in company, other lengths and shapes round its loss in other ways.

    Raises:
        BadInput: more examples expected in a batch than there are.
    """

    def __init__(self, task: Task, examples: Sequence[Any], size: int, together: int = 1) -> None:
        super().__init__(task, examples, size)
        self.together = together
        if size > len(examples):
            raise BadInput(
                f"batches of {size} examples are expected from {len(examples)}: each can be in a "
                "private batch once at most; lower batch_size"
            )

    def __getitem__(self, step: int) -> list[Batch]:
        chosen, size = poisson(self.size, len(self.examples)), self.together
        pieces = (chosen[i : i + size] for i in range(0, len(chosen), size))
        return [self.task.varied(self.of(piece), _secretly_drawn) for piece in pieces]


def _secretly_drawn(name: str, count: int, normal: bool = False) -> Tensor:
    """Numbers that do not come again."""
    words = np.frombuffer(secret.entropy(4 * count), np.uint32) >> np.uint32(8)
    numbers = torch.from_numpy(words.astype(np.float32) / (1 << 24))
    return torch.special.ndtri(numbers + 2**-25) if normal else numbers


def poisson(expected: int, count: int) -> list[int]:
    """Each of 0, ..., count - 1 with probability expected / count, from secret entropy.

    >>> poisson(3, 3)
    [0, 1, 2]
    """
    words = np.frombuffer(secret.entropy(8 * count), np.uint64) >> np.uint64(1)
    chosen: list[int] = np.flatnonzero(words < (expected << 63) // count).tolist()
    return chosen


def spread(examples: Sequence[Any], count: int | None) -> Sequence[Any]:
    """At most `count` examples, evenly spread over the data set.

    >>> spread(range(10), 3)
    [0, 3, 6]
    """
    if count is None or count >= len(examples):
        return examples
    return [examples[i * len(examples) // count] for i in range(count)]
