"""FZOO restated, and what its division by the losses' spread does.

Run: pytest tests/methods/test_fzoo.py
"""

from __future__ import annotations

import math

import pytest
import torch
from restated import Restated

from zotune import methods
from zotune.core.noise import Key
from zotune.core.perturbation import Rademacher
from zotune.core.probe import Losses
from zotune.errors import BadInput
from zotune.methods.fzoo import Spread


@pytest.mark.parametrize("queries", [2, 8])
def test_twenty_steps_are_the_formula_in_float64(queries: int) -> None:
    lr, eps, decay = 2e-3, 1e-3, 0.1
    paper = Restated("weights")
    decayed = {n for n, b in paper.blocks.items() if b.decay}
    for t in range(20):
        base = paper.loss(t)
        us = [paper.direction(Rademacher(), paper.key(t, j)) for j in range(queries)]
        losses = torch.tensor([paper.loss(t, u, eps) for u in us], dtype=torch.float64)
        g = (losses - base) / (queries * eps)  # the paper's estimate, with its lr = eps * ours
        paper.move_({n: p if n in decayed else 0 * p for n, p in paper.theta.items()}, -lr * decay)
        for u, c in zip(us, (eps * lr) * g / losses.std(), strict=True):
            paper.move_(u, -float(c))
    method = methods.get("fzoo", lr=lr, eps=eps, queries=queries, weight_decay=decay)
    assert paper.tune(method, 20).kept_bytes == 0
    assert paper.apart() < 1e-4  # a spread of losses loses what their differences lose to eps


def test_neither_the_losss_scale_nor_eps_changes_the_step() -> None:
    values = [1.0, 1.1, 0.95, 1.3]
    told = Spread(1e-3, 3).tell(Key(0), Losses.of(values))
    scaled = Spread(1e-1, 3).tell(Key(0), Losses.of([1000 * v + 7 for v in values]))
    assert told.coefficients == pytest.approx(scaled.coefficients, rel=1e-9)
    spread = math.sqrt(sum((v - 3.35 / 3) ** 2 for v in values[1:]) / 2)
    assert told.coefficients == pytest.approx([(v - 1) / spread for v in values[1:]], rel=1e-9)


def test_equal_losses_give_no_step() -> None:
    assert Spread(1e-3, 2).tell(Key(0), Losses.of([1.0, 1.5, 1.5])).coefficients == (0.0, 0.0)
    assert Spread(1e-3, 2).tell(Key(0), Losses.of([1.0, math.nan, 1.5])).finite is False


def test_a_single_direction_is_refused_before_anything_runs() -> None:
    with pytest.raises(BadInput, match="at least 2"):
        methods.get("fzoo", queries=1)
