"""How much memory the process has used at most."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

import torch

_PROCESS = Path("/proc/self")
_GROUP = Path("/sys/fs/cgroup")


def free_bytes(device: str = "cpu") -> int:
    """Bytes that can still be had: of the GPU, or of the machine and the group this process is in.

    >>> free_bytes() > 0
    True
    """
    if torch.device(device).type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + held
    import psutil

    free = int(psutil.virtual_memory().available)
    with suppress(OSError, ValueError):  # no group, or one without a limit
        most = int((_GROUP / "memory.max").read_text())
        used = int((_GROUP / "memory.current").read_text())
        lines = (_GROUP / "memory.stat").read_text().splitlines()
        pages = sum(int(x.split()[1]) for x in lines if x.startswith("inactive_file "))
        free = min(free, max(0, most - used) + pages)
    return free


def reset_peak(device: str) -> None:
    """Count the peak from here on, where the system can (Linux, CUDA)."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):
        (_PROCESS / "clear_refs").write_text("5")


def peak_bytes(device: str = "cpu") -> int:
    """Peak of the GPU's allocations, or of the process's resident memory.

    >>> peak_bytes() > 0
    True
    """
    if torch.device(device).type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    marked = _high_water_mark()
    return _largest_ever() if marked is None else marked


def _high_water_mark() -> int | None:
    """VmHWM, which `reset_peak` sets back; None where the system has no such line."""
    try:
        status = (_PROCESS / "status").read_text(encoding="utf-8")
    except OSError:
        return None
    found = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(found[0]) * 1024 if found else None


def _largest_ever() -> int:
    """The largest size since the start; on Linux a child inherits it from who started it."""
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(most) * (1 if sys.platform == "darwin" else 1024)
