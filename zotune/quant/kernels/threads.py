"""The threads of kernels that release the interpreter lock.

They are torch's own, where torch runs on GNU OpenMP: another pool's threads would have to share
the cores with torch's, which wait for their next work by spinning. Elsewhere, and in forked
children, whose OpenMP threads did not come along, a plain pool does.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch

Work = Callable[[int], None]

_lock = threading.Lock()
_pool: ThreadPoolExecutor | None = None
_forked = False
_inside = threading.local()
_Body = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


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
    errors: dict[int, BaseException] = {}

    def work(part: int) -> None:
        _inside.busy = True
        try:
            fn(n * part // parts, n * (part + 1) // parts)
        except BaseException as error:  # raised by the caller, once all have ended
            errors[part] = error
        finally:
            _inside.busy = False

    team = None if _forked else _openmp()
    (_on_pool if team is None else team)(work, parts)
    if errors:
        raise errors[min(errors)]


@cache
def _openmp() -> Callable[[Work, int], None] | None:
    """Runs work(0), ..., work(parts - 1) on the threads of torch's OpenMP; None where it has none.

    Only a library that torch has already loaded will do: a second copy of it would bring a second
    set of threads.
    """
    if not hasattr(os, "RTLD_NOLOAD"):
        return None
    for path in (Path(torch.__file__).parent / "lib").glob("libgomp*"):
        with suppress(OSError, AttributeError):
            return _team(ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD | os.RTLD_NOW))
    return None


def _team(library: ctypes.CDLL) -> Callable[[Work, int], None]:
    run, number, size = (
        library[name] for name in ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
    )

    def on_team(work: Work, parts: int) -> None:
        def body(_: int | None) -> None:
            for part in range(number(), parts, size()):  # a team may be smaller than asked for
                work(part)

        run(_Body(body), None, ctypes.c_uint(parts), ctypes.c_uint(0))

    return on_team


def _on_pool(work: Work, parts: int) -> None:
    pool = _get_pool()
    futures = [pool.submit(work, part) for part in range(1, parts)]
    work(0)
    wait(futures)


def _get_pool() -> ThreadPoolExecutor:
    global _pool
    with _lock:
        if _pool is None:
            # Threads start on demand: the limit only has to exceed any torch.get_num_threads().
            _pool = ThreadPoolExecutor(1024, thread_name_prefix="zotune-kernel")
        return _pool


def _after_fork() -> None:
    """A forked child inherits pool and team as objects, but none of their threads."""
    global _pool, _lock, _forked
    _pool, _lock, _forked = None, threading.Lock(), True


os.register_at_fork(after_in_child=_after_fork)
