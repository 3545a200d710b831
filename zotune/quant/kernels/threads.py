"""One small thread pool for kernels that release the interpreter lock.

numba's own parallel layers bring a second thread runtime into the process; a plain pool over
`nogil` kernels costs a few microseconds a call and leaves torch's threads alone.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait

import torch

_lock = threading.Lock()
_pool: ThreadPoolExecutor | None = None
_inside = threading.local()


def parallel_ranges(fn: Callable[[int, int], object], n: int, grain: int) -> None:
    """Call `fn(start, stop)` on ranges that cover 0..n, on up to `torch.get_num_threads()` threads.

    The calling thread takes the first range itself. Work below `2 * grain` runs inline, and so do
    calls made from within `fn`. The first exception is raised after every range has ended.

    >>> done = []
    >>> parallel_ranges(lambda start, stop: done.append((start, stop)), 10, grain=100)
    >>> done
    [(0, 10)]
    """
    parts = min(torch.get_num_threads(), n // max(grain, 1))
    if parts <= 1 or getattr(_inside, "busy", False):
        if n > 0:
            fn(0, n)
        return
    cuts = [n * k // parts for k in range(parts + 1)]
    pool = _get_pool()
    futures = [pool.submit(_run, fn, cuts[k], cuts[k + 1]) for k in range(1, parts)]
    try:
        _run(fn, cuts[0], cuts[1])
    finally:
        wait(futures)
    for future in futures:
        future.result()


def _run(fn: Callable[[int, int], object], start: int, stop: int) -> None:
    _inside.busy = True
    try:
        fn(start, stop)
    finally:
        _inside.busy = False


def _get_pool() -> ThreadPoolExecutor:
    global _pool
    with _lock:
        if _pool is None:
            # Threads start on demand: the limit only has to exceed any torch.get_num_threads().
            _pool = ThreadPoolExecutor(1024, thread_name_prefix="zotune-kernel")
        return _pool


def _forget_pool() -> None:
    """A forked child inherits the pool object but none of its threads."""
    global _pool, _lock
    _pool, _lock = None, threading.Lock()


os.register_at_fork(after_in_child=_forget_pool)
