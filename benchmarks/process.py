"""Memory of a contender, measured in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil


def resident() -> int:
    """Bytes of this process that are in memory now."""
    return int(psutil.Process().memory_info().rss)


def reset_peak() -> bool:
    """Let the peak count from here on; False where the system cannot (it then counts from the
    start of the process, loading of the model included)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak() -> int:
    """The most bytes that were in memory at once.

    Not ru_maxrss where there is a better source: a child inherits that number from the process
    that started it, however large that was.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return _maxrss()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def _maxrss() -> int:
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(most) * (1 if sys.platform == "darwin" else 1024)


def measured_apart(module: str, words: Sequence[str], timeout: float) -> Any:
    """Run `python -m <module> <words>` and read the JSON of its last line.

    Raises:
        RuntimeError: if it fails; the message is the end of what it said.
    """
    found = subprocess.run(
        [sys.executable, "-m", module, *words],
        cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip
    if found.returncode:
        said = found.stderr.strip().splitlines()[-3:]
        raise RuntimeError(f"{' '.join(words)}: " + " ".join(said))
    return json.loads(found.stdout.strip().splitlines()[-1])
