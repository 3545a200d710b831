"""What is measured in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil


def resident() -> int:
    """Bytes of this process that are in memory now."""
    return int(psutil.Process().memory_info().rss)


def measured_apart(
    module: str, words: Sequence[str], timeout: float, folder: Path | None = None
) -> Any:
    """Run `python -m <module> <words>` (in `folder`) and read the JSON of its last line.

    Raises:
        RuntimeError: if it fails; the message is the end of what it said.
    """
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}  # this zotune
    try:
        found = subprocess.run(
            [sys.executable, "-m", module, *words], env=environment,
            cwd=folder, capture_output=True, text=True, timeout=timeout, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{module}: not done after {timeout:.0f} s") from error
    if found.returncode:
        said = found.stderr.strip().splitlines()[-3:]
        raise RuntimeError(f"{module} {' '.join(words)}: " + " ".join(said))
    return json.loads(found.stdout.strip().splitlines()[-1])
