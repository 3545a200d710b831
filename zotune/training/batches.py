"""Which examples a step sees: a pure function of (seed, step), the same when a run is resumed.

But for private runs: there chance picks them anew, and nobody can tell afterwards which.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
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
from zotune.training.lengths import buckets, grouped
from zotune.training.order import permutation

log = logging.getLogger("zotune")
_KEPT = 1 << 13  # encoded examples kept in memory; larger data sets are encoded again when drawn


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

    def read(self, step: int) -> list[Batch] | None:
        """Whatever of a step's batch may be made ahead of it, on another thread; None for
        nothing."""
        return None

    def finished(self, step: int, read: list[Batch] | None) -> Batch | Sequence[Batch]:
        """The batch of a step from what was read."""
        return self[step]

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
    transforms of an augmentation.

    most: tokens per piece, in which examples of like length are; None for whole batches. grouped:
    whether the examples of a batch are of like length.
    """

    def __init__(
        self,
        task: Task,
        examples: Sequence[Any],
        size: int,
        seed: int,
        augmentation: Augmentation | None = None,
        *,
        most: int | None = None,
        grouped: bool = False,
    ) -> None:
        super().__init__(task, examples, size)
        self.seed, self.augmentation = seed, augmentation
        self.most, self.grouped = most, grouped
        self._orders: dict[int, list[int]] = {}
        if size > len(examples):
            log.warning(
                "batches of %d examples from %d: examples repeat within a batch",
                size,
                len(examples),
            )

    def chosen(self, step: int) -> list[int]:
        """The numbers of a step's examples."""
        if not self.grouped:
            return indices(self.seed, step, self.size, len(self.examples))
        places = range(step * self.size, (step + 1) * self.size)
        orders = (divmod(place, len(self.examples)) for place in places)
        return [self._order(epoch)[place] for epoch, place in orders]

    def _order(self, epoch: int) -> list[int]:
        if epoch not in self._orders:
            found = grouped(self.seed, epoch, self.size, self._lengths).tolist()
            self._orders = {k: v for k, v in self._orders.items() if k == epoch - 1}
            self._orders[epoch] = found
        return self._orders[epoch]

    @cached_property
    def _lengths(self) -> tuple[int, ...]:
        """Tokens of every example."""
        encoded = (self.task.encode(example) for example in self.examples)
        return tuple(self.task.extent(features)[1] for features in encoded)

    def transforms(self, step: int) -> list[int]:
        """The number of each example's transform in a step; 0 for none."""
        places = range(step * self.size, (step + 1) * self.size)
        drawn = self.augmentation.drawn if self.augmentation is not None else lambda *_: 0
        return [drawn(self.seed, place) for place in places]

    def __getitem__(self, step: int) -> Batch | Sequence[Batch]:
        return self.finished(step, self.read(step))

    def whole(self, step: int) -> Batch:
        """The batch of a step in one piece."""
        return self._varied(step, self.of(self.chosen(step)))

    def read(self, step: int) -> list[Batch]:
        """The pieces of a step's batch as the task encodes and collates them."""
        features = [self._encoded(i) for i in self.chosen(step)]
        if self.most is None:
            return [self.task.collate(features)]
        pieces = buckets([self.task.extent(f) for f in features], self.most)
        if len(pieces) == 1:
            return [self.task.collate(features)]
        return [
            replace(self.task.collate([features[i] for i in piece]), places=tuple(piece))
            for piece in pieces
        ]

    def finished(self, step: int, read: list[Batch] | None) -> Batch | Sequence[Batch]:
        assert read is not None
        return self._varied(step, read[0]) if len(read) == 1 else read

    def _varied(self, step: int, batch: Batch) -> Batch:
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


def together(found: Sequence[Batch | Sequence[Batch]], size: int) -> list[Batch]:
    """Batches of `size` examples each, whole or in pieces, as the pieces of one."""
    pieces: list[Batch] = []
    for k, batch in enumerate(found):
        for piece in [batch] if isinstance(batch, Batch) else batch:
            places = piece.places or range(piece.size)
            pieces.append(replace(piece, places=tuple(k * size + place for place in places)))
    return pieces


def spread(examples: Sequence[Any], count: int | None) -> Sequence[Any]:
    """At most `count` examples, evenly spread over the data set.

    >>> spread(range(10), 3)
    [0, 3, 6]
    """
    if count is None or count >= len(examples):
        return examples
    return [examples[i * len(examples) // count] for i in range(count)]
