"""ZO-AdaMU: directions that remember, an annealing, and Adam's denominator.

Run: pytest tests/methods/test_zo_adamu.py
"""

from __future__ import annotations

import math

import pytest
import torch
from restated import Restated
from toys import batch, cross_entropy, small

from zotune import methods
from zotune.core import noise, spaces
from zotune.core.evaluator import TorchEvaluator
from zotune.core.noise import Key
from zotune.core.perturbation import Gaussian
from zotune.core.space import tensors
from zotune.core.step import Tuner
from zotune.errors import BadInput
from zotune.methods.zo_adamu import MomentumGuided

STEPS = 20


@pytest.mark.parametrize("queries", [1, 3])
def test_zo_adamu_restated(queries: int) -> None:
    """Five steps of plain noise, ten of annealing, five at the end values."""
    lr, eps, ends = 0.002, 1e-2, {"alpha": 0.2, "b1": 0.3, "b2": 0.1}
    paper = Restated()
    m = {n: torch.zeros_like(p) for n, p in paper.theta.items()}
    for t in range(STEPS):
        share = (1 + math.cos(math.pi * min(max(t - 5, 0) / 10, 1))) / 2
        alpha, b1, b2 = (end + (1 - end) * share for end in ends.values())
        step, new = ({n: torch.zeros_like(p) for n, p in m.items()} for _ in range(2))
        for j in range(queries):
            key, u, v = paper.key(t, j), {}, {}
            for n, block in paper.blocks.items():
                z1 = alpha**0.5 * Gaussian().draw(key, block).double()
                n2 = noise.draw("gaussian", key, f"{n}#m", 0, block.numel).view(block.shape)
                z2 = m[n] + (1 - alpha) ** 0.5 * n2.double()
                u[n], v[n] = b1 * z1 + (1 - b1) * z2, b2 * z1**2 + (1 - b2) * z2**2
            c = (paper.loss(t, u, eps) - paper.loss(t, u, -eps)) / (2 * eps)
            for n in m:
                step[n] += c * u[n] / (v[n] + 1e-8).sqrt() / queries
                new[n] += math.copysign(1, c) * u[n] / queries
        paper.move_(step, -lr)
        m = new
    options = {"lr": lr, "eps": eps, "queries": queries, "flat": 5, "anneal": 10, **ends}
    tuner = paper.tune(methods.get("zo-adamu", **options), STEPS)  # type: ignore[arg-type]
    assert paper.apart() < 1e-3
    for block in paper.space:
        torch.testing.assert_close(block.memory["m"].double(), m[block.name], rtol=1e-3, atol=1e-5)
    assert tuner.kept_bytes == 4 * paper.space.numel


def test_before_the_annealing_a_step_is_c_times_the_signs_of_plain_noise() -> None:
    (block,) = tensors({"x": torch.zeros(3, 4)})
    law = MomentumGuided(flat=10)
    block.memory["m"] = torch.ones(3, 4)
    u = law.draw(Key(0, step=10), block)
    assert torch.equal(u, Gaussian().draw(Key(0, step=10), block))
    step = law.combine([Key(0, step=10)], [-2.0], block, 0, 3)
    torch.testing.assert_close(step, -2 * u.sign(), rtol=1e-3, atol=1e-3)
    assert not torch.equal(law.draw(Key(0, step=3000), block), Gaussian().draw(Key(0), block))


def test_a_direction_has_the_mean_and_the_variance_of_its_formula() -> None:
    """Mean (1 - b1) m, variance b1^2 a + (1 - b1)^2 (1 - a); 20,000 draws, 4 standard errors."""
    law, draws = MomentumGuided(alpha=0.3, b1=0.6, b2=0.0, flat=0, anneal=1), 20000
    (block,) = tensors({"x": torch.zeros(4)})
    block.memory["m"] = m = torch.tensor([0.0, 1.0, -2.0, 5.0])
    u = torch.stack([law.draw(Key(0, step=1 + t), block) for t in range(draws)])
    variance = 0.36 * 0.3 + 0.16 * 0.7
    assert float((u.mean(0) - 0.4 * m).abs().max()) < 4 * math.sqrt(variance / draws)
    assert float((u.var(0) / variance - 1).abs().max()) < 4 * math.sqrt(2 / draws)
    assert torch.equal(law.draw(Key(0, step=7), block, 1, 3), u[6][1:3])


def test_the_memory_points_uphill() -> None:
    """Most of the next directions go up the slope: 160 fair coins show 62 % once in a thousand."""
    model = small()
    space = spaces.get("weights").build(model)
    options = {"eps": 1e-2, "flat": 0, "anneal": 1, "alpha": 0.5, "b1": 0.5, "queries": 20}
    method = methods.get("zo-adamu", lr=0.0, **options)
    tuner = Tuner(space, method, 3, evaluator=TorchEvaluator(model, space, cross_entropy))  # type: ignore[arg-type]
    estimates = [tuner.step(batch(16, 0)).estimate for _ in range(12)]
    positive = [sum(c > 0 for c in e.coefficients) / 20 for e in estimates if e is not None]
    assert sum(positive[4:]) / 8 > 0.62


def test_resume_and_replay_remember_the_same_direction() -> None:
    def tuner() -> Tuner:
        space = spaces.parse("weights").build(model := small())
        method = methods.get("zo-adamu", lr=1e-3, eps=1e-2, flat=1, anneal=3)
        return Tuner(space, method, 3, evaluator=TorchEvaluator(model, space, cross_entropy))  # type: ignore[arg-type]

    straight, resumed, replayed = tuner(), tuner(), tuner()
    for t in range(6):
        if t == 3:
            resumed.load_({k: v.clone() for k, v in straight.state_tensors().items()}, 3, 3)
        estimate = straight.step(batch(4, t)).estimate
        assert estimate is not None
        replayed.apply_(estimate)
        if t >= 3:
            resumed.step(batch(4, t))
    for key, value in straight.state_tensors().items():
        assert torch.equal(resumed.state_tensors()[key], value)
        assert torch.equal(replayed.state_tensors()[key], value)


def test_weights_that_are_none_are_refused() -> None:
    for bad in ({"alpha": 1.1}, {"b1": -0.1}, {"b2": 2.0}, {"flat": -1}, {"anneal": 0}):
        with pytest.raises(BadInput, match=next(iter(bad))):
            methods.get("zo-adamu", **bad)
