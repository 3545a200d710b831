"""What `auto` measures before the first step. Run: pytest tests/training/test_measuring.py"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys import small
from training.lab import config, task

from zotune import methods
from zotune.core.estimator import PerExample, TwoSided
from zotune.core.evaluator import TorchEvaluator
from zotune.core.method import Method
from zotune.core.space import Space
from zotune.core.spaces import Head, Weights
from zotune.methods import records
from zotune.training import Objective, replay, train
from zotune.training.batches import Batches
from zotune.training.journal import Journal
from zotune.training.measuring import BEND, Landscape, look, measured
from zotune.training.opening import open_space

D = 12
CURVATURE = torch.linspace(0.5, 3.0, D)


class Point(nn.Module):
    """A point with loss (w - x)^T diag(CURVATURE) (w - x) / 2 for each example x."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1, D, bias=False)
        with torch.no_grad():
            self.linear.weight.fill_(1.0)

    def forward(self, one: Tensor) -> Tensor:
        out: Tensor = self.linear(one)
        return out


def losses(model: nn.Module, batch: Any) -> Tensor:
    away = model(batch["one"]) - batch["x"]
    return 0.5 * (CURVATURE * away.square()).sum(-1)


def bowl(noise: float) -> tuple[Space, TorchEvaluator, Batches]:
    generator = torch.Generator().manual_seed(0)
    rows = [
        {"one": torch.ones(1), "x": noise * torch.randn(D, generator=generator)} for _ in range(256)
    ]
    model = Point()
    problem = Objective(losses, rows)
    space = Weights().build(model)

    def objective(module: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        return problem.losses(module, batch)

    return space, TorchEvaluator(model, space, objective), Batches(problem, rows, 16, 0)


def test_slope_curvature_and_noise_of_a_quadratic_are_seen() -> None:
    """w = 1 and the unit is 1, so g = CURVATURE and H = diag(CURVATURE)."""
    space, evaluator, batches = bowl(0.0)
    auto = methods.get("auto")
    seen = [look(auto, space, evaluator, _seeded(batches, s), 0.1) for s in range(60)]  # type: ignore[arg-type]
    g2, trace = float(CURVATURE.square().sum()), float(CURVATURE.sum())
    assert _mean(s.slope for s in seen) == pytest.approx(g2, rel=0.15)
    assert _mean(s.trace for s in seen) == pytest.approx(trace, rel=0.05)
    assert _mean(s.norm**2 for s in seen) == pytest.approx(g2, rel=0.25)
    assert _mean(s.example for s in seen) == pytest.approx(_mean(s.batch for s in seen), rel=1e-5)
    space, evaluator, batches = bowl(5.0)
    noisy = [look(auto, space, evaluator, _seeded(batches, s), 0.1) for s in range(60)]  # type: ignore[arg-type]
    assert _mean(s.example for s in noisy) == pytest.approx(26 * g2, rel=0.2)
    assert _mean(s.slope for s in noisy) < 0.3 * _mean(s.batch for s in noisy) + g2


def _seeded(batches: Batches, seed: int) -> Batches:
    return Batches(batches.task, batches.examples, batches.size, seed)


def _mean(values: Any) -> float:
    found = list(values)
    return sum(found) / len(found)


def test_eps_bends_the_loss_by_the_same_amount_and_lr_is_a_minimum() -> None:
    seen = Landscape(loss=1.2, slope=2.0, batch=3.0, example=9.0, trace=5.0, norm=1.5)
    assert seen.eps() ** 2 * seen.trace / 2 == pytest.approx(BEND * 1.2)
    lr = seen.lr(TwoSided(), 16, 1, 4)
    assert lr == pytest.approx(2.0 / (5.0 * 3.0 + 1.5 * 2.0), rel=1e-9)
    assert seen.lr(PerExample(), 16, 1, 4) > lr  # sixteen directions average their noise
    long = [seen.lr(TwoSided(), 16, steps, 10**9) for steps in (10**4, 10**6)]
    assert long[0] == pytest.approx(10 * long[1])
    assert seen.lr(TwoSided(), 16, 10**6, 4) > long[1]  # few numbers come to rest


def test_a_quadratic_is_descended_with_what_was_measured() -> None:
    space, evaluator, batches = bowl(0.5)
    auto = measured(methods.get("auto"), set(), space, evaluator, batches, 200)  # type: ignore[arg-type]
    from zotune.core.step import Tuner

    tuner = Tuner(space, auto, 0, evaluator=evaluator, total=200)
    first = tuner.step(batches[0]).loss
    for t in range(1, 200):
        last = tuner.step(batches[t]).loss
    floor = 0.5 * 0.25 * float(CURVATURE.sum())  # of the data's own spread
    assert last - floor < 0.1 * (first - floor)


@pytest.mark.parametrize("directions", ["batch", "one-sided", "example"])
def test_given_directions_are_kept(directions: str) -> None:
    space, evaluator, batches = bowl(0.5)
    auto = methods.get("auto", directions=directions)
    found = measured(auto, {"directions"}, space, evaluator, batches, 10)  # type: ignore[arg-type]
    assert isinstance(found, Method)
    assert type(found.estimator) is type(auto.estimator)
    assert found.lr != auto.lr


def test_what_is_given_is_not_measured(tmp_path: Path) -> None:
    run = config(tmp_path / "run", max_steps=4, learning_rate=0.5, directions="batch")
    run = type(run)(**{**run.as_dict(), "method": "auto(eps=0.125, queries=3)"})
    train(run, model=small(), task=task())
    method = eval(Journal.read(tmp_path / "run").header["method"], records())
    assert method.lr == 0.5
    assert method.estimator == TwoSided(0.125, 3)


def test_auto_is_resumed_and_replayed_with_what_was_measured(tmp_path: Path) -> None:
    run = config(tmp_path / "run", max_steps=8)
    run = type(run)(**{**run.as_dict(), "method": "auto", "learning_rate": None, "eps": None,
                       "queries": None, "directions": None, "units": None})  # fmt: skip
    model = small()
    train(run, model=model, task=task())
    header = Journal.read(tmp_path / "run").header
    assert eval(header["method"], records()).lr != methods.get("auto").lr
    rebuilt = small()
    replay(tmp_path / "run", rebuilt)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), rebuilt.parameters(), strict=True)
    )


def test_autos_space_goes_by_the_model(tmp_path: Path) -> None:
    run = type(config(tmp_path))(output_dir=str(tmp_path), method="auto")
    assert type(open_space(run, small())).__name__ == "Adapter"
    from zotune.models import PooledClassifier

    wrapped = PooledClassifier.__new__(PooledClassifier)
    torch.nn.Module.__init__(wrapped)
    assert open_space(run, wrapped) == Head(basis="classes", project=True, layers="all")
