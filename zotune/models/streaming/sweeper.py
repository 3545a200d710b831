"""Keeping a promise for code that does not know of it.

A model is also read outside its forwards: hashed, rounded, measured, saved. A thread sees when that
has filled memory, and lets go of it; values are in the files.
"""

from __future__ import annotations

import threading
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Final

from zotune.models.streaming.store import PAGE

if TYPE_CHECKING:
    from zotune.models.streaming.stream import Stream

_EVERY: Final = 0.005  # seconds; a file that is cached is read at 10 MB per ms at most
_SLACK: Final = 16 << 20
_STATM = Path("/proc/self/statm")


class Sweeper:
    """Watches one stream's memory until it is stopped, or the stream is gone.

    Where the system does not tell what of a process is mapped (other than Linux), it does nothing.
    """

    def __init__(self, stream: Stream) -> None:
        self.stream = weakref.ref(stream)
        self.ended = threading.Event()
        self.base = mapped_bytes()
        if self.base is not None:
            threading.Thread(target=self._watch, name="zotune-sweeper", daemon=True).start()

    def _watch(self) -> None:
        while not self.ended.wait(_EVERY):
            stream, now = self.stream(), mapped_bytes()
            if stream is None or now is None:
                return
            assert self.base is not None
            if now - self.base > stream.need + _SLACK:
                stream.sweep()
                # What is left beyond a layer or two is other libraries' (code loaded since).
                self.base = max(self.base, (mapped_bytes() or 0) - stream.need)
            del stream

    def stop(self) -> None:
        self.ended.set()


def mapped_bytes() -> int | None:
    """Bytes of files that this process has in memory; None where that is not known."""
    try:
        return int(_STATM.read_text().split()[2]) * PAGE
    except (OSError, IndexError, ValueError):
        return None
