"""The examples run, learn, and their configurations are read by the command line's own parser."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from runpy import run_path
from typing import Any

import pytest

from zotune import methods, tasks
from zotune.cli.commands import COMMANDS
from zotune.cli.flags import build_parser, normalise
from zotune.core import spaces
from zotune.core.calls import split_calls

FOLDER = Path(__file__).parents[2] / "examples"
YAML = {path.name: path for path in sorted(FOLDER.glob("*.yaml"))}
EVALUATED = {"perplexity.yaml"}


def main_of(name: str) -> Callable[..., tuple[float, float]]:
    main: Callable[..., tuple[float, float]] = run_path(str(FOLDER / name))["main"]
    return main


@pytest.mark.parametrize(
    ("name", "steps", "gain"),
    [("python_api.py", 120, 0.2), ("ask_tell.py", 150, -0.1), ("score_function.py", 60, 0.4)],
)
def test_a_python_example_runs_and_learns(name: str, steps: int, gain: float) -> None:
    """gain: how far the number rises, or falls if negative, in a part of the example's steps."""
    before, after = main_of(name)(steps)
    assert after > before + gain if gain > 0 else after < before + gain


def test_every_python_example_is_tested() -> None:
    assert {p.name for p in FOLDER.glob("*.py")} == {
        "python_api.py", "ask_tell.py", "score_function.py"
    }  # fmt: skip


def parsed(name: str) -> Any:
    command = "eval" if name in EVALUATED else "train"
    words = normalise([command, "--config", str(YAML[name])], COMMANDS)
    return build_parser(COMMANDS).parse_args(words)[command]


@pytest.mark.parametrize("name", YAML)
def test_a_configuration_is_read_by_the_command_line(name: str) -> None:
    values = vars(parsed(name))
    _, config, _ = COMMANDS["eval" if name in EVALUATED else "train"]
    record = config(**{k: values[k] for k in config.__dataclass_fields__})
    assert record.model_name_or_path
    task, _ = split_calls(record.task)[0]
    known = tasks.entry(task).options
    assert set(record.task_options) <= set(known)


@pytest.mark.parametrize("name", [n for n in YAML if n not in EVALUATED])
def test_its_method_and_space_exist(name: str) -> None:
    from zotune.training.opening import open_method, open_space

    values = vars(parsed(name))
    _, config, _ = COMMANDS["train"]
    record = config(**{k: values[k] for k in config.__dataclass_fields__})
    method = open_method(record)
    assert isinstance(method, methods.AnyMethod)
    assert method.lr == record.learning_rate
    assert isinstance(open_space(record), spaces.SpaceSpec)
