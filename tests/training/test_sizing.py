"""`--micro-batch auto`: sizes from free memory. Run: pytest tests/training/test_sizing.py"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import toys
from training import lab

from zotune.errors import BadInput
from zotune.tasks.batch import Batch
from zotune.training import sizing, train
from zotune.training.assemble import assemble
from zotune.training.config import TrainConfig
from zotune.training.journal import Journal
from zotune.training.objective import Objective
from zotune.training.resume import resume

AMPLE = 1 << 32


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets how many bytes there seem to be."""

    def given(count: int) -> None:
        monkeypatch.setattr(sizing, "free_bytes", lambda device: count)

    return given


class Seen(Objective):
    """Notes how many tokens every forward sees."""

    def __init__(self, **options: Any) -> None:
        super().__init__(self._losses, lab.rows(), lab.rows(12), **options)
        self.sizes: list[int] = []

    def _losses(self, model: Any, batch: Batch) -> Any:
        self.sizes.append(batch["input_ids"].numel())
        return toys.cross_entropy(model, batch)


def test_auto_sizes_the_forward_and_not_the_batch() -> None:
    config = TrainConfig(output_dir="x", per_device_train_batch_size="auto")
    assert (config.examples, config.micro_batch, config.together) == (16, "auto", None)
    given = TrainConfig(output_dir="x", per_device_train_batch_size="auto", micro_batch=4)
    assert (given.examples, given.together) == (16, 4)
    for wrong in ({"micro_batch": "all"}, {"stack": "auto"}, {"dataloader_num_workers": 2}):
        with pytest.raises(BadInput, match=next(iter(wrong))):
            TrainConfig(output_dir="x", **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["mezo", "example", "qzo", "adamw", "svrg"])
def test_little_memory_changes_sizes_and_no_loss(
    kind: str, free: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "zotune")
    found = {}
    for count in (AMPLE, 1):
        free(count)
        task = Seen()
        config = lab.config(
            tmp_path / str(count), kind, micro_batch="auto", max_steps=2,
            per_device_train_batch_size=8, scheme=None,
        )  # fmt: skip
        result = train(config, model=lab.base(kind), task=task)
        rows = [r for r in caplog.records if "micro_batch=auto" in r.getMessage()]
        assert len(rows) == 1
        caplog.clear()
        found[count] = result, task.sizes
        room = Journal.read(tmp_path / str(count)).header["room"]
        whole = 8 * toys.LENGTH
        assert room == toys.LENGTH if count == 1 else room >= whole
    (ample, large), (short, small) = found[AMPLE], found[1]
    assert short.after == pytest.approx(ample.after, rel=1e-4)
    # The last forwards before the evaluation are a step's: one example of one probe each.
    steps = [n for n in small if n == toys.LENGTH]
    assert len(steps) > len([n for n in large if n == toys.LENGTH])


def test_an_objective_of_whole_batches_keeps_one_piece(
    free: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "zotune")
    free(1)

    config = lab.config(tmp_path, micro_batch="auto")
    bench = assemble(config, model=lab.base("mezo"), task=Whole())
    assert bench.evaluator.room is None
    assert "as a whole" in caplog.text


class Whole(Objective):
    per_example = False

    def __init__(self) -> None:
        super().__init__(toys.cross_entropy, lab.rows(), lab.rows(12))

    def losses(self, model: Any, batch: Batch) -> Any:
        loss, weight = toys.cross_entropy(model, batch)
        return loss.mean().view(1), weight[:1]


def test_a_resumed_run_goes_on_with_the_size_it_had(free: Any, tmp_path: Path) -> None:
    free(1)
    config = lab.config(tmp_path, micro_batch="auto", max_steps=4)
    train(config, model=lab.base("mezo"), task=lab.task())
    free(AMPLE)
    bench, _, _ = resume(replace(config, resume_from_checkpoint=True), lab.base("mezo"), lab.task())
    assert bench.evaluator.room == toys.LENGTH


def test_private_runs_say_themselves_how_many_share_a_forward(tmp_path: Path) -> None:
    for options in ({"micro_batch": "auto"}, {"micro_batch_tokens": 9}, {"group_by_length": True}):
        with pytest.raises(BadInput, match="private run says"):
            train(lab.config(tmp_path, method="dp-zo", space="weights", **options),
                  model=lab.base("mezo"), task=lab.task())  # fmt: skip
