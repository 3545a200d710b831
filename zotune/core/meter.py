"""How many bytes of tensors live at once while something runs."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the storages that operations make, until they are freed; `peak` bytes at most.

    What a kernel takes and gives back inside of itself is not seen. `sizes` are the numbers of
    elements of all results.

    >>> with Meter() as meter:
    ...     x = torch.ones(1000) + 1
    >>> meter.peak, meter.sizes
    (8000, [1000, 1000])
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self.sizes: list[int] = []
        self._seen: dict[int, Any] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {id(s) for s in map(_storage, pytree.tree_leaves((args, kwargs)))}
        out = func(*args, **(kwargs or {}))
        for value in pytree.tree_leaves(out):
            storage = _storage(value)
            if storage is not None and id(storage) not in given and id(storage) not in self._seen:
                self._note(storage, value.numel())
        return out

    def _note(self, storage: torch.UntypedStorage, numbers: int) -> None:
        size = storage.nbytes()
        self._seen[id(storage)] = weakref.finalize(storage, self._gone, id(storage), size)
        self.live += size
        self.peak = max(self.peak, self.live)
        self.sizes.append(numbers)

    def _gone(self, number: int, size: int) -> None:
        self._seen.pop(number, None)
        self.live -= size


def _storage(value: Any) -> torch.UntypedStorage | None:
    return value.untyped_storage() if isinstance(value, torch.Tensor) else None


def peak_of(run: Callable[[], object], device: torch.device) -> int:
    """Bytes that `run` has beyond what is there, at most."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return int(torch.cuda.max_memory_allocated(device)) - before
    with Meter() as meter:
        run()
    return meter.peak
