"""Every Triton kernel compiles for GPUs, whether or not there is one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")
TESTS = Path(__file__).parents[1]
SHARED = {80: 163 * 1024, 90: 227 * 1024}  # bytes that one program may have
SPILLED = 32  # bytes a thread may keep in memory for want of registers


@pytest.mark.parametrize(
    ("arch", "names"), [(90, []), (80, ["dense, most rows", "product, drawn"])]
)
def test_kernels_compile_for_gpus_without_spilling(arch: int, names: list[str]) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(TESTS.parent)
    made = subprocess.run(
        [sys.executable, str(TESTS / "compiled.py"), str(arch), *names],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr[-2000:]
    for name, taken in json.loads(made.stdout.splitlines()[-1]).items():
        assert taken["stack"] <= SPILLED, (name, taken)
        assert taken["shared"] <= SHARED[arch], (name, taken)
        assert taken["fused"] == 0, f"{name}: numbers are not the reference's"
