"""DP-ZO: sensitivity, noise, and MeZO where nothing is hidden.

Run: pytest tests/methods/test_dp_zo.py
"""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from toys import batch, small

from zotune import methods
from zotune.core import secret, spaces
from zotune.core.evaluator import TorchEvaluator
from zotune.core.method import Method
from zotune.core.noise import Key
from zotune.core.perturbation import Gaussian
from zotune.core.probe import Losses
from zotune.core.secret import Law
from zotune.core.step import StepReport, Tuner
from zotune.errors import BadInput
from zotune.methods.dp_zo import GRID, Private
from zotune.tasks.batch import Batch

LAWS: tuple[Law, ...] = ("gaussian", "laplace")
slope = st.floats(-1e3, 1e3) | st.sampled_from([math.nan, math.inf, -math.inf, 1e300, 1.0, -1.0])


def objective(model: nn.Module, here: Batch) -> tuple[Tensor, Tensor]:
    """Cross entropy in the model's own precision, float64 here."""
    loss = F.cross_entropy(model(here["input_ids"]), here["label"], reduction="none")
    return loss, torch.ones_like(loss)


def method(**options: Any) -> Method:
    found = methods.get("dp-zo", **options)
    assert isinstance(found, Method)
    return found


def tuner(chosen: Method, steps: int = 20) -> Tuner:
    model = small().double()
    space = spaces.get("weights").build(model)
    evaluator = TorchEvaluator(model, space, objective)
    return Tuner(space, chosen, 11, evaluator=evaluator, total=steps)


def point(of: Tuner) -> Tensor:
    return torch.cat([b.value().double().flatten() for b in of.space])


def losses(slopes: Tensor, eps: float) -> Losses:
    """The losses (2 queries, examples) that have these slopes."""
    rows = torch.stack([slopes * eps, -slopes * eps], dim=1).flatten(0, 1)
    return Losses(rows, torch.full((slopes.shape[1],), 1 / max(1, slopes.shape[1])))


def length(difference: list[int], law: Law) -> float:
    """Exact where it is compared with GRID: whole numbers, squared for l2."""
    if law == "laplace":
        return sum(map(abs, difference)) / GRID
    square = sum(d * d for d in difference)
    return 1.0 if square == GRID**2 else square / GRID**2


@given(
    st.integers(1, 3).flatmap(
        lambda q: st.lists(st.lists(slope, min_size=q, max_size=q), min_size=1, max_size=6)
    ),
    st.sampled_from(LAWS),
    st.sampled_from([0.37, 1.0, 200.0]),
)
def test_one_example_moves_the_sum_by_at_most_the_clip(
    rows: list[list[float]], law: Law, clip: float
) -> None:
    """Exactly, in the norm that the noise hides, also for losses that are no numbers."""
    private = Private(queries=len(rows[0]), clip=clip, mechanism=law)
    slopes = torch.tensor(rows, dtype=torch.float64).T
    whole = private.clipped(slopes)
    for gone in range(slopes.shape[1]):
        kept = [i for i in range(slopes.shape[1]) if i != gone]
        rest = private.clipped(slopes[:, kept])
        assert length([a - b for a, b in zip(whole, rest, strict=True)], law) <= 1


def test_a_small_slope_is_kept_and_a_large_one_becomes_the_clip() -> None:
    private = Private(clip=2.0)
    for given_, wanted in ((1.5, 1.5), (-1.5, -1.5), (9.0, 2.0), (-9.0, -2.0), (math.inf, 2.0),
                           (-math.inf, -2.0), (math.nan, 0.0), (2.0, 2.0)):  # fmt: skip
        (total,) = private.clipped(torch.tensor([[given_]], dtype=torch.float64))
        assert total / GRID * 2.0 == pytest.approx(wanted, abs=1e-14)


def test_several_queries_share_one_clip() -> None:
    slopes = torch.tensor([[3.0], [-4.0]], dtype=torch.float64)
    for law, norm in (("gaussian", 5.0), ("laplace", 7.0)):
        private = Private(queries=2, clip=1.0, mechanism=law)
        found = [part / GRID for part in private.clipped(slopes)]
        assert found == pytest.approx([3.0 / norm, -4.0 / norm], abs=1e-12)


@pytest.mark.parametrize(("law", "spread"), [("gaussian", 1.0), ("laplace", math.sqrt(2))])
def test_noise_has_the_promised_spread_around_nothing(
    law: Law, spread: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2e4 draws: mean within 4 standard errors, standard deviation within 2 %."""
    monkeypatch.setattr(secret, "entropy", random.Random(5).randbytes)
    private = Private(clip=3.0, noise=0.7, mechanism=law, batch=8)
    empty = Losses.none(2)
    drawn = torch.tensor([private.tell(Key(0), empty).coefficients for _ in range(20_000)])
    wanted = spread * 0.7 * 3.0 / 8
    assert float(drawn.double().std()) == pytest.approx(wanted, rel=0.02)
    assert abs(float(drawn.double().mean())) < 4 * wanted / math.sqrt(20_000)


def test_the_directions_key_does_not_repeat_the_noise() -> None:
    private, here = Private(queries=2), losses(torch.ones(2, 5, dtype=torch.float64), 1e-3)
    assert private.ask(Key(3)) == private.ask(Key(3))
    first, second = private.tell(Key(3), here), private.tell(Key(3), here)
    assert first.keys == second.keys
    assert not set(first.coefficients) & set(second.coefficients)


def test_an_estimate_tells_nothing_but_noised_coefficients() -> None:
    found = Private().tell(Key(0), losses(torch.ones(1, 5, dtype=torch.float64), 1e-3))
    assert (found.loss, found.signal, found.extras, dict(found.exact)) == (0.0, None, (), {})
    assert found.finite
    broken = Losses(torch.full((2, 3), math.nan), torch.full((3,), 1 / 3))
    assert Private().tell(Key(0), broken).finite


def run(chosen: Method, steps: int = 20) -> tuple[Tensor, list[StepReport]]:
    it = tuner(chosen, steps)
    reports = [it.step(batch(6, t)) for t in range(steps)]
    return point(it), reports


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("expected", [6, 15])
def test_without_noise_and_clip_it_is_mezo_on_the_sum_over_b(queries: int, expected: int) -> None:
    shared = {"eps": 1e-3, "queries": queries, "schedule": "linear"}
    plain = methods.get("mezo", lr=0.05 * 6 / expected, **shared)
    ours = method(lr=0.05, clip=1e6, noise=0.0, batch_size=expected, **shared)
    assert isinstance(plain, Method)
    start = point(tuner(plain))
    theirs, mine = run(plain)[0], run(ours)[0]
    assert float((mine - theirs).norm() / (theirs - start).norm()) < 1e-6


def test_it_is_the_papers_clipped_and_noised_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """theta <- theta - lr / b (sum_x D_x min(1, C / |D_x|) + noise) u, restated in float64."""
    lr, eps, clip, noise, b, steps = 0.05, 1e-3, 0.4, 0.8, 5, 20
    z = torch.randn(steps, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    told = iter(z.tolist())
    monkeypatch.setattr(secret, "noise", lambda law, scale: round(next(told) * scale))
    chosen = method(lr=lr, eps=eps, clip=clip, noise=noise, batch_size=b)
    mine, _ = run(chosen)
    model = small().double()
    blocks = {blk.name: blk for blk in spaces.get("weights").build(small().double())}
    theta = dict(model.named_parameters())
    clipped = 0

    def at(step: float, u: dict[str, Tensor], t: int) -> Tensor:
        for name, p in theta.items():
            p.add_(step * u[name])
        found = objective(model, batch(6, t))[0].double()
        for name, p in theta.items():
            p.sub_(step * u[name])
        return found

    with torch.no_grad():
        start = torch.cat([theta[n].flatten() for n in blocks]).clone()
        for t in range(steps):
            u = {n: Gaussian().draw(Key(11, step=t), blk).double() for n, blk in blocks.items()}
            d = (at(eps, u, t) - at(-eps, u, t)) / (2 * eps)
            clipped += int((d.abs() > clip).sum())
            total = (d * (clip / d.abs()).clamp(max=1)).sum() + noise * clip * z[t]
            for name, p in theta.items():
                p.sub_(lr / b * total * u[name])
    assert 0 < clipped < 6 * steps
    theirs = torch.cat([theta[n].flatten() for n in blocks])
    assert float((mine - theirs).norm() / (theirs - start).norm()) < 1e-4


def test_a_step_on_no_example_goes_along_noise_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secret, "noise", lambda law, scale: scale)
    it = tuner(method(lr=0.5, clip=2.0, noise=0.25, batch_size=4))
    before = point(it)
    report = it.step([])
    assert report.applied
    assert report.estimate is not None
    assert report.estimate.coefficients == (2.0 * 0.25 / 4,)
    u = torch.cat([Gaussian().draw(Key(11), b).double().flatten() for b in it.space])
    torch.testing.assert_close(before - point(it), 0.5 * 0.125 * u, rtol=1e-6, atol=1e-7)
    assert it.evaluator is not None
    assert it.evaluator.forwards == 2
    assert it.kept_bytes == 0


def test_what_makes_no_sense_is_refused() -> None:
    for options, message in (
        ({"epsilon": 0.0}, "epsilon > 0"), ({"epsilon": -1.0}, "epsilon > 0"),
        ({"epsilon": math.inf}, "finite epsilon"), ({"epsilon": 1.0, "noise": 1.0}, "keep one"),
        ({"noise": -1.0}, "noise >= 0"), ({"clip": 0.0}, "both finite"),
        ({"clip": math.inf}, "both finite"), ({"batch_size": 0}, "both finite"),
        ({"delta": 0.0}, "0 < delta"), ({"delta": 1.0}, "delta < 1"),
        ({"mechanism": "uniform"}, "want 'gaussian' or 'laplace'"),
        ({"directions": "example"}, "no option 'directions'"),
    ):  # fmt: skip
        with pytest.raises(BadInput, match=message):
            method(**options)
    assert method(mechanism="laplace").estimator.delta == 0.0  # type: ignore[attr-defined]


def test_an_uncalibrated_noise_and_exact_gradients_stop_before_the_first_forward() -> None:
    with pytest.raises(BadInput, match="follows from a run's steps"):
        tuner(method(epsilon=1.0))
    model = small()
    space = spaces.parse("head(exact=True)").build(model)
    with pytest.raises(BadInput, match="gets no privacy noise"):
        Tuner(space, method(), 0)
