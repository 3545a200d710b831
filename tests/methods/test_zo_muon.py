"""ZO-Muon: the update restated, one P for all queries of a refresh step, vectors, refusals.

Run: pytest tests/methods/test_zo_muon.py
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from restated import Restated, exact
from torch import Tensor
from toys import batch, float_block

from zotune import methods
from zotune.core import noise
from zotune.core.evaluator import TorchEvaluator
from zotune.core.method import Method
from zotune.core.noise import Key
from zotune.core.perturbation import Gaussian
from zotune.core.step import Tuner
from zotune.errors import BadInput
from zotune.methods.zo_muon import RowSubspace

STEPS, RANK, REFRESH = 20, 5, 6


def ns5(g: Tensor) -> Tensor:
    """Muon's iteration, float64; a vector's exact orthogonalization is its direction."""
    x = g / g.norm()
    if g.dim() < 2:
        return x
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * x @ x.mT @ x + 2.0315 * x @ x.mT @ x @ x.mT @ x
    return x


@pytest.mark.parametrize("queries", [2, 4])
def test_twenty_steps_are_the_formula_in_float64(queries: int) -> None:
    lr, eps = 0.05, 1e-3
    paper = Restated("weights")
    low = {n for n, b in paper.blocks.items() if len(b.shape) == 2}
    P: dict[str, Tensor] = {}
    for t in range(STEPS):
        if t % REFRESH == 0:
            for n in low:
                m = paper.blocks[n].shape[0]
                r, key = min(RANK, m), Key(paper.seed, step=t // REFRESH)
                q, upper = torch.linalg.qr(
                    noise.draw("gaussian", key, f"{n}#left", 0, m * r).double().view(m, r)
                )
                P[n] = q * upper.diagonal().sign()
        base, mean = paper.loss(t), {n: torch.zeros(()).double() for n in paper.blocks}
        for key in (paper.key(t, j) for j in range(queries)):
            R = paper.direction(Gaussian(), key)
            for n in low:
                r, w = P[n].shape[1], paper.blocks[n].shape[1]
                R[n] = noise.draw("gaussian", key, f"{n}#z", 0, r * w).double().view(r, w)
            u = {n: P[n] @ R[n] if n in low else R[n] for n in R}
            c = (paper.loss(t, u, eps) - base) / eps
            mean = {n: mean[n] + c / queries * R[n] for n in R}
        paper.move_({n: P[n] @ ns5(g) if n in low else ns5(g) for n, g in mean.items()}, -lr)
    method = methods.get("zo-muon", lr=lr, eps=eps, rank=RANK, refresh=REFRESH, queries=queries)
    tuner = paper.tune(method, STEPS)
    assert paper.apart() < 1e-4  # NS5 in float32 stretches rounding
    assert tuner.kept_bytes == sum(4 * p.numel() + 16 for p in P.values())


def test_all_queries_and_the_update_of_any_step_lie_in_one_row_space() -> None:
    method, paper = methods.get("zo-muon", lr=0.05, rank=3, refresh=2), Restated("weights")
    assert isinstance(method, Method)
    law = method.perturbation
    evaluator = TorchEvaluator(paper.tuned, paper.space, exact)
    tuner = Tuner(paper.space, method, 4, evaluator=evaluator)
    for t in range(4):
        before = {b.name: b.value().clone() for b in paper.space}
        estimate = tuner.step(batch(4, t)).estimate
        assert estimate is not None
        for block in (b for b in paper.space if len(b.shape) == 2):
            u = torch.cat([law.draw(k, block).double() for k in estimate.keys], dim=1)
            step = before[block.name] - block.value()
            span = torch.linalg.svd(u, full_matrices=False)[0][:, :3]
            assert float((step - span @ span.mT @ step).norm() / step.norm()) < 1e-6
            values = torch.linalg.svdvals(step)[:3] / 0.05
            assert 0.3 < float(values.min()) <= float(values.max()) < 1.25


def test_the_covariance_is_the_share_of_rows() -> None:
    law, block = RowSubspace(rank=2, refresh=1), float_block("w", 5, 3)
    u = torch.stack([law.draw(Key(1, step=t), block).double().flatten() for t in range(6000)])
    product = u.unsqueeze(2) * u.unsqueeze(1)
    error = product.std(0) / len(u) ** 0.5
    assert bool(((product.mean(0) - 2 / 5 * torch.eye(15)).abs() <= 5 * error).all())


def test_one_direction_a_step_is_refused_and_one_for_each_example_is_not() -> None:
    for directions in ("one-sided", "batch"):
        with pytest.raises(BadInput, match="queries >= 2"):
            methods.get("zo-muon", queries=1, directions=directions)
    assert methods.get("zo-muon", queries=1, directions="example").forwards == 2


@pytest.mark.parametrize("options", [{"rank": 0}, {"refresh": 0}])
def test_what_it_cannot_do_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match="want"):
        methods.get("zo-muon", **options)
