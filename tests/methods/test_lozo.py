"""LOZO: the paper's update, its refresh steps, the division by the rank, momentum carried over.

Run: pytest tests/methods/test_lozo.py
"""

from __future__ import annotations

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
from zotune.methods.lozo import LazyLowRank

STEPS, RANK, NU = 20, 3, 4


def factor(paper: Restated, name: str, key: Key, which: str) -> Tensor:
    """U (m x r) or V (n x r), as the paper draws them."""
    m, n = paper.blocks[name].shape
    size = m if which == "z" else n
    drawn = noise.draw("gaussian", key, f"{name}#{which}", 0, size * RANK).double()
    return drawn.view(m, RANK) if which == "z" else drawn.view(RANK, n).mT


@pytest.mark.parametrize(("queries", "momentum"), [(1, 0.0), (2, 0.0), (1, 0.8), (2, 0.8)])
def test_twenty_steps_are_the_formula_in_float64(queries: int, momentum: float) -> None:
    lr, eps = 0.02, 1e-3
    paper = Restated("weights")
    low = {n for n, b in paper.blocks.items() if len(b.shape) == 2 and min(b.shape) > RANK}
    assert 0 < len(low) < len(paper.blocks)
    V: dict[str, Tensor] = {}
    N = {n: torch.zeros(()).double() for n in paper.blocks}
    for t in range(STEPS):
        if t % NU == 0:
            new = {n: factor(paper, n, Key(paper.seed, step=t // NU), "v") for n in low}
            N |= {n: N[n] @ V[n].mT @ v / len(v) for n, v in new.items() if n in V}
            V = new
        g = {n: torch.zeros(()).double() for n in paper.blocks}
        for key in (paper.key(t, j) for j in range(queries)):
            U = {n: factor(paper, n, key, "z") for n in low}
            u = paper.direction(Gaussian(), key) | {n: U[n] @ V[n].mT for n in low}
            c = (paper.loss(t, u, eps) - paper.loss(t, u, -eps)) / (2 * eps)
            for n in paper.blocks:
                g[n] = g[n] + c / queries * (U[n] if n in low else u[n])
        N = {n: momentum * N[n] + (1 - momentum) * g[n] for n in g}
        paper.move_({n: N[n] @ V[n].mT / RANK if n in low else N[n] for n in N}, -lr)
    method = methods.get(
        "lozo", lr=lr, eps=eps, rank=RANK, refresh=NU, queries=queries, momentum=momentum
    )
    tuner = paper.tune(method, STEPS)
    assert paper.apart() < 1e-5
    numbers = sum(b.rows * RANK if n in low else b.numel for n, b in paper.blocks.items())
    assert tuner.kept_bytes == (4 * numbers if momentum else 0)


def test_the_estimate_has_no_bias_only_because_it_is_divided_by_the_rank() -> None:
    """E[c u] over U and V of a linear loss <g, .>, within four standard errors."""
    law, block = LazyLowRank(rank=2, refresh=1), float_block("w", 4, 5)
    g = torch.linspace(-1, 1, 20, dtype=torch.float64)
    found = []
    for key in (Key(1, step=t) for t in range(6000)):
        c = float(law.draw(key, block).double().flatten() @ g)
        found.append(law.combine([key], [c], block, 0, 4).double().flatten())
    samples = torch.stack(found)
    error = samples.std(0) / len(found) ** 0.5
    assert bool(((samples.mean(0) - g).abs() <= 4 * error).all())
    assert not bool(((2 * samples.mean(0) - g).abs() <= 8 * error).all())  # the released code's


def test_momentum_follows_the_basis_and_nothing_else() -> None:
    law, block = LazyLowRank(rank=3, refresh=10), float_block("w", 8, 4000)
    N = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    same = law.carry(N, block, Key(1, step=12), Key(1, step=19))
    assert torch.equal(same, N)
    carried = law.carry(N, block, Key(1, step=19), Key(1, step=20))
    old, new = law.right(N, Key(1, step=19), block), law.right(N, Key(1, step=20), block)
    nearest = torch.linalg.lstsq(new.mT.double(), (N @ old).mT.double()).solution.mT
    assert float((carried - nearest).norm()) < 5 * 3 / 4000**0.5 * float(nearest.norm())
    assert float(carried.norm()) < 5 * 3 / 4000**0.5 * float(N.norm())  # hardly anything is left


@pytest.mark.parametrize("options", [{"rank": 0}, {"refresh": 0}, {"momentum": 1.0}])
def test_what_it_cannot_do_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(BadInput, match="want"):
        methods.get("lozo", **options)
