"""Peak memory, of this process only. Run: pytest tests/training/test_memory.py"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from zotune.training import memory

SIZE = 200 << 20  # bytes, far more than what a process allocates by the way
LINUX = pytest.mark.skipif(
    not Path("/proc/self/status").exists() or memory._high_water_mark() is None,
    reason="needs VmHWM in /proc/self/status",
)


def resident() -> int:
    return int(psutil.Process().memory_info().rss)


def can_reset() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


@LINUX
def test_the_peak_remembers_what_was_freed_and_forgets_it_when_reset() -> None:
    torch.ones(SIZE, dtype=torch.uint8)
    high = memory.peak_bytes()
    assert high >= SIZE
    assert high >= resident() - (8 << 20)  # the kernel counts pages in batches
    if can_reset():
        memory.reset_peak("cpu")
        assert memory.peak_bytes() < high - SIZE // 2


@LINUX
def test_a_child_does_not_inherit_the_peak_of_its_parent() -> None:
    code = "from zotune.training.memory import peak_bytes; print(peak_bytes())"
    held = torch.ones(3 * SIZE, dtype=torch.uint8)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0 < int(run.stdout) < held.numel()


def test_without_the_kernels_mark_the_peak_is_that_of_the_whole_life(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = resident()
    monkeypatch.setattr(memory, "_PROCESS", tmp_path / "nowhere")
    memory.reset_peak("cpu")
    assert memory.peak_bytes() >= before // 2
    monkeypatch.setattr(memory, "_PROCESS", tmp_path)
    (tmp_path / "status").write_text("Name:\tpython\n", encoding="utf-8")
    assert memory.peak_bytes() >= before // 2
    (tmp_path / "status").write_text("Name:\tpython\nVmHWM:\t  123 kB\n", encoding="utf-8")
    assert memory.peak_bytes() == 123 * 1024
