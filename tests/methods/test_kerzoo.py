"""KerZOO: its kernels' moments, its missing bias, and the update restated.

Run: pytest tests/methods/test_kerzoo.py
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from restated import Restated
from torch import Tensor
from toys import batch, cross_entropy, small

from zotune import methods
from zotune.core import spaces
from zotune.core.estimator import Estimator, TwoSided
from zotune.core.evaluator import TorchEvaluator
from zotune.core.noise import Key
from zotune.core.perturbation import Gaussian
from zotune.core.probe import Losses
from zotune.core.space import tensors
from zotune.core.step import Tuner
from zotune.errors import BadInput
from zotune.methods.kerzoo import Kernel

NODES, WEIGHTS = np.polynomial.legendre.leggauss(16)  # exact for polynomials up to degree 31

# E[rho K], E[rho^3 K], E[rho^5 K], E[(rho K)^2], E[K^2] over rho ~ U[-1, 1] at C = 1.
MOMENTS = {
    "linear": (1, 3 / 5, 3 / 7, 9 / 5, 3),
    "cubic": (1, 0, -5 / 21, 25 / 4, 75 / 4),
    "quintic": (1, 0, 0, 11025 / 832, 3675 / 64),
}


def mean(values: np.ndarray[Any, Any]) -> float:
    return float(values @ WEIGHTS) / 2


@pytest.mark.parametrize("order", MOMENTS)
@pytest.mark.parametrize("gain", [1.0, 4.0])
def test_the_kernels_have_the_moments_of_the_table(order: Any, gain: float) -> None:
    k = np.array([Kernel(order=order, gain=gain).weight(r) for r in NODES]) / gain
    found = [mean(NODES**p * k) for p in (1, 3, 5)] + [mean((NODES * k) ** 2), mean(k**2)]
    assert found == pytest.approx(MOMENTS[order], rel=1e-12, abs=1e-12)


def test_a_narrower_radius_changes_the_step_that_lr_stands_for() -> None:
    """C lr (25 a^2 - 21 a^4) / 4 for rho ~ U[-a, a]: the schedule hidden in `shrink`."""
    for a, wanted in ((1.0, 4.0), (0.77, 7.44), (0.5, 4.94), (0.1, 0.25)):
        k = np.array([Kernel(gain=4.0).weight(r) for r in a * NODES])
        assert mean(a * NODES * k) == pytest.approx(25 * a**2 - 21 * a**4, rel=1e-12)
        assert mean(a * NODES * k) == pytest.approx(wanted, abs=5e-3)


def estimates(estimator: Estimator, a: float, eps: float, count: int) -> Tensor:
    """c u for f(x) = a x + x^3 at 0, whose slope there is a."""
    (block,) = tensors({"x": torch.zeros(1)})
    found = []
    for t in range(count):
        key = Key(5, step=t)
        u = float(Gaussian().draw(key, block))
        points = [probe.step * u for probe in estimator.ask(key)]
        told = estimator.tell(key, Losses.of([a * x + x**3 for x in points]))
        found.append(told.coefficients[0] * u)
    return torch.tensor(found, dtype=torch.float64)


def test_the_estimate_of_a_cubic_has_no_bias_and_mezos_misses_by_three_eps_squared() -> None:
    a, eps, count = 0.2, 0.5, 4000
    for estimator, wanted in (
        (Kernel(eps), a), (Kernel(eps, order="quintic"), a),
        (Kernel(eps, order="linear"), a + 3 * 3 / 5 * eps**2), (TwoSided(eps), a + 3 * eps**2),
    ):  # fmt: skip
        found = estimates(estimator, a, eps, count)
        error = float(found.std()) / math.sqrt(count)
        assert abs(float(found.mean()) - wanted) < 4 * error
        assert wanted == a or abs(float(found.mean()) - a) > 6 * error  # so this test could fail


def test_one_radius_per_direction_serves_every_tensor_and_fills_the_interval() -> None:
    kernel = Kernel(eps=0.5, queries=3)
    probes = kernel.ask(Key(1, step=7))
    assert [p.step for p in probes[::2]] == [-p.step for p in probes[1::2]]
    assert len({abs(p.step) for p in probes}) == 3
    rho = torch.tensor([Kernel().radius(Key(1, step=t)) for t in range(4000)])
    assert float(rho.abs().max()) <= 1
    for power in (1, 2, 3, 4):  # within four standard errors of U[-1, 1]'s moments
        x = rho**power
        assert abs(float(x.mean()) - (0, 0, 1 / 3, 0, 1 / 5)[power]) < 4 * float(x.std()) / 63.2
    shrunk = [Kernel(shrink=4).radius(Key(1, step=t)) / Kernel().radius(Key(1, step=t))
              for t in range(6)]  # fmt: skip
    assert shrunk == pytest.approx([1, 0.75, 0.5, 0.25, 1e-4, 1e-4])


@pytest.mark.parametrize("order", MOMENTS)
def test_twenty_steps_are_the_formula_in_float64(order: Any) -> None:
    lr, eps, queries, steps = 5e-3, 1e-2, 2, 20
    paper = Restated("weights")
    for t in range(steps):
        moves = []
        for key in (paper.key(t, j) for j in range(queries)):
            rho = Kernel().radius(key)
            k = {"linear": 3 * rho, "cubic": 15 / 4 * rho * (5 - 7 * rho**2),
                 "quintic": 105 / 64 * rho * (99 * rho**4 - 126 * rho**2 + 35)}[order]  # fmt: skip
            u = paper.direction(Gaussian(), key)
            c = (paper.loss(t, u, eps * rho) - paper.loss(t, u, -eps * rho)) / (2 * eps) * k
            moves.append((u, -lr / queries * c))
        for u, amount in moves:
            paper.move_(u, amount)
    method = methods.get("kerzoo", lr=lr, eps=eps, queries=queries, order=order)
    assert paper.tune(method, steps).kept_bytes == 0
    assert paper.apart() < 1e-5


def test_it_resumes_in_the_middle_of_shrinking() -> None:
    method = methods.get("kerzoo", lr=0.05, eps=0.05, shrink=5, queries=2)

    def tuner() -> Any:
        model = small()
        space = spaces.get("norms").build(model)
        return Tuner(space, method, 1, evaluator=TorchEvaluator(model, space, cross_entropy))

    straight, again = tuner(), tuner()
    for t in range(3):
        straight.step(batch(4, t))
    again.load_({k: v.clone() for k, v in straight.state_tensors().items()}, 3, 3)
    for t in range(3, 6):
        a, b = straight.step(batch(4, t)), again.step(batch(4, t))
        assert a.estimate.coefficients == b.estimate.coefficients
    for a, b in zip(straight.space, again.space, strict=True):
        assert torch.equal(a.value(), b.value())


@pytest.mark.parametrize("options", [{"order": "septic"}, {"gain": 0.0}, {"shrink": -1}])
def test_what_it_cannot_do_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match="want"):
        methods.get("kerzoo", **options)
