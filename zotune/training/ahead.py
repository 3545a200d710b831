"""The next batch is read while a step runs.

Reading is what a task does to make tensors of examples; it touches neither the model nor noise.
The thread is idle whenever no step runs, so an evaluation never shares a tokenizer with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

from zotune.tasks.batch import Batch
from zotune.training.batches import AbstractBatches, Batches, together

Read = list[Batch] | None

NAME = "zotune-batches"  # of the thread


class Ahead:
    """Batches by step, for `count(step)` steps' worth of examples each.

    >>> class Squares(AbstractBatches):
    ...     def __init__(self): pass
    ...     def __getitem__(self, step): return step * step
    >>> with Ahead(workers=1) as ahead:
    ...     ahead.batch(Squares(), 3)
    9
    """

    def __init__(
        self, workers: int = 1, device: str = "cpu", count: Callable[[int], int] = lambda step: 1
    ) -> None:
        self.device, self.count = torch.device(device), count
        self._pool = ThreadPoolExecutor(1, NAME) if workers else None
        self._next: tuple[AbstractBatches, int, Future[list[Read]]] | None = None

    def batch(self, batches: AbstractBatches, step: int) -> Batch | Sequence[Batch]:
        """What a step is measured on. What went wrong while it was read is raised here."""
        found, self._next = self._next, None
        if found is not None and found[0] is batches and found[1] == step:
            read = found[2].result()
        else:
            read = self._read(batches, step)
        parts = [batches.finished(step + k, part) for k, part in enumerate(read)]
        whole = parts[0] if len(parts) == 1 else together(parts, batches.size)
        return self._placed(whole)

    @contextmanager
    def reading(self, batches: AbstractBatches, step: int) -> Iterator[None]:
        """Read this step's examples meanwhile; none but `Batches`, which are drawn in the open and
        need no model."""
        if self._pool is not None and isinstance(batches, Batches):
            self._next = batches, step, self._pool.submit(self._read, batches, step)
        try:
            yield
        finally:
            if self._next is not None:
                self._next[2].exception()  # waits; the step itself raises it

    def _read(self, batches: AbstractBatches, step: int) -> list[Read]:
        read = [batches.read(step + k) for k in range(self.count(step))]
        if self.device.type != "cuda":
            return read
        return [None if part is None else [b.pinned() for b in part] for part in read]

    def _placed(self, found: Any) -> Any:
        """On the GPU: copied beside what it still computes."""
        if self.device.type != "cuda":
            return found
        return (
            found.to(self.device)
            if isinstance(found, Batch)
            else [piece.to(self.device) for piece in found]
        )

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """The thread ends here."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
