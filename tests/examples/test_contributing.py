"""CONTRIBUTING.md's method in one file: put in its place, it is found, trains and is replayed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import zotune
from zotune import methods
from zotune.training import Objective, TrainConfig

ROOT = Path(__file__).parents[2]


def block() -> tuple[str, str]:
    """Name and text of the page's module."""
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (found,) = re.findall(r"```python\n# zotune/methods/(\w+\.py)\n(.*?)```", page, re.DOTALL)
    return found[0], found[1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    name, text = block()
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods" / name).write_text(text, encoding="utf-8")
    return tmp_path


@pytest.fixture
def known(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The registry with the page's file in its folder, and without it afterwards."""
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(folder / "methods")])
    yield
    methods._ENTRIES.pop("zo-momentum", None)
    sys.modules.pop("zotune.methods.zo_momentum", None)


def test_it_is_about_forty_lines_of_code() -> None:
    _, text = block()
    assert len(text.splitlines()) <= 80


@pytest.mark.usefixtures("known")
def test_the_registry_and_the_command_line_find_it() -> None:
    from zotune.cli.listing import LISTS

    assert "zo-momentum" in [row["name"] for row in LISTS["methods"]()]
    method = methods.parse("zo-momentum(b1=0.5)")
    assert isinstance(method, methods.Method)
    assert method.rule.window == 7


def options(out: Path, **changes: object) -> TrainConfig:
    values = {
        "method": "zo-momentum(lr=0.05, units='absolute')", "space": "weights", "max_steps": 60,
        "per_device_train_batch_size": 4, "report_to": "none", "show_progress": False,
    }  # fmt: skip
    return TrainConfig(**{**values, "output_dir": str(out), **changes})  # type: ignore[arg-type]


def task() -> Objective:
    generator = torch.Generator().manual_seed(0)
    rows = [{"x": torch.randn(3, generator=generator)} for _ in range(8)]
    return Objective(lambda m, b: (m(b["x"]) - b["x"].sum(1, keepdim=True)).square().mean(1), rows)


def line() -> nn.Module:
    layer = nn.Linear(3, 1).requires_grad_(False)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


@pytest.mark.usefixtures("known")
def test_it_trains(tmp_path: Path) -> None:
    result = zotune.train(options(tmp_path / "run"), model=line(), task=task())
    assert result.before is not None
    assert result.after < 0.9 * result.before


def run_matrix(folder: Path, chosen: str) -> str:
    """The test matrix in a process whose registry holds the page's file."""
    plugin = "import zotune.methods\nzotune.methods.__path__.append({!r})\n"
    (folder / "contributed.py").write_text(plugin.format(str(folder / "methods")))
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "contributed", "-p", "no:cacheprovider", "-p",
         "no:xdist", "tests/methods/test_matrix.py", "-k", f"zo-momentum and {chosen}"],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-2000:]
    return found.stdout


def test_it_passes_the_matrix(folder: Path) -> None:
    said = run_matrix(folder, "not rebuilt_from_its_repr")
    passed = re.search(r"(\d+) passed", said)
    assert passed is not None
    assert int(passed[1]) >= 20, said


def test_its_record_is_rebuilt_from_its_repr(folder: Path) -> None:
    assert "1 passed" in run_matrix(folder, "rebuilt_from_its_repr")
