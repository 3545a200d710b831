"""The progress bar on a terminal, plain lines elsewhere; always on standard error."""

from __future__ import annotations

import logging
import time
from typing import Any, Self

from zotune.training.memory import peak_bytes

log = logging.getLogger("zotune")
_LINE_SECONDS = 5.0


def readable(count: float) -> str:
    """Bytes for people.

    >>> readable(3_200_000)
    '3.2 MB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.{0 if unit == 'B' else 1}f} {unit}"
        count /= 1000
    raise AssertionError


class Progress:
    """Loss, steps per second, memory and time left."""

    def __init__(self, total: int, done: int, device: str, bar: bool) -> None:
        self.total, self.start, self.device = total, done, device
        self.done, self.began, self.said = done, time.monotonic(), 0.0
        self._bar: Any = None
        self._task: Any = None
        if bar:
            self._open()

    def _open(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        console = Console(stderr=True)
        if not console.is_terminal:
            return
        columns = (
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
        )
        self._bar = Bar(*columns, console=console)
        self._task = self._bar.add_task("", total=self.total, completed=self.done, text="")

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    @property
    def rate(self) -> float:
        """Steps per second since this process began to train, evaluations included."""
        return (self.done - self.start) / max(1e-9, time.monotonic() - self.began)

    def update(self, done: int, loss: float | None) -> None:
        """After a step; a loss of None is one that nobody may see."""
        self.done = done
        now = time.monotonic()
        seen = "" if loss is None else f"loss {loss:.4f}  "
        if self._bar is not None:
            memory = readable(peak_bytes(self.device))
            text = f"{seen}{self.rate:.1f} steps/s  {memory}"
            self._bar.update(self._task, completed=done, text=text)
        elif now - self.said >= _LINE_SECONDS or done == self.total:
            self.said = now
            left = (self.total - done) / max(1e-9, self.rate)
            log.info(
                "step %d/%d  %s%.1f steps/s  %s  %.0f s left",
                done, self.total, seen, self.rate, readable(peak_bytes(self.device)), left,
            )  # fmt: skip
