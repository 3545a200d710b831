"""Whole runs on a small module: results, resume, replay, trouble."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from training import lab
from transformers import TrainerCallback

from zotune.errors import BadInput, JournalError, ZotuneError
from zotune.models import fingerprint
from zotune.training import replay, train
from zotune.training import snapshots as snapshots_module
from zotune.training.journal import Journal, JournalWriter
from zotune.training.objective import Objective


class Killed(BaseException):
    """Stands for a process that ends between two steps."""


def killed_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    real = JournalWriter.append

    def append(self: JournalWriter, coefficients: Any, loss: float) -> None:
        real(self, coefficients, loss)
        if self.count == steps:
            raise Killed

    monkeypatch.setattr(JournalWriter, "append", append)


@pytest.mark.parametrize("kind", lab.KINDS)
def test_a_run_leaves_everything(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "run"
    result = train(lab.config(out, kind, eval_steps=6), model=toys.small(), task=lab.task())
    saved = json.loads((out / "result.json").read_text())
    assert saved == result.as_dict()
    asked = "before after metric steps forwards train_seconds steps_per_second trainable out"
    for key in (*asked.split(), "peak_memory_bytes", "method", "space"):
        assert saved[key] is not None
    assert result.steps == result.applied == 12
    assert result.before != result.after
    names = {p.name for p in out.iterdir()}
    files = "README.md config.yaml journal.zoj metrics.jsonl model plot.png result.json snapshots"
    assert names == set(files.split())
    assert (out / "plot.png").read_bytes()[:4] == b"\x89PNG"
    assert {p.name for p in (out / "snapshots").iterdir()} == {
        "best.safetensors",
        "last.safetensors",
    }


@pytest.mark.parametrize("kind", lab.KINDS)
@pytest.mark.parametrize("stop", [1, 5, 8])
def test_resume_in_the_middle_is_bitwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, stop: int
) -> None:
    whole, broken = toys.small(), toys.small()
    one = train(lab.config(tmp_path / "a", kind, eval_steps=4), model=whole, task=lab.task())
    config = lab.config(tmp_path / "b", kind, eval_steps=4)
    with monkeypatch.context() as patch:
        killed_after(patch, stop)
        with pytest.raises(Killed):
            train(config, model=broken, task=lab.task())
    broken = toys.small()
    config = dataclasses.replace(config, resume_from_checkpoint=True)
    two = train(config, model=broken, task=lab.task())
    assert lab.states(whole) == lab.states(broken)
    assert (one.after, one.before, one.best, one.best_step) == (
        two.after, two.before, two.best, two.best_step,
    )  # fmt: skip
    assert one.forwards == two.forwards
    assert [r.coefficients for r in Journal.read(tmp_path / "a").records] == [
        r.coefficients for r in Journal.read(tmp_path / "b").records
    ]


def test_resume_without_snapshots_replays_from_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, again = toys.small(), toys.small()
    train(lab.config(tmp_path / "a"), model=whole, task=lab.task())
    with monkeypatch.context() as patch:
        killed_after(patch, 7)
        with pytest.raises(Killed):
            train(lab.config(tmp_path / "b"), model=toys.small(), task=lab.task())
    (tmp_path / "b/snapshots/last.safetensors").unlink()
    train(lab.config(tmp_path / "b", resume_from_checkpoint=True), model=again, task=lab.task())
    assert lab.states(whole) == lab.states(again)


@pytest.mark.parametrize("kind", lab.FORWARD)
def test_replay_gives_the_trained_model_bit_for_bit(tmp_path: Path, kind: str) -> None:
    trained, rebuilt = toys.small(), lab.base(kind)
    train(lab.config(tmp_path / "run", kind), model=trained, task=lab.task())
    found = replay(tmp_path / "run" / "journal.zoj", rebuilt)
    assert lab.states(trained) == lab.states(rebuilt)
    assert found["steps"] == 12


def test_replay_refuses_another_base(tmp_path: Path) -> None:
    train(lab.config(tmp_path / "run"), model=toys.small(), task=lab.task())
    with pytest.raises(JournalError, match="not the base model"):
        replay(tmp_path / "run", toys.small(seed=1))


def test_replay_refuses_backprop_and_says_why(tmp_path: Path) -> None:
    train(lab.config(tmp_path / "run", "adamw"), model=toys.small(), task=lab.task())
    with pytest.raises(JournalError, match="backprop"):
        replay(tmp_path / "run", toys.small())


def test_replay_of_an_unfinished_run_needs_repair(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        killed_after(patch, 7)
        with pytest.raises(Killed):
            train(lab.config(tmp_path / "run"), model=toys.small(), task=lab.task())
    with pytest.raises(JournalError, match="7 of 12 steps"):
        replay(tmp_path / "run", toys.small())
    assert replay(tmp_path / "run", toys.small(), repair=True)["steps"] == 7


def test_the_best_state_is_kept_and_replayed(tmp_path: Path) -> None:
    config = lab.config(tmp_path / "run", "mezo", eval_steps=2, learning_rate=0.5,
                        load_best_model_at_end=True)  # fmt: skip
    trained, rebuilt = toys.small(), toys.small()
    result = train(config, model=trained, task=lab.task())
    assert result.kept == result.best_step
    assert result.after == result.best
    assert replay(tmp_path / "run", rebuilt)["steps"] == result.best_step
    assert lab.states(trained) == lab.states(rebuilt)


def test_micro_batches_give_the_same_run(tmp_path: Path) -> None:
    a = train(lab.config(tmp_path / "a"), model=toys.small(), task=lab.task())
    b = train(lab.config(tmp_path / "b", micro_batch=3), model=toys.small(), task=lab.task())
    assert a.after == pytest.approx(b.after, rel=1e-4)
    assert a.forwards == b.forwards


class Breaking(TrainerCallback):
    """An objective whose loss is infinite in some steps of training, and only there."""

    def __init__(self, steps: set[int]) -> None:
        self.steps, self.now = steps, -1

    def on_step_begin(self, args: Any, state: Any, control: Any, **values: Any) -> None:
        self.now = state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **values: Any) -> None:
        self.now = -1

    def losses(self, model: Any, batch: Any) -> Any:
        loss, weight = toys.cross_entropy(model, batch)
        return (loss * math.inf if self.now in self.steps else loss), weight


@pytest.mark.parametrize("kind", ["mezo", "example", "qzo", "rebuilt"])
def test_a_non_finite_loss_is_skipped_and_journalled(tmp_path: Path, kind: str) -> None:
    breaking = Breaking({3, 4})
    task = Objective(breaking.losses, lab.rows(), lab.rows(12))
    trained = toys.small()
    result = train(
        lab.config(tmp_path / "run", kind), model=trained, task=task, callbacks=[breaking]
    )
    assert (result.steps, result.applied) == (12, 10)
    records = Journal.read(tmp_path / "run").records
    assert [i for i, r in enumerate(records) if not math.isfinite(r.loss)] == [3, 4]
    found = replay(tmp_path / "run", lab.base(kind))
    assert found["applied"] == 10
    assert found["tuned_fingerprint"] == fingerprint(trained)


def test_an_infinite_metric_is_null_in_json(tmp_path: Path) -> None:
    def score(model: Any, batch: Any) -> torch.Tensor:
        return torch.full((batch.size,), math.inf)

    result = train(lab.config(tmp_path / "run"), model=toys.small(), task=lab.task(score=score))
    assert math.isinf(result.after)
    assert json.loads((tmp_path / "run/result.json").read_text())["after"] is None
    for file in ("result.json", "metrics.jsonl"):
        assert "Infinity" not in (tmp_path / "run" / file).read_text()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("kind", ["mezo", "example", "qzo", "adamw"])
def test_many_bad_losses_stop_the_run_with_advice(tmp_path: Path, kind: str, value: float) -> None:
    task = Objective(lab.broken_after(16, value), lab.rows(), lab.rows(12))
    config = lab.config(tmp_path / "run", kind, max_bad_steps=3, max_steps=60)
    model = toys.small()
    with pytest.raises(ZotuneError, match="lower learning_rate"):
        train(config, model=model, task=task)
    assert all(torch.isfinite(t).all() for t in toys.tensors_of(model).values())


def test_a_failing_objective_loses_nothing(tmp_path: Path) -> None:
    def losses(model: Any, batch: Any, calls: dict[str, int] = {"n": 0}) -> Any:  # noqa: B006
        calls["n"] += 1
        if calls["n"] == 14:
            raise ValueError("mine")
        return toys.cross_entropy(model, batch)

    whole, again = toys.small(), toys.small()
    train(lab.config(tmp_path / "a"), model=whole, task=lab.task())
    with pytest.raises(ValueError, match="mine"):
        train(lab.config(tmp_path / "b"), model=toys.small(),
              task=Objective(losses, lab.rows(), lab.rows(12)))  # fmt: skip
    train(lab.config(tmp_path / "b", resume_from_checkpoint=True), model=again, task=lab.task())
    assert lab.states(whole) == lab.states(again)


def test_a_full_folder_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(BadInput, match="not empty"):
        train(lab.config(tmp_path), model=toys.small(), task=lab.task())
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    train(lab.config(tmp_path, overwrite_output_dir=True), model=toys.small(), task=lab.task())
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_resume_of_another_run_is_refused(tmp_path: Path) -> None:
    train(lab.config(tmp_path / "run"), model=toys.small(), task=lab.task())
    again = {"model": toys.small(), "task": lab.task()}
    with pytest.raises(JournalError, match=r"seed=1 \(was 0\)"):
        train(lab.config(tmp_path / "run", seed=1, resume_from_checkpoint=True), **again)
    with pytest.raises(JournalError, match="not the base model"):
        train(lab.config(tmp_path / "run", resume_from_checkpoint=True),
              model=toys.small(seed=3), task=lab.task())  # fmt: skip
    fewer = Objective(toys.cross_entropy, lab.rows(39), lab.rows(12))
    with pytest.raises(JournalError, match="other training examples"):
        train(
            lab.config(tmp_path / "run", resume_from_checkpoint=True),
            model=toys.small(),
            task=fewer,
        )


def test_resume_of_a_run_that_never_began_starts_it(tmp_path: Path) -> None:
    config = lab.config(tmp_path / "run", resume_from_checkpoint=True)
    assert train(config, model=toys.small(), task=lab.task()).steps == 12
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x").touch()
    with pytest.raises(BadInput, match="other files"):
        train(lab.config(tmp_path / "other", resume_from_checkpoint=True),
              model=toys.small(), task=lab.task())  # fmt: skip


def test_resume_of_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    one = train(lab.config(tmp_path / "run"), model=toys.small(), task=lab.task())
    before = (tmp_path / "run/journal.zoj").read_bytes()
    two = train(lab.config(tmp_path / "run", resume_from_checkpoint=True), model=toys.small(),
                task=lab.task())  # fmt: skip
    assert one.after == two.after
    assert (tmp_path / "run/journal.zoj").read_bytes() == before


def test_a_flipped_byte_stops_resume_and_repair_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = toys.small()
    train(lab.config(tmp_path / "a"), model=whole, task=lab.task())
    train(lab.config(tmp_path / "b"), model=toys.small(), task=lab.task())
    path = tmp_path / "b/journal.zoj"
    data = bytearray(path.read_bytes())
    data[-16 * 9] ^= 1  # 12 records and the end mark: inside step 4
    path.write_bytes(data)
    config = lab.config(tmp_path / "b", resume_from_checkpoint=True)
    with pytest.raises(JournalError, match="first 4 steps are good"):
        train(config, model=toys.small(), task=lab.task())
    again = toys.small()
    train(config, model=again, task=lab.task(), repair=True)
    assert lab.states(whole) == lab.states(again)


@pytest.mark.parametrize("where", ["snapshot", "model"])
def test_a_full_disk_keeps_the_old_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    train(lab.config(tmp_path / "run"), model=toys.small(), task=lab.task())
    old = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    config = lab.config(tmp_path / "run", resume_from_checkpoint=True)
    with monkeypatch.context() as patch:
        if where == "snapshot":
            patch.setattr(snapshots_module.os, "fsync", full)
        else:
            patch.setattr("safetensors.torch.save_model", full)
        with pytest.raises(ZotuneError, match="No space left on device"):
            train(config, model=toys.small(), task=lab.task())
    for path, data in old.items():
        assert path.read_bytes()[: len(data) - 16] == data[: len(data) - 16]
    assert not list(tmp_path.rglob("*.new*"))
    assert train(config, model=toys.small(), task=lab.task()).steps == 12


def test_blocks_that_no_forward_uses_are_dropped_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = toys.small()
    model.add_module("spare", torch.nn.Linear(3, 3))
    with caplog.at_level(logging.WARNING, "zotune"):
        logging.getLogger("zotune").propagate = True
        result = train(lab.config(tmp_path / "run"), model=model, task=lab.task())
    assert "2 blocks are not used" in caplog.text
    assert result.trainable == sum(
        p.numel() for n, p in model.named_parameters() if "spare" not in n
    )


def test_no_global_random_state_is_touched(tmp_path: Path) -> None:
    import numpy as np

    model, task = toys.small(), lab.task()
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    train(lab.config(tmp_path / "run", "example"), model=model, task=task)
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()  # noqa: NPY002


def test_a_foreign_draw_changes_nothing(tmp_path: Path) -> None:
    one, two = toys.small(), toys.small()
    train(lab.config(tmp_path / "a"), model=one, task=lab.task())
    torch.rand(7)
    train(lab.config(tmp_path / "b"), model=two, task=lab.task())
    assert lab.states(one) == lab.states(two)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_between_two_steps(tmp_path: Path, number: int) -> None:
    calls = {"n": 0}

    def losses(model: Any, batch: Any) -> Any:
        calls["n"] += 1
        if calls["n"] == 14:
            os.kill(os.getpid(), number)
        return toys.cross_entropy(model, batch)

    whole, again, before = toys.small(), toys.small(), signal.getsignal(number)
    train(lab.config(tmp_path / "a"), model=whole, task=lab.task())
    task = Objective(losses, lab.rows(), lab.rows(12))
    with pytest.raises(KeyboardInterrupt):
        train(lab.config(tmp_path / "b"), model=toys.small(), task=task)
    assert signal.getsignal(number) is before
    done = len(Journal.read(tmp_path / "b").records)
    assert 0 < done < 12
    snapshot = snapshots_module.load(tmp_path / "b", "last")
    assert snapshot is not None
    assert snapshot[1].done == done
    train(lab.config(tmp_path / "b", resume_from_checkpoint=True), model=again, task=lab.task())
    assert lab.states(whole) == lab.states(again)


def test_a_run_folder_is_not_shared_by_two_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        killed_after(patch, 3)
        with pytest.raises(Killed):
            train(lab.config(tmp_path / "run"), model=toys.small(), task=lab.task())
    other = JournalWriter.reopen(Journal.read(tmp_path / "run"))
    config = lab.config(tmp_path / "run", resume_from_checkpoint=True)
    with pytest.raises(JournalError, match="another process"):
        train(config, model=toys.small(), task=lab.task())
    other.close()
    assert train(config, model=toys.small(), task=lab.task()).steps == 12
