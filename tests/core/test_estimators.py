"""Estimators and shaping: statistics with the tolerance written out.

Run: pytest tests/core/test_estimators.py
"""

from __future__ import annotations

import math
from functools import lru_cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toys import cosine, float_block

from zotune.core import nouns
from zotune.core.estimator import Estimate, Estimator, OneSided, PerExample, TwoSided, estimator
from zotune.core.noise import Key
from zotune.core.perturbation import Gaussian, Perturbation, Rademacher
from zotune.core.probe import Losses
from zotune.core.shaping import Clip, Shaping, Sign, Standardize
from zotune.errors import BadInput

D, DRAWS = 50, 200_000
ALL: list[Estimator] = [k(0.1, q) for k in (TwoSided, OneSided, PerExample) for q in (1, 2, 5)]


def gradient(d: int = D) -> torch.Tensor:
    return torch.linspace(-1, 2, d, dtype=torch.float64)


@lru_cache(maxsize=2)
def directions(law: Perturbation, count: int, d: int = D) -> torch.Tensor:
    """(count, d) independent directions, float64."""
    return law.draw_lanes([Key(1, lane=i) for i in range(count)], float_block("w", d)).double()


# ---- identities of section 0 of the fact sheet, within 3 % ---------------------------


@pytest.mark.parametrize("queries", [1, 4])
def test_identity_1_the_estimate_is_unbiased_with_the_known_second_moment(queries: int) -> None:
    g, u = gradient(), directions(Gaussian(), DRAWS)
    estimates = ((u @ g).unsqueeze(1) * u).view(-1, queries, D).mean(1)
    assert cosine(estimates.mean(0), g) > 1 - 0.03
    assert float(estimates.mean(0) @ g / (g @ g)) == pytest.approx(1, rel=0.03)
    second = float(estimates.square().sum(1).mean() / (g @ g))
    assert second == pytest.approx(1 + (D + 1) / queries, rel=0.03)


@pytest.mark.parametrize("law", [Gaussian(), Rademacher()], ids=repr)
def test_identity_2_the_squared_cosine_with_the_gradient_is_one_over_d(law: Perturbation) -> None:
    g, u = gradient(), directions(law, DRAWS)
    cosines = (u @ g) / (u.norm(dim=1) * g.norm())
    assert float(cosines.square().mean()) == pytest.approx(1 / D, rel=0.03)


def test_identity_3_directions_in_a_basis_gain_what_the_basis_holds_of_the_gradient() -> None:
    m, n, r, draws = 5, 10, 2, 100_000
    generator = torch.Generator().manual_seed(0)
    G = torch.randn(m, 3, generator=generator, dtype=torch.float64)
    G = G @ torch.randn(3, n, generator=generator, dtype=torch.float64)
    A = torch.linalg.qr(torch.randn(n, r, generator=generator, dtype=torch.float64)).Q
    R = directions(Gaussian(), draws, m * r).view(draws, m, r)
    u = (R @ A.mT).flatten(1)
    cosines = (u @ G.flatten()) / (u.norm(dim=1) * G.norm())
    inside = float((G @ A).square().sum() / G.square().sum())
    assert float(cosines.square().mean()) == pytest.approx(inside / (m * r), rel=0.03)


def test_identity_4_second_moments_of_single_elements() -> None:
    g = gradient()
    for law, extra in ((Gaussian(), 2.0), (Rademacher(), 0.0)):
        u = directions(law, DRAWS)
        seconds = u.square().mT @ (u @ g).square() / DRAWS
        truth = (g @ g) + extra * g.square()
        assert torch.allclose(seconds, truth, rtol=0.03)
    one = directions(Rademacher(), 100)
    assert torch.allclose(((one @ g).unsqueeze(1) * one).square(), (one @ g).square().unsqueeze(1))


# ---- ask and tell --------------------------------------------------------------------


def losses_of(made: Estimator, f: torch.Tensor, key: Key, block: object, examples: int) -> Losses:
    """Losses of a linear function per example: rows of f are the examples' gradients."""
    rows = []
    for probe in made.ask(key):
        u = [
            Gaussian().draw(probe.key.fold(lane=b) if probe.per_example else probe.key, block)  # type: ignore[arg-type]
            for b in range(examples)
        ]
        rows.append(7 + probe.step * (f * torch.stack(u).double()).sum(1))
    return Losses(torch.stack(rows), torch.full((examples,), 1 / examples, dtype=torch.float64))


@pytest.mark.parametrize("made", ALL, ids=repr)
def test_coefficients_are_the_slopes_along_the_directions_of_their_keys(made: Estimator) -> None:
    block, examples, key = float_block("w", 6), 3, Key(4, step=9)
    f = torch.randn(examples, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    estimate = made.tell(key, losses_of(made, f, key, block, examples))
    assert estimate.keys == made.keys(key, len(estimate.coefficients))
    assert len(set(estimate.keys)) == len(estimate.keys)
    assert len(made.ask(key)) == made.forwards
    for k, c in zip(estimate.keys, estimate.coefficients, strict=True):
        slope = f[k.lane] if isinstance(made, PerExample) else f.mean(0)
        assert c == pytest.approx(float(Gaussian().draw(k, block).double() @ slope), abs=1e-9)
        assert k.step == 9


def test_a_direction_per_example_estimates_the_gradient_of_the_weighted_batch_loss() -> None:
    examples, queries = 4, 3000
    made, block, key = PerExample(0.1, queries), float_block("w", 6), Key(2)
    f = torch.randn(examples, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    keys = [key.fold(query=q, lane=b) for q in range(queries) for b in range(examples)]
    u = Gaussian().draw_lanes(keys, block).double().view(queries, examples, 6)
    slopes = (u * f).sum(2)
    pairs = torch.stack([0.1 * slopes, -0.1 * slopes], 1).view(2 * queries, examples)
    estimate = made.tell(key, Losses(pairs, weights))
    share = [c / len(keys) for c in estimate.coefficients]
    g = Gaussian().combine(estimate.keys, share, block, 0, 6).double()
    truth = (weights.unsqueeze(1) * f).sum(0)
    # Five standard errors of a mean of q sums of weighted (c_b u_b).
    spread = weights.unsqueeze(1) * slopes[0].new_ones(examples, 1) * f.norm(dim=1, keepdim=True)
    error = 5 * float(spread.square().sum().sqrt()) * math.sqrt(3 / queries)
    assert float((g - truth).abs().max()) < error
    assert cosine(g, truth) > 0.99


def test_the_variance_of_a_direction_per_example_is_that_of_as_many_queries() -> None:
    """B independent coefficients: E||g||^2 = (1 + (d + 1) / B) ||g||^2 for equal examples."""
    examples, steps, d = 8, 4000, 20
    g = gradient(d)
    u = directions(Gaussian(), steps * examples, d).view(steps, examples, d)
    slopes = u @ g
    estimates = []
    for t in range(steps):
        pair = torch.stack([slopes[t], -slopes[t]])
        even = torch.full((examples,), 1 / examples, dtype=torch.float64)
        c = torch.tensor(PerExample(1.0).tell(Key(0), Losses(pair, even)).coefficients)
        estimates.append((c.unsqueeze(1) * u[t]).mean(0))
    second = float(torch.stack(estimates).square().sum(1).mean() / (g @ g))
    assert second == pytest.approx(1 + (d + 1) / examples, rel=0.06)


@given(a=st.floats(-3, 3), b=st.floats(-3, 3), eps=st.floats(1e-3, 1))
def test_two_sides_have_no_error_on_a_parabola_and_one_side_has_half_eps_b(
    a: float, b: float, eps: float
) -> None:
    def f(x: float) -> float:
        return 5 + a * x + b * x * x

    two = TwoSided(eps).tell(Key(0), Losses.of([f(eps), f(-eps)])).coefficients[0]
    one = OneSided(eps).tell(Key(0), Losses.of([f(0), f(eps)])).coefficients[0]
    assert two == pytest.approx(a, abs=1e-14 / eps + 1e-12)
    assert one == pytest.approx(a + eps * b, abs=1e-14 / eps + 1e-12)


def test_the_reported_loss_is_that_of_the_points_seen() -> None:
    assert TwoSided(0.1).tell(Key(0), Losses.of([3.0, 1.0])).loss == 2.0
    assert OneSided(0.1).tell(Key(0), Losses.of([3.0, 1.0])).loss == 3.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e39])
def test_an_estimate_that_is_not_finite_in_float32_says_so(bad: float) -> None:
    assert not Estimate(Key(0), (Key(0),), (bad,), 1.0).finite
    assert not Estimate(Key(0), (Key(0),), (1.0,), math.nan).finite
    assert Estimate(Key(0), (Key(0),), (1e-3,), 1.0).finite


def test_estimators_refuse_what_makes_no_sense() -> None:
    for kind in (TwoSided, OneSided, PerExample):
        for eps in (0.0, -1.0, math.nan):
            with pytest.raises(BadInput, match="eps > 0"):
                kind(eps)
        with pytest.raises(BadInput, match="at least 1"):
            kind(0.1, 0)
        assert eval(repr(kind(0.1, 2)), vars(nouns).copy()) == kind(0.1, 2)
    with pytest.raises(BadInput, match="batch, one-sided, example"):
        estimator("both", 0.1, 1)
    assert estimator("one-sided", 0.1, 2) == OneSided(0.1, 2)


# ---- shaping -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "shrink"), [(0.25, 0.197), (0.5, 0.383), (1.0, 0.683), (2.0, 0.955)]
)
def test_clipping_shrinks_the_mean_step_and_nothing_else(ratio: float, shrink: float) -> None:
    """E[clip(c) u] = erf(C / (sqrt 2 ||g||)) g: the table of QZO's section."""
    g, u = gradient(), directions(Gaussian(), DRAWS)
    c = Clip(ratio * float(g.norm()))(u @ g)
    mean = u.mT @ c / DRAWS
    assert float(mean @ g / (g @ g)) == pytest.approx(shrink, abs=0.005)
    assert shrink == pytest.approx(math.erf(ratio / math.sqrt(2)), abs=0.001)
    assert cosine(mean, g) > 0.999


SHAPINGS: list[Shaping] = [Clip(1.0), Sign(), Standardize()]


@pytest.mark.parametrize("shaping", SHAPINGS, ids=repr)
def test_shaping_takes_degenerate_coefficients(shaping: Shaping) -> None:
    one = torch.tensor([-0.25], dtype=torch.float64)
    assert float(shaping(one)) < 0
    for zeros in (1, 3):
        assert shaping(torch.zeros(zeros, dtype=torch.float64)).tolist() == [0.0] * zeros
    tiny = shaping(torch.full((2,), 1e-300, dtype=torch.float64))
    assert bool(tiny.isfinite().all())
    huge = shaping(torch.full((2,), 1e300, dtype=torch.float64))
    assert bool(huge.isfinite().all())
    assert eval(repr(shaping), vars(nouns).copy()) == shaping


@given(
    st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=6).filter(lambda c: max(map(abs, c)) > 1e-3)
)
def test_standardized_coefficients_have_rms_one_and_keep_their_signs_and_ratios(
    c: list[float],
) -> None:
    before = torch.tensor(c, dtype=torch.float64)
    after = Standardize()(before)
    assert float(after.square().mean()) == pytest.approx(1)
    assert cosine(before, after) == pytest.approx(1)
    assert torch.equal(after.sign(), before.sign())


def test_a_single_coefficient_is_standardized_to_its_sign_and_clip_wants_a_limit() -> None:
    assert Standardize()(torch.tensor([-3.0])).tolist() == [-1.0]
    for limit in (0.0, -1.0, math.nan):
        with pytest.raises(BadInput, match="want > 0"):
            Clip(limit)
