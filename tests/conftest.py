"""One thread for every test, and this folder on the path, so that tests share `toys.py`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():  # read when Triton is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")
sys.path.insert(0, str(Path(__file__).parent))
settings.register_profile("zotune", deadline=None, derandomize=True, max_examples=30)
settings.load_profile("zotune")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def triton_device(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Where Triton's kernels replace the CPU's: a GPU, else the CPU by the interpreter."""
    pytest.importorskip("triton", reason="triton is not installed")
    from zotune.core import evaluator, noise, sites, sweep
    from zotune.quant import kernels

    if torch.cuda.is_available():
        return torch.device("cuda")
    for module in (evaluator, noise, sites, sweep, kernels):
        monkeypatch.setattr(module, "has_triton", lambda device: True)
    return torch.device("cpu")
