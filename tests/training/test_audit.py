"""An empirical audit: an adversary who knows everything but one example, and its limits.

Run: pytest tests/training/test_audit.py
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from scipy.stats import beta
from torch import Tensor

from zotune import methods
from zotune.core import secret
from zotune.core.evaluator import Evaluator
from zotune.core.perturbation import Gaussian, Perturbation
from zotune.core.probe import Losses, Probe
from zotune.core.space import Space, tensors
from zotune.core.step import Tuner
from zotune.training.batches import poisson
from zotune.training.privacy import epsilon_of


class Line(Evaluator):
    """l_x(theta) = x theta for each row x: slopes that can be told without any error."""

    def __init__(self, space: Space) -> None:
        self.space = space

    def losses(self, probes: Sequence[Probe], batch: Tensor, perturbation: Perturbation) -> Losses:
        (block,) = self.space
        points = torch.stack([block.at(perturbation.draw(p.key, block), p.step) for p in probes])
        return Losses((points @ batch.T).double(), torch.ones(len(batch)))


OTHERS = torch.eye(4).repeat(2, 1)[:7]
CANARY = 50 * torch.tensor([[1.0, -1.0, 1.0, -1.0]])  # a slope far beyond the clip, in most steps
EXPECTED, STEPS, GAMES, DELTA = 6, 5, 400, 1e-2


def played(method: Any, with_canary: bool) -> list[float]:
    """What an adversary makes of each of many runs whose directions and coefficients he sees."""
    rows = torch.cat([CANARY, OTHERS]) if with_canary else OTHERS
    scores = []
    for game in range(GAMES):
        space = tensors({"theta": torch.zeros(4)})
        tuner = Tuner(space, method, game, evaluator=Line(space), total=STEPS)
        (block,) = space
        score = 0.0
        for _ in range(STEPS):
            (probe, _) = tuner.ask()
            towards = float((CANARY @ Gaussian().draw(probe.key, block)).sign())
            chosen = poisson(EXPECTED, 8)  # the same rate in both worlds
            batch = rows[[i for i in chosen if i < len(rows)]]
            report = tuner.step(batch)
            assert report.estimate is not None
            score += towards * report.estimate.coefficients[0]
        scores.append(score)
    return scores


def proven(method: Any) -> float:
    """No epsilon below this holds for the method, with 95 % confidence: ln((hits - delta) / alarms)
    at the Clopper-Pearson limits of both rates, in one half of the games, at the threshold that
    was best in the other half."""
    half = GAMES // 2
    without, having = played(method, False), played(method, True)

    def rates(cut: float, part: slice) -> tuple[int, int]:
        return sum(s > cut for s in having[part]), sum(s > cut for s in without[part])

    def bound(hits: int, alarms: int) -> float:
        least = float(beta.ppf(0.025, hits, half - hits + 1)) if hits else 0.0
        most = float(beta.ppf(0.975, alarms + 1, half - alarms)) if alarms < half else 1.0
        return math.log(max(least - DELTA, 1e-9) / most)

    first, second = slice(0, half), slice(half, GAMES)
    cut = max(sorted(without + having)[::4], key=lambda c: bound(*rates(c, first)))
    return bound(*rates(cut, second))


def test_an_adversary_with_a_canary_proves_less_than_the_promise_but_finds_a_missing_clip(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(secret, "entropy", random.Random(2).randbytes)
    promise = epsilon_of("gaussian", 1.5, DELTA, EXPECTED / 8, STEPS)
    assert 2.5 < promise < 3
    options = {"eps": 0.5, "lr": 1e-3, "batch_size": EXPECTED}
    kept = methods.get("dp-zo", clip=1.0, noise=1.5, **options)
    assert 0.2 < proven(kept) < promise
    unclipped = methods.get("dp-zo", clip=1e6, noise=1.5 / 1e6, **options)
    assert proven(unclipped) > promise
