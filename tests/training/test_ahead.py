"""The next batch is read while a step runs. Run: pytest tests/training/test_ahead.py"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from training import lab

from zotune.errors import DataError
from zotune.tasks.batch import Batch
from zotune.training import ahead, train
from zotune.training.ahead import Ahead
from zotune.training.batches import AbstractBatches, Batches, PoissonBatches
from zotune.training.objective import Objective


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith(ahead.NAME)]


class Watched(Objective):
    """Notes on which thread each example is encoded, and fails at one of them."""

    def __init__(self, bad: int | None = None) -> None:
        super().__init__(toys.cross_entropy, lab.rows(), lab.rows(12))
        self.bad, self.seen = bad, list[str]()
        self.busy = threading.Event()

    def collate(self, features: Any) -> Batch:
        self.seen.append(threading.current_thread().name)
        if len(self.seen) == self.bad:
            raise DataError("this batch cannot be made")
        return super().collate(features)


@pytest.mark.parametrize("kind", ["mezo", "svrg", "adamw", "example"])
def test_a_run_is_bit_for_bit_the_one_without(kind: str, tmp_path: Path) -> None:
    found = []
    for workers in (0, 1):
        model = lab.base(kind)
        config = lab.config(tmp_path / str(workers), kind, dataloader_num_workers=workers)
        result = train(config, model=model, task=lab.task())
        found.append((lab.states(model), result.after, result.forwards))
    assert found[0] == found[1]
    assert threads() == []


def test_batches_and_their_order_are_the_same() -> None:
    batches = Batches(lab.task(), lab.rows(), 4, seed=3)
    with Ahead(1) as ahead:
        for step in range(9):
            batch = ahead.batch(batches, step)
            assert isinstance(batch, Batch)
            for name, tensor in batches.whole(step).tensors.items():
                assert torch.equal(batch[name], tensor)
            with ahead.reading(batches, step + 1):
                pass
    assert threads() == []


def test_every_batch_but_the_first_is_made_on_the_other_thread(tmp_path: Path) -> None:
    task = Watched()
    train(lab.config(tmp_path, max_steps=5), model=lab.base("mezo"), task=task)
    others = [name for name in task.seen if name.startswith("zotune")]
    assert len(others) == 4
    plain = Watched()
    config = lab.config(tmp_path / "plain", max_steps=5, dataloader_num_workers=0)
    train(config, model=lab.base("mezo"), task=plain)
    assert not [name for name in plain.seen if name.startswith("zotune")]


def test_what_goes_wrong_is_raised_in_the_step_it_belongs_to() -> None:
    task = Watched(bad=3)
    batches = Batches(task, lab.rows(), 4, seed=0)
    with Ahead(1) as ahead:
        for step in range(2):
            ahead.batch(batches, step)
            with ahead.reading(batches, step + 1):
                pass  # step 2 fails meanwhile, and says nothing yet
        with pytest.raises(DataError, match="cannot be made"):
            ahead.batch(batches, 2)
        assert isinstance(ahead.batch(batches, 2), Batch)
    assert threads() == []


def test_a_failed_run_leaves_no_thread_and_the_steps_before_it(tmp_path: Path) -> None:
    calls = Watched()
    train(lab.config(tmp_path / "whole", max_steps=4), model=lab.base("mezo"), task=calls)
    before = len(calls.seen) - 4  # what is made around the steps
    with pytest.raises(DataError, match="cannot be made"):
        train(lab.config(tmp_path / "cut", max_steps=4), model=lab.base("mezo"),
              task=Watched(bad=before + 3))  # fmt: skip
    assert threads() == []


def test_batches_of_another_source_or_step_are_made_anew() -> None:
    first, second = (Batches(lab.task(), lab.rows(), 4, seed=seed) for seed in (0, 1))
    with Ahead(1) as ahead:
        with ahead.reading(first, 1):
            pass
        found = ahead.batch(second, 1)
        assert isinstance(found, Batch)
        assert torch.equal(found["input_ids"], second.whole(1)["input_ids"])
        with ahead.reading(first, 1):
            pass
        found = ahead.batch(first, 2)
        assert isinstance(found, Batch)
        assert torch.equal(found["input_ids"], first.whole(2)["input_ids"])


def test_secret_and_cached_batches_are_made_in_their_step() -> None:
    class Counted(AbstractBatches):
        made = 0

        def __getitem__(self, step: int) -> Batch:
            self.made += 1
            return toys.batch(2)

    private = PoissonBatches(lab.task(), lab.rows(), 4)
    counted = Counted(lab.task(), lab.rows(), 4)
    with Ahead(1) as ahead:
        for batches in (private, counted):
            with ahead.reading(batches, 1):
                assert threads() == []
        ahead.batch(counted, 1)
    assert counted.made == 1
