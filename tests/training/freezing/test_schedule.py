"""When layers are frozen, and how alike features are."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zotune.errors import BadInput
from zotune.training.freezing.schedule import Fixed, Rate, Similar, parse_freeze
from zotune.training.freezing.similarity import linear_cka, similarity, svcca


def test_fixed_shares_are_in_force_from_their_step_on() -> None:
    plan = parse_freeze("0.5@3, .67@10")
    assert isinstance(plan, Fixed)
    assert [plan.depth(step, 12) for step in (0, 2, 3, 9, 10, 99)] == [0, 0, 6, 6, 8, 8]
    assert parse_freeze(str(plan)) == plan
    assert eval(repr(plan)) == plan


def test_rules_have_their_options() -> None:
    assert parse_freeze("svcca(threshold=0.9, most=0.5)") == Similar("svcca", 0.9, 50, 0.5)
    assert parse_freeze("rate(every=7)") == Rate(every=7)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("0.5@", "want share@step"),
        ("half@3", "want share@step"),
        ("1.5@3", "0 < share <= 1"),
        ("0@3", "0 < share <= 1"),
        ("0.5@3,0.5@9", "must rise"),
        ("0.5@9,0.7@3", "must rise"),
        ("cca", "did you mean svcca or cka"),
        ("cka(many=1)", "options are threshold, every and most"),
        ("cka(threshold=2)", "want a similarity"),
        ("rate(threshold=0)", "above 0"),
        ("rate(every=0)", "at least 1 step"),
        ("rate(most=0)", "a share of the layers"),
        ("cka + rate", "cannot read"),
    ],
)
def test_schedules_that_cannot_be_meant_are_refused(text: str, told: str) -> None:
    with pytest.raises(BadInput, match=told):
        parse_freeze(text)


def _drawn(seed: int, rows: int = 40, width: int = 6) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def test_linear_cka_is_its_formula_in_float64() -> None:
    x, y = _drawn(0).double(), _drawn(1, width=9).double()
    a, b = x - x.mean(0), y - y.mean(0)
    wanted = (b.T @ a).norm() ** 2 / ((a.T @ a).norm() * (b.T @ b).norm())
    assert linear_cka(x, y) == pytest.approx(float(wanted), rel=1e-12)


@given(seed=st.integers(0, 50), scale=st.floats(0.01, 100))
@pytest.mark.parametrize("measure", ["cka", "svcca"])
def test_rotating_and_scaling_features_changes_nothing(
    measure: str, seed: int, scale: float
) -> None:
    x = _drawn(seed)
    turned = scale * x @ torch.linalg.qr(_drawn(seed + 1, 6)).Q + 3
    assert similarity(measure, x, turned) == pytest.approx(1, abs=1e-4)  # type: ignore[arg-type]


def test_other_features_are_less_alike() -> None:
    x, noise = _drawn(0), _drawn(1)
    for measure in (linear_cka, svcca):
        values = [measure(x, x + share * noise) for share in (0.1, 1.0, 10.0)]
        assert 1 > values[0] > values[1] > values[2] >= 0


def test_features_that_do_not_vary_are_alike_to_each_other_only() -> None:
    flat = torch.ones(40, 6)
    for measure in (linear_cka, svcca):
        assert measure(flat, 2 * flat) == 1
        assert measure(flat, _drawn(0)) == 0
