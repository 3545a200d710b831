"""Giving freed memory back while a checkpoint is read."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache


def give_back() -> None:
    """Return what was freed to the system.

    glibc keeps freed pieces that lie between live ones: those of layers already decoded would add
    up to another copy of the checkpoint. Other allocators look after themselves.

    >>> give_back()
    """
    _trim()(0)


@cache
def _trim() -> Callable[[int], int]:
    try:
        found = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):  # not glibc
        return int
    return found  # type: ignore[no-any-return]
