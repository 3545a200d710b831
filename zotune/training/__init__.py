"""Training: the loop, its journal, resume and replay, callbacks, reports."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zotune.training.config import TrainConfig
    from zotune.training.evaluation import evaluate
    from zotune.training.folders import load_model, write_model
    from zotune.training.journal import Journal
    from zotune.training.loop import train
    from zotune.training.objective import Objective
    from zotune.training.rebuild import replay
    from zotune.training.report import Result
    from zotune.training.settings import EvalConfig

_WHERE = {
    "EvalConfig": "settings",
    "Journal": "journal",
    "Objective": "objective",
    "Result": "report",
    "TrainConfig": "config",
    "evaluate": "evaluation",
    "load_model": "folders",
    "replay": "rebuild",
    "train": "loop",
    "write_model": "folders",
}

__all__ = [
    "EvalConfig",
    "Journal",
    "Objective",
    "Result",
    "TrainConfig",
    "evaluate",
    "load_model",
    "replay",
    "train",
    "write_model",
]


def __getattr__(name: str) -> Any:
    """Parts come when they are asked for: the command line reads `config` without torch."""
    if name in _WHERE:
        value = getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
