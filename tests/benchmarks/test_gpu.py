"""The GPU's benchmark: nothing is written without one, and its code runs where Triton does."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from zotune.core import evaluator
from zotune.quant import kernels


def test_without_cuda_it_ends_with_a_line_and_no_file(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is CUDA")
    gpu = import_module("benchmarks.gpu")
    with pytest.raises(SystemExit, match="no CUDA GPU; nothing was measured or written"):
        gpu.main(["--threads", "1", "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_tiny_shapes_go_through_the_kernels_and_write_nothing(
    triton_device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = import_module("benchmarks.gpu")

    def stand_in(work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        out = work()
        return lambda: [a.copy_(b) for a, b in zip(out, work(), strict=True)] and None, out

    if triton_device.type == "cpu":
        monkeypatch.setattr(evaluator, "Cuda", lambda: stand_in)
    small = ["--tiny", "--length", "4", "--rounds", "1", "--calls", "1", "--warmup", "3"]
    given = gpu.options([*small, "--threads", "1", "--out", str(tmp_path)])
    monkeypatch.setattr(gpu, "interleave", lambda works, **_: gpu.Rounds({n: [1.0] for n in works}))
    with kernels.force("triton"):
        found = gpu.measure(given)
    assert found.difference is not None
    assert found.difference < 0.2
    assert found.facts["recorded"]["forwards"] == 3
    assert found.facts["recorded"]["forwards_off"] is None
    rows = {row.name: row for row in found.rows(given)}
    assert rows["qzo int4 / plain forwards"].value == 1.0
    assert gpu.RECORDED in found.failures or torch.cuda.is_available()
    assert not list(tmp_path.iterdir())
