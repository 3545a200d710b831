"""The table of adapting a ResNet, and the ResNet itself where its data lies.

Run: pytest tests/benchmarks/test_vision.py
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.cifar_resnet import DATA, convert
from benchmarks.vision import CONTENDERS, TARGET, Outcome, options, rows_of, steps_of, table
from zotune.models import load
from zotune.training import EvalConfig, TrainConfig, evaluate, train


def test_forward_only_rows_have_the_target_and_backprop_has_none() -> None:
    given = options([])
    found = [Outcome(80.0, 82.0), Outcome(80.0, 85.0)]
    for contender in CONTENDERS:
        row, spread = rows_of(contender, None, found, given)
        assert row.value == 83.5
        assert "standard deviation over 2 seeds" in spread.name
        forward_only = contender.method != "adamw"
        assert row.target == (80.0 + TARGET if forward_only else None)
        assert row.met is (True if forward_only else None)


def test_backprop_is_in_the_same_table_at_a_third_of_the_steps() -> None:
    given = options(["--budget", "300", "--batch", "100"])
    assert {steps_of(c, given) for c in CONTENDERS if c.method == "adamw"} == {100}


def test_what_is_looked_at_first_is_paid_for() -> None:
    given = options(["--budget", "300", "--batch", "100"])
    steps = {(c.method, c.space): steps_of(c, given) for c in CONTENDERS}
    assert steps["auto", "head(basis='classes')"] == 300 - 40 - 8
    assert steps["auto", "norms(basis='shift') + head(basis='classes')"] == (300 - 80 - 72) // 2
    assert min(steps.values()) == 1  # measured norms, and nothing tuned


def test_the_table_has_what_was_run_in_the_order_of_contenders() -> None:
    given = options([])
    runs = {"rate": None, "runs": [{"before": 80.0, "after": 82.0}]}
    rows = table({c.name: runs for c in reversed(CONTENDERS[:3])}, given)
    assert [row.name.split(", ")[0] for row in rows] == [
        c.name.split(", ")[0] for c in CONTENDERS[:3]
    ]


@pytest.fixture(scope="module")
def data(monkeypatch_module: pytest.MonkeyPatch) -> Path:
    if not (DATA / "cifar10_resnet").is_dir() or not (DATA / "cifar10_jpeg").is_dir():
        pytest.skip("cifar10_resnet or cifar10_jpeg is absent; set ZOTUNE_DATA to the data folder")
    monkeypatch_module.setenv("ZOTUNE_DATA", str(DATA))
    return DATA


@pytest.fixture(scope="module")
def monkeypatch_module() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def test_a_head_that_reads_more_gives_what_it_gave_before(data: Path, tmp_path: Path) -> None:
    last = load(convert(20, tmp_path / "last")).model
    every = load(convert(20, tmp_path / "all", "all", 2)).model
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(every(x).logits, last(x).logits, rtol=1e-4, atol=1e-4)


def test_norms_half_way_to_lossy_pictures_classify_more_of_them_without_a_label(
    data: Path, tmp_path: Path
) -> None:
    """ResNet-20 int8 on lossy CIFAR-10: Schneider et al. 2020 (arXiv 2006.16971)."""
    task = "cifar10(train_size=1000, dev_size=10, test_size=1000)"
    config = TrainConfig(
        model_name_or_path=str(convert(20, tmp_path / "model")), scheme="int8-channel", task=task,
        output_dir=str(tmp_path / "run"), method="mezo", space="norms(basis='shift', lr=0.0)",
        max_steps=1, per_device_train_batch_size=250, per_device_eval_batch_size=250,
        report_to="none", show_progress=False,
    )  # fmt: skip
    result = train(config)
    assert result.before is not None
    assert result.after > result.before + 0.005
    saved = EvalConfig(str(tmp_path / "run/model"), task, per_device_eval_batch_size=250)
    assert evaluate(saved)["value"] == result.after
