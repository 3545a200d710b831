"""What a measurement needs beside it: machine, versions, commit, command."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("zotune", "torch", "transformers", "numpy", "numba")
FLAGS = (
    "avx2", "avx512f", "avx512bw", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_tile",
    "amx_bf16", "amx_int8", "asimd", "asimddp", "bf16", "i8mm", "sve",
)  # fmt: skip
"""Instruction sets that decide which products are fast."""


def machine() -> dict[str, Any]:
    """CPU, cores, instruction sets, memory, and how busy the machine is."""
    import psutil
    import torch

    return {
        "cpu": _cpuinfo("model name") or platform.processor() or platform.machine(),
        "flags": [flag for flag in FLAGS if flag in _cpu_flags()],
        "cores": psutil.cpu_count(logical=False),
        "logical_cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": platform.platform(),
        "load": [round(x, 2) for x in psutil.getloadavg()],
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def versions() -> dict[str, str | None]:
    """Python and the packages that do the work."""
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


def commit() -> str | None:
    """The commit of this checkout, `+changes` if files differ from it; None outside one."""
    if _git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None  # an installed copy, whatever repository it may lie in
    head = _git("rev-parse", "HEAD")
    if head is None:
        return None
    others = (":/", ":(top,exclude)benchmarks/results")
    return head + ("+changes" if _git("status", "--porcelain", "--", *others) else "")


def command() -> str:
    """The command line as it was typed, but for the folders of interpreter and script."""
    main = getattr(sys.modules["__main__"], "__spec__", None)
    if main is not None and main.name.startswith("benchmarks."):
        return shlex.join(["python", "-m", main.name, *sys.argv[1:]])
    script = Path(sys.argv[0])
    if script.stem == "zotune" or (main is not None and main.name == "zotune.__main__"):
        return shlex.join(["zotune", *sys.argv[1:]])
    return shlex.join(["python", os.path.relpath(script), *sys.argv[1:]])


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _git(*words: str) -> str | None:
    try:
        found = subprocess.run(
            ["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
    except OSError:  # no git here
        return None
    return found.stdout.strip() if found.returncode == 0 else None


def _cpuinfo(key: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), "")


def _cpu_flags() -> set[str]:
    return set((_cpuinfo("flags") or _cpuinfo("Features")).split())
