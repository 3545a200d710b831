"""transformers' callbacks on our loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import toys
from training import lab
from transformers import EarlyStoppingCallback, TrainerCallback

from zotune.errors import BadInput
from zotune.training import train

EVENTS = ("on_init_end", "on_train_begin", "on_step_begin", "on_step_end", "on_log", "on_evaluate",
          "on_save", "on_train_end")  # fmt: skip


class Spy(TrainerCallback):
    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []
        self.logs: list[dict[str, float]] = []
        self.metrics: list[dict[str, float]] = []


def _note(event: str) -> Any:
    def call(self: Spy, args: Any, state: Any, control: Any, **values: Any) -> None:
        self.seen.append((event, state.global_step))
        self.logs += [values["logs"]] if event == "on_log" else []
        self.metrics += [values["metrics"]] if event == "on_evaluate" else []

    return call


for event in EVENTS:
    setattr(Spy, event, _note(event))


def test_events_come_in_transformers_order(tmp_path: Path) -> None:
    spy = Spy()
    config = lab.config(tmp_path / "run", max_steps=4, eval_steps=2, save_steps=3, logging_steps=2)
    train(config, model=toys.small(), task=lab.task(), callbacks=[spy])
    assert spy.seen == [
        ("on_init_end", 0), ("on_train_begin", 0),
        ("on_step_begin", 0), ("on_step_end", 1),
        ("on_step_begin", 1), ("on_step_end", 2), ("on_log", 2), ("on_evaluate", 2), ("on_log", 2),
        ("on_step_begin", 2), ("on_step_end", 3), ("on_save", 3),
        ("on_step_begin", 3), ("on_step_end", 4), ("on_log", 4), ("on_evaluate", 4), ("on_log", 4),
        ("on_save", 4), ("on_train_end", 4),
    ]  # fmt: skip
    assert {"loss", "learning_rate"} <= set(spy.logs[0])
    assert set(spy.metrics[0]) == {"eval_loss"}


class Stop(TrainerCallback):
    """Made by its dotted path."""

    def on_step_end(self, args: Any, state: Any, control: Any, **values: Any) -> None:
        control.should_training_stop = state.global_step >= 3


def test_a_callback_may_stop_training(tmp_path: Path) -> None:
    result = train(
        lab.config(tmp_path / "run"), model=toys.small(), task=lab.task(), callbacks=[Stop]
    )
    assert (result.steps, result.kept) == (3, 3)


def test_callbacks_by_dotted_path(tmp_path: Path) -> None:
    config = lab.config(tmp_path / "run", callbacks=["training.test_callbacks.Stop"])
    assert train(config, model=toys.small(), task=lab.task()).steps == 3
    config = lab.config(tmp_path / "other", callbacks=["training.test_callbacks.Stopp"])
    with pytest.raises(BadInput, match="Stopp"):
        train(config, model=toys.small(), task=lab.task())


def test_transformers_early_stopping_works(tmp_path: Path) -> None:
    config = lab.config(tmp_path / "run", max_steps=40, eval_steps=2, learning_rate=1e-9,
                        load_best_model_at_end=True)  # fmt: skip
    callback = EarlyStoppingCallback(early_stopping_patience=2, early_stopping_threshold=0.1)
    result = train(config, model=toys.small(), task=lab.task(), callbacks=[callback])
    assert result.steps == 6


def test_tensorboard_and_unknown_trackers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    config = lab.config(tmp_path / "run", report_to="tensorboard")
    train(config, model=toys.small(), task=lab.task())
    assert list((tmp_path / "run").rglob("events.out.tfevents*"))
    with pytest.raises(BadInput, match="tensorbord"):
        train(
            lab.config(tmp_path / "b", report_to="tensorbord"), model=toys.small(), task=lab.task()
        )
