"""Imports go downward only; told from the source, without running it.

Run: pytest tests/test_floors.py
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "zotune"
# From the top floor to the ground.
FLOORS = ["cli", "bench", "attacks", "training", "methods", "core", "tasks", "models", "quant",
          "allocator", "errors"]  # fmt: skip
OUTSIDE = {"__init__", "__main__"}  # the face and the entry point stand before the house
MODULES = sorted(p for p in ROOT.rglob("*.py"))


def floor_of(path: Path) -> str:
    first = path.relative_to(ROOT).parts[0]
    return first.removesuffix(".py")


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """(line, floor) of every import of a part of zotune, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:  # relative: from . import x
                package = [ROOT.name, *path.relative_to(ROOT).parts[:-1]]
                base = package[: len(package) - node.level + 1]
                module = ".".join([*base, *filter(None, [node.module])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == ROOT.name and len(parts) > 1 and parts[1] in FLOORS:
                yield node.lineno, parts[1]  # type: ignore[attr-defined]


def test_every_part_of_the_house_stands_on_a_floor() -> None:
    assert {floor_of(p) for p in MODULES} - OUTSIDE <= set(FLOORS)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_downward_only(path: Path) -> None:
    here = floor_of(path)
    if here in OUTSIDE:
        return
    upward = [
        f"{path.relative_to(ROOT)}:{line} imports zotune.{floor}"
        for line, floor in imported(path)
        if FLOORS.index(floor) < FLOORS.index(here)
    ]
    assert not upward, "; ".join(upward)


def test_a_step_upward_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each way to write an import is understood, or the tests above would see nothing."""
    root = tmp_path / "zotune"
    (root / "core" / "spaces").mkdir(parents=True)
    path = root / "core" / "spaces" / "x.py"
    path.write_text(
        "import zotune.cli\nfrom zotune import methods\nfrom zotune.training.loop import train\n"
        "from ...cli import main\ndef f():\n    from .. import noise\n    from ... import tasks\n"
        "import torch\nfrom zotune import __version__\n"
    )
    monkeypatch.setitem(globals(), "ROOT", root)
    found = [floor for _, floor in imported(path)]
    assert sorted(found) == sorted(["cli", "methods", "training", "cli", "core", "tasks"])
