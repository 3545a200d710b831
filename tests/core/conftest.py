"""Triton's kernels in place of the CPU's: on a GPU where there is one, else interpreted."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def triton_device(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """The device whose blocks Triton's kernels work on: a GPU, else the CPU by the interpreter."""
    pytest.importorskip("triton", reason="triton is not installed")
    from zotune.core import noise, sites, sweep
    from zotune.quant import kernels

    if torch.cuda.is_available():
        return torch.device("cuda")
    for module in (noise, sites, sweep, kernels):
        monkeypatch.setattr(module, "has_triton", lambda device: True)
    return torch.device("cpu")
