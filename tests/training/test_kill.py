"""kill -9 at twenty instants, resumed each time: the same weights, bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("killed.py")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("kind", ["rebuilt", "example", "streamed"])
def test_a_run_killed_twenty_times_ends_bitwise_equal(tmp_path: Path, kind: str) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path), kind],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1].startswith("same"), done.stdout + done.stderr[-2000:]
