"""TeZO: the update restated on t, its one subspace, its memory, its note.

Run: pytest tests/methods/test_tezo.py
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from restated import Restated
from torch import Tensor
from toys import float_block

from zotune import methods
from zotune.core import noise
from zotune.core.noise import Key
from zotune.core.perturbation import Gaussian
from zotune.errors import BadInput
from zotune.methods.tezo import FixedFactors

STEPS, RANK, B1, B2 = 20, 5, 0.8, 0.95


@pytest.mark.parametrize(
    ("rule", "queries", "copies"), [("sgd", 2, 0), ("momentum", 1, 1), ("adam", 2, 2)]
)
def test_twenty_steps_are_the_formula_in_float64(rule: Any, queries: int, copies: int) -> None:
    lr, eps = {"sgd": 0.02, "momentum": 0.02, "adam": 1e-3}[rule], 1e-3
    paper = Restated("weights")

    def drawn(key: Key, name: str, size: int) -> Tensor:
        return noise.draw("gaussian", key, name, 0, size * RANK).double().view(size, RANK)

    low = {n for n, b in paper.blocks.items() if len(b.shape) == 2}
    once = Key(paper.seed)
    U = {n: drawn(once, f"{n}#u", paper.blocks[n].shape[0]) for n in low}
    V = {n: drawn(once, f"{n}#v", paper.blocks[n].shape[1]) / RANK**0.5 for n in low}
    zero = {n: torch.zeros(RANK if n in low else b.shape) for n, b in paper.blocks.items()}
    m, v = ({n: z.double() for n, z in zero.items()} for _ in range(2))
    for t in range(1, STEPS + 1):
        g = {n: torch.zeros_like(z) for n, z in m.items()}
        for key in (paper.key(t - 1, j) for j in range(queries)):
            u = paper.direction(Gaussian(), key)
            tau = {n: noise.draw("gaussian", key, f"{n}#z", 0, RANK).double() for n in low}
            u |= {n: U[n] @ torch.diag(tau[n]) @ V[n].mT for n in low}
            c = (paper.loss(t - 1, u, eps) - paper.loss(t - 1, u, -eps)) / (2 * eps)
            g = {n: g[n] + c / queries * (tau if n in low else u)[n] for n in g}
        if rule == "sgd":
            step = g
        else:
            m = {n: B1 * m[n] + (1 - B1) * g[n] for n in g}
            v = {n: B2 * v[n] + (1 - B2) * g[n] ** 2 for n in g}
            step = m
        if rule == "adam":
            step = {n: m[n] / (1 - B1**t) / ((v[n] / (1 - B2**t)).sqrt() + 1e-8) for n in g}
        step = {n: U[n] * s @ V[n].mT if n in low else s for n, s in step.items()}
        paper.move_(step, -lr)
    method = methods.get(
        "tezo", lr=lr, eps=eps, rank=RANK, rule=rule, b1=B1, b2=B2, queries=queries
    )
    tuner = paper.tune(method, STEPS)
    assert paper.apart() < 1e-5
    numbers = sum(RANK if n in low else b.numel for n, b in paper.blocks.items())
    assert tuner.kept_bytes == 4 * copies * numbers


def test_a_run_never_leaves_its_dimensions_and_says_so() -> None:
    law, block = FixedFactors(rank=4), float_block("w", 12, 20)
    draws = [law.draw(Key(1, step=t, query=t % 3), block).flatten() for t in range(40)]
    values = torch.linalg.svdvals(torch.stack(draws).double())
    assert int((values > 1e-5 * values[0]).sum()) == 4
    (note,) = law.notes(Restated("weights").space)
    assert "4 fixed dimensions in each of 4 matrices, 16 for 1536 weights" in note


def test_over_the_factors_the_covariance_is_the_identity() -> None:
    law, block = FixedFactors(rank=3), float_block("w", 3, 4)
    u = torch.stack([law.draw(Key(seed), block).double().flatten() for seed in range(6000)])
    product = u.unsqueeze(2) * u.unsqueeze(1)
    error = product.std(0) / len(u) ** 0.5
    assert bool(((product.mean(0) - torch.eye(12)).abs() <= 5 * error).all())


@pytest.mark.parametrize("options", [{"rank": 0}, {"rule": "lion"}, {"b1": 1.0}, {"b2": -0.1}])
def test_what_it_cannot_do_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match="want"):
        methods.get("tezo", **options)
