"""Which of several ways to the same numbers is fastest: measured once for each size."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable, Mapping

import torch

log = logging.getLogger("zotune")
_TRIES = 3
_chosen: dict[Hashable, str] = {}


def fastest(
    size: Hashable, ways: Mapping[str, Callable[[], object]], forced: str | None = None
) -> str:
    """The name of the way that took least when this size was first met on as many threads.

    Every way must leave the same bits, so that a choice never shows in a result. `forced` is taken
    where it is among the ways.

    >>> fastest("doc", {"slow": lambda: time.sleep(0.002), "fast": lambda: None})
    'fast'
    >>> fastest("doc", {"slow": lambda: None, "fast": lambda: None}, forced="slow")
    'slow'
    """
    if forced in ways:
        return str(forced)
    if len(ways) == 1:
        return next(iter(ways))
    key = (size, torch.get_num_threads())
    if key not in _chosen or _chosen[key] not in ways:
        seconds = {name: _least(way) for name, way in ways.items()}
        _chosen[key] = min(seconds, key=lambda name: seconds[name])
        log.debug("kernel for %s: %s of %s", size, _chosen[key], seconds)
    return _chosen[key]


def chosen() -> dict[Hashable, str]:
    """What has been chosen in this process so far."""
    return dict(_chosen)


def _least(way: Callable[[], object]) -> float:
    way()  # compiles
    tries = []
    for _ in range(_TRIES):
        began = time.perf_counter()
        way()
        tries.append(time.perf_counter() - began)
    return min(tries)
