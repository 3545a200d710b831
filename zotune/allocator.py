"""What glibc's allocator does with freed memory. Other allocators look after themselves."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from functools import cache
from typing import Any

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # of mallopt(3)
_LARGEST = 32 << 20  # bytes; glibc takes no larger mmap threshold


def give_back() -> None:
    """Return what was freed to the system.

    glibc keeps freed pieces that lie between live ones: while a checkpoint is read, those of layers
    already decoded would add up to another copy of it.

    >>> give_back()
    """
    _found("malloc_trim")(0)


@cache
def keep_freed() -> None:
    """From now on this process keeps what it frees, for the next step to use again.

    A step allocates and frees the same activations over and over. Left alone, glibc returns the
    larger ones to the system each time, and the fresh pages that the next step is given instead
    cost a third of a step in page faults. The peak stays what it was. A user's own MALLOC_*
    variables win.

    >>> keep_freed()
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt = _found("mallopt")
    mallopt(_MMAP_THRESHOLD, _LARGEST)
    mallopt(_TRIM_THRESHOLD, (1 << 31) - 1)
    mallopt(_TOP_PAD, _LARGEST >> 1)


@cache
def _found(name: str) -> Callable[..., Any]:
    """A function of the C library; one that does nothing where it has none of that name."""
    try:
        return ctypes.CDLL(None)[name]
    except (OSError, AttributeError, TypeError):  # not glibc; no such library on Windows
        return lambda *_: 0
