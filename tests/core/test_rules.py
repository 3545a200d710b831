"""Rules: one block's g to one block's step. Run: pytest tests/core/test_rules.py"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from toys import float_block, small

from zotune.core import nouns
from zotune.core.rule import SGD, Adam, GridSign, MomentumSGD, Rule, SignSGD
from zotune.core.spaces import Codes
from zotune.errors import BadInput

BLOCK = float_block("w", 40)


def grads(count: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(40, generator=generator) * 10.0 ** (t % 3 - 1) for t in range(count)]


def stepped(rule: Rule, gs: list[Tensor], lr: float = 0.1) -> list[Tensor]:
    """The step of each t, with the gradients of the past on demand."""
    state, steps = rule.state(BLOCK, BLOCK.shape), []
    for t in range(1, len(gs) + 1):
        past: Callable[[int], Tensor] = lambda k, t=t: gs[t - 1 - k].clone()  # noqa: E731
        steps.append(rule.step(past, state, t, lr, BLOCK, 0))
    return steps


def test_sgd_is_lr_times_g() -> None:
    gs = grads(3)
    for step, g in zip(stepped(SGD(), gs), gs, strict=True):
        assert torch.equal(step, 0.1 * g)


@given(
    lr=st.floats(1e-8, 10), values=st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=9)
)
def test_sign_moves_every_element_that_has_a_slope_by_lr(lr: float, values: list[float]) -> None:
    g = torch.tensor(values)
    step = SignSGD().step(lambda k: g.clone(), {}, 1, lr, float_block("w", len(values)), 0)
    assert torch.equal(step.abs(), torch.where(g == 0, 0.0, torch.tensor(lr, dtype=torch.float32)))
    assert torch.equal(step.sign(), g.sign())


def test_momentum_is_a_running_mean_from_zero() -> None:
    gs, b1 = grads(6), 0.8
    for t, step in enumerate(stepped(MomentumSGD(b1), gs)):
        weights = [(1 - b1) * b1 ** (t - k) for k in range(t + 1)]
        m = sum((w * g.double() for w, g in zip(weights, gs, strict=False)), torch.zeros(40))
        assert torch.allclose(step.double(), 0.1 * m, rtol=1e-5, atol=1e-6)
    with pytest.raises(BadInput, match="want"):
        MomentumSGD(1.0)


@pytest.mark.parametrize(("b1", "b2"), [(0.9, 0.999), (0.7, 0.9), (0.0, 0.5)])
def test_stored_adam_is_torchs_adam_on_the_same_gradients(b1: float, b2: float) -> None:
    gs = grads(50)
    parameter = torch.zeros(40, dtype=torch.float64, requires_grad=True)
    truth = torch.optim.Adam([parameter], lr=0.1, betas=(b1, b2))
    for step, g in zip(stepped(Adam(b1, b2), gs), gs, strict=True):
        before = parameter.detach().clone()
        parameter.grad = g.double()
        truth.step()
        wanted = before - parameter.detach()
        assert float((step - wanted).norm() / wanted.norm()) < 1e-6


@pytest.mark.parametrize("history", [1, 7, 20])
def test_rebuilt_adam_is_stored_adam_while_it_remembers_everything(history: int) -> None:
    gs = grads(history)
    stored = stepped(Adam(0.7, 0.9), gs)
    rebuilt = stepped(Adam(0.7, 0.9, moments="rebuilt", history=history), gs)
    for a, b in zip(stored, rebuilt, strict=True):
        assert torch.equal(a, b)


def test_rebuilt_adam_forgets_what_is_older_than_its_window() -> None:
    gs, window, b1, b2 = grads(12), 4, 0.7, 0.9
    last = stepped(Adam(b1, b2, moments="rebuilt", history=window), gs)[-1].double()
    kept = [g.double() for g in gs[-window:]]
    age = range(window - 1, -1, -1)
    m = (1 - b1) * sum((b1**a * g for a, g in zip(age, kept, strict=True)), torch.zeros(40))
    v = (1 - b2) * sum((b2**a * g * g for a, g in zip(age, kept, strict=True)), torch.zeros(40))
    m_hat, v_hat = m / (1 - b1**window), v / (1 - b2**window)
    assert torch.allclose(last, 0.1 * m_hat / (v_hat.sqrt() + 1e-8), rtol=1e-5)


def test_adam_takes_gradients_of_zero_and_refuses_impossible_settings() -> None:
    for rule in (Adam(), Adam(moments="rebuilt")):
        assert not stepped(rule, [torch.zeros(40)])[0].any()
    for options in ({"b1": 1.0}, {"b2": -0.1}, {"moments": "kept"}, {"history": 0}):
        with pytest.raises(BadInput, match="want"):
            Adam(**options)  # type: ignore[arg-type]


def test_the_window_is_what_a_rule_wants_to_see() -> None:
    assert SGD().window == SignSGD().window == Adam().window == 1
    assert Adam(moments="rebuilt", history=9).window == 9
    assert Adam(moments="rebuilt").state(BLOCK, BLOCK.shape) == {}


@given(lr=st.floats(0.01, 9.99))
def test_a_step_on_the_grid_is_a_whole_number_of_codes_and_at_least_one(lr: float) -> None:
    g = torch.tensor([-2.0, 0.0, 0.5])
    step = GridSign().step(lambda k: g.clone(), {}, 1, lr, float_block("w", 3), 0)
    whole = max(lr // 1, 1)
    assert step.tolist() == [-whole, 0.0, whole]


def test_a_grid_step_of_an_absolute_size_counts_each_codes_own_worth() -> None:
    (block, *_) = Codes().build(small(0, "int4-g8"))
    assert block.grid is not None
    lr = float(block.grid.mean() * 3)
    g = torch.ones(block.shape)
    step = GridSign(relative=False).step(lambda k: g.clone(), {}, 1, lr, block, 0)
    assert torch.equal(step, (lr / block.grid).floor().clamp_min(1).expand_as(step))
    part = GridSign(relative=False).step(lambda k: g[2:5].clone(), {}, 1, lr, block, 2)
    assert torch.equal(part, step[2:5])


def test_without_a_learning_rate_nothing_moves_and_without_a_grid_there_is_no_grid_step() -> None:
    still = GridSign().step(lambda k: torch.ones(3), {}, 1, 0.0, float_block("w", 3), 0)
    assert not still.any()
    with pytest.raises(BadInput, match="no grid"):
        GridSign(relative=False).step(lambda k: torch.ones(3), {}, 1, 1.0, float_block("w", 3), 0)


def test_rules_are_rebuilt_from_their_repr() -> None:
    for rule in (
        SGD(),
        MomentumSGD(0.5),
        SignSGD(),
        GridSign(False),
        Adam(0.7, 0.9, moments="rebuilt", history=3),
    ):
        assert eval(repr(rule), vars(nouns).copy()) == rule
