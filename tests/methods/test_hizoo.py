"""HiZOO: curvature measured by a third forward, kept per weight, and learned behind each step.

Run: pytest tests/methods/test_hizoo.py
"""

from __future__ import annotations

import pytest
import torch
from restated import Restated
from toys import batch, cross_entropy, small

from zotune import methods
from zotune.core import spaces
from zotune.core.evaluator import FunctionEvaluator, TorchEvaluator
from zotune.core.noise import Key
from zotune.core.perturbation import Gaussian
from zotune.core.probe import Losses
from zotune.core.space import tensors
from zotune.core.step import Tuner
from zotune.errors import BadInput
from zotune.methods.hizoo import Curved, SecondDifference

STEPS = 20


@pytest.mark.parametrize("queries", [1, 3])
def test_hizoo_restated(queries: int) -> None:
    lr, eps, smoothing = 0.05, 1e-2, 0.02
    paper = Restated()
    H = {n: torch.ones_like(p) for n, p in paper.theta.items()}
    for t in range(STEPS):
        base, step = paper.loss(t), {n: torch.zeros_like(p) for n, p in paper.theta.items()}
        growth = {n: torch.zeros_like(p) for n, p in paper.theta.items()}
        for j in range(queries):
            z = paper.direction(Gaussian(), paper.key(t, j))
            u = {n: z[n] / H[n].sqrt() for n in z}
            plus, minus = paper.loss(t, u, eps), paper.loss(t, u, -eps)
            for n in z:
                step[n] += (plus - minus) / (2 * eps) * u[n] / queries
                growth[n] += abs(plus + minus - 2 * base) / (2 * eps**2) * z[n] ** 2 / queries
        paper.move_(step, -lr)
        H = {n: (1 - smoothing) * H[n] + smoothing * growth[n] * H[n] for n in H}
    options = {"lr": lr, "eps": eps, "smoothing": smoothing, "queries": queries}
    tuner = paper.tune(methods.get("hizoo", **options), STEPS)  # type: ignore[arg-type]
    assert paper.apart() < 1e-4
    for block in paper.space:
        held = block.memory["log_curvature"].double().exp()
        assert float((held - H[block.name]).norm() / (H[block.name] - 1).norm()) < 1e-3
    assert tuner.kept_bytes == 4 * paper.space.numel
    assert tuner.evaluator is not None
    assert tuner.evaluator.forwards == STEPS * (1 + 2 * queries)


def test_the_second_difference_of_a_quadratic_is_its_curvature_along_u() -> None:
    """L = x^T D x / 2: h = u^T D u / 2 whatever eps, and E[h z^2] = D + tr(D) / 2 at H = 1."""
    (block,) = space = tensors({"x": torch.tensor([1.0, -2.0, 0.5])})
    d = torch.tensor([4.0, 1.0, 0.25])
    f = FunctionEvaluator(space, lambda values, _: float((d * values["x"] ** 2).sum()) / 2)
    for eps in (1.0, 0.01):
        method = methods.get("hizoo", eps=eps)
        tuner = Tuner(space, method, 0, evaluator=f)  # type: ignore[arg-type]
        estimate = tuner.step(None).estimate
        assert estimate is not None
        u = Gaussian().draw(Key(0), block)
        assert estimate.extras[0] == pytest.approx(float((d * u**2).sum()) / 2, rel=1e-2)
    z = torch.stack([Gaussian().draw(Key(1, step=t), block) for t in range(20000)])
    mean = ((d * z**2).sum(1, keepdim=True) / 2 * z**2).mean(0)
    torch.testing.assert_close(mean, d + d.sum() / 2, rtol=0.1, atol=0)


def test_high_curvature_shortens_a_weights_steps() -> None:
    """On L = sum d x^2 / 2 with d = 100 or 1, H comes to say which is which."""
    (block,) = space = tensors({"x": torch.full((40,), 0.1)})
    d = torch.tensor([100.0] * 4 + [1.0] * 36)
    f = FunctionEvaluator(space, lambda values, _: float((d * values["x"] ** 2).sum()) / 2)
    method = methods.get("hizoo", lr=1e-4, eps=1e-3, smoothing=1e-4, queries=4)
    tuner = Tuner(space, method, 0, evaluator=f, total=200)  # type: ignore[arg-type]
    for _ in range(200):
        tuner.step(None)
    held = block.memory["log_curvature"]
    assert float(held[:4].mean()) > 1.1 * float(held[4:].mean()) > 0


def test_the_published_smoothing_is_not_lost_in_rounding() -> None:
    """A hundred steps of 1e-8 h z^2, each far below what float32 can add to 1."""
    (block,) = space = tensors({"x": torch.zeros(50)})
    law = Curved(1e-8)
    block.memory.update(law.state(block))
    estimator, total = SecondDifference(), torch.zeros(50, dtype=torch.float64)
    for t in range(100):
        law.learn_(space, estimator.rebuild(Key(0, step=t), (0.0, 2.0), 0.0))
        total += 1e-8 * (2 * Gaussian().draw(Key(0, step=t), block).double() ** 2 - 1)
    held = block.memory["log_curvature"].double()
    torch.testing.assert_close(held, total, rtol=1e-3, atol=1e-9)


def test_a_journal_keeps_the_curvature_beside_each_coefficient() -> None:
    estimator = SecondDifference(eps=0.5, queries=2)
    told = estimator.tell(Key(3), Losses.of([1.0, 3.0, 1.5, 2.0, 2.5]))
    assert told.coefficients == (1.5, -0.5)
    assert told.extras == (5.0, 5.0)
    again = estimator.rebuild(Key(3), told.scalars, told.loss)
    assert again == told
    assert len(told.scalars) == estimator.count(7) == 4


def test_replay_and_resume_learn_the_same_curvature_bit_for_bit() -> None:
    def tuner() -> Tuner:
        model = small()
        space = spaces.parse("weights").build(model)
        method = methods.get("hizoo", lr=0.01, eps=1e-2, smoothing=0.01)
        return Tuner(space, method, 3, evaluator=TorchEvaluator(model, space, cross_entropy))  # type: ignore[arg-type]

    straight, resumed, replayed = tuner(), tuner(), tuner()
    log = []
    for t in range(6):
        if t == 3:
            resumed.load_({k: v.clone() for k, v in straight.state_tensors().items()}, 3, 3)
        log.append(straight.step(batch(4, t)).estimate)
    for t in range(3, 6):
        resumed.step(batch(4, t))
    for estimate in log:
        assert estimate is not None
        again = straight.method.estimator.rebuild(estimate.key, estimate.scalars, estimate.loss)
        replayed.apply_(again)
    for key, value in straight.state_tensors().items():
        assert torch.equal(resumed.state_tensors()[key], value)
        assert torch.equal(replayed.state_tensors()[key], value)


def test_rows_and_runs_of_a_direction_are_parts_of_the_whole() -> None:
    (block,) = tensors({"w": torch.zeros(7, 3)})
    law = Curved()
    block.memory["log_curvature"] = torch.rand(7, 3, generator=torch.Generator().manual_seed(0))
    whole = law.draw(Key(1), block)
    assert torch.equal(law.draw(Key(1), block, 2, 5), whole[2:5])
    assert torch.equal(law.draw_rows(Key(1), block, [6, 0]), whole[[6, 0]])
    torch.testing.assert_close(law.combine([Key(1)], [0.5], block, 2, 5), 0.5 * whole[2:5])


def test_a_smoothing_beyond_its_range_is_refused() -> None:
    for smoothing in (-0.1, 1.0):
        with pytest.raises(BadInput, match="smoothing"):
            methods.get("hizoo", smoothing=smoothing)
