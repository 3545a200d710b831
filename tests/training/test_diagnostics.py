"""What a run says of its own learning. Run: pytest tests/training/test_diagnostics.py"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from toys import batch, cross_entropy, small
from training.lab import config, task

from zotune.core import spaces
from zotune.core.backprop import Gradient, cosine
from zotune.core.estimator import Estimate, TwoSided, signal
from zotune.core.evaluator import TorchEvaluator
from zotune.core.method import Method
from zotune.core.noise import Key
from zotune.core.space import Space
from zotune.core.step import StepReport, Tuner
from zotune.training import train
from zotune.training.diagnostics import Diagnostics
from zotune.training.report import read_metrics


def reports(losses: list[float], signal: float | None = None) -> Diagnostics:
    seen = Diagnostics(Space(spaces.parse("norms").build(small()).blocks))
    for t, loss in enumerate(losses):
        estimate = Estimate(Key(0, t), (Key(0, t),), (1.0,), loss, signal=signal)
        seen.note(StepReport(t, loss, 0.1, True, estimate))
    return seen


def noisy(start: float, slope: float, steps: int = 100) -> list[float]:
    noise = torch.randn(steps, generator=torch.Generator().manual_seed(0)).tolist()
    return [start + slope * t + 0.1 * e for t, e in enumerate(noise)]


def test_advice_is_given_where_nothing_is_learned_and_only_there() -> None:
    assert reports(noisy(2.0, -0.02)).advice() is None
    assert "lower learning_rate" in (reports(noisy(1.0, 0.02)).advice() or "")
    assert "are noise" in (reports(noisy(1.0, 0.0), 0.01).advice() or "")
    assert "raise learning_rate" in (reports(noisy(1.0, 0.0), 5.0).advice() or "")
    assert reports(noisy(1.0, 0.0, 20)).advice() is None  # too few steps to tell
    assert reports([0.0] * 100).advice() is None  # a private run shows no losses


def test_signal_is_zero_on_average_for_noise_and_grows_with_the_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    for size in (8, 64):
        weights = torch.full((size,), 1 / size, dtype=torch.float64)
        noise = torch.randn(4000, size, generator=generator, dtype=torch.float64)
        expected = (size - 1) / (size - 3) - 1  # mean of F(1, size - 1), less 1
        assert signal(noise, weights) == pytest.approx(expected, abs=0.15)
        both = signal(noise + 0.5, weights)
        assert both == pytest.approx((1 + 0.25 * size) * (1 + expected) - 1, rel=0.1)
    assert signal(noise[:, :1], torch.ones(1)) is None


def test_the_cosine_is_that_of_the_gradient_in_the_blocks_own_units() -> None:
    model = small()
    space = spaces.parse("norms(eps=0.0015) + biases").build(model)
    method = Method("m", TwoSided(1e-3, queries=400), units="relative")
    evaluator = TorchEvaluator(model, space, cross_entropy)
    tuner = Tuner(space, method, 0, evaluator=evaluator)
    here = batch(6, 0)
    estimate = method.estimator.tell(
        tuner.key, evaluator.losses(tuner.ask(), here, method.perturbation)
    )
    true = Gradient(space.blocks, evaluator)
    true.backward(here)
    g = torch.cat([tuner.estimated(b, estimate).flatten() for b in space])
    grads = torch.cat([(true.leaves[b.name].grad * b.unit).flatten() for b in space])  # type: ignore[operator]
    wanted = float(torch.nn.functional.cosine_similarity(g, grads, dim=0))
    assert cosine(tuner, estimate, here) == pytest.approx(wanted, abs=1e-5)
    assert wanted > 0.7  # 400 directions in 99 coordinates


@pytest.mark.parametrize("kind", ["mezo", "zoqo"])
def test_metrics_hold_what_a_run_says_of_itself(tmp_path: Path, kind: str) -> None:
    every: dict[str, Any] = {"check_gradient": 5} if kind == "mezo" else {}
    train(config(tmp_path / "run", kind, max_steps=20, logging_steps=5, **every),
          model=small(), task=task())  # fmt: skip
    rows = [r for r in read_metrics(tmp_path / "run") if "loss" in r]
    assert len(rows) == 4
    assert all("signal" in r for r in rows)
    if kind == "mezo":
        assert all(-1 <= r["gradient_cosine"] <= 1 for r in rows)
    else:
        assert all(0 < r["codes_moved"] <= 1 for r in rows)


def test_a_run_that_learns_nothing_is_told_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "zotune"):
        train(config(tmp_path / "run", "mezo", max_steps=60, learning_rate=0.0),
              model=small(), task=task())  # fmt: skip
    assert "has not fallen" in caplog.text
