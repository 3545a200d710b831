"""The CPU's updates in one sweep against `Block.move_`. Run: pytest tests/core/test_sweep_cpu.py"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from zotune.core import floats_cpu, sweep_cpu
from zotune.core.block import FloatBlock
from zotune.core.estimator import TwoSided
from zotune.core.method import Method
from zotune.core.noise import Key
from zotune.core.perturbation import Gaussian, Perturbation, Rademacher, Uniform
from zotune.core.probe import Losses
from zotune.core.rule import SGD, Rule, SignSGD
from zotune.core.space import tensors
from zotune.core.step import Tuner
from zotune.core.sweep import Sweeps


def moved(
    values: Tensor, law: Perturbation, rule: Rule, queries: int, lr: float, swept: bool,
    minimum: float | None = None,
) -> Tensor:  # fmt: skip
    """These values after two steps."""
    space = tensors({"w": values.clone()}, unit=0.3, keep_master=False, minimum=minimum)
    method = Method("mine", TwoSided(1e-3, queries), law, rule, lr=lr)
    tuner = Tuner(space, method, seed=5)
    if not swept:
        tuner.moves.sweeps = lambda *_: frozenset()  # type: ignore[assignment]
    for k in range(2):
        losses = [1.0 + 0.1 * j + k for j in range(2 * queries)]
        tuner.tell(Losses.of(losses))
    block = space.blocks[0]
    assert isinstance(block, FloatBlock)
    return block.tensor


@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(1, 90), columns=st.integers(1, 90), dtype=st.sampled_from(("f", "b")),
    law=st.sampled_from((Gaussian(), Rademacher(), Uniform())),
    rule=st.sampled_from((SGD(), SignSGD())), queries=st.integers(1, 3),
    lr=st.sampled_from((0.0, 1e-6, 1e-2, 3.0)), bounded=st.booleans(), grain=st.integers(1, 400),
    seed=st.integers(0, 2**31),
)  # fmt: skip
def test_a_sweep_leaves_the_bits_of_the_slow_way(
    rows: int, columns: int, dtype: str, law: Perturbation, rule: Rule, queries: int, lr: float,
    bounded: bool, grain: int, seed: int,
) -> None:  # fmt: skip
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    values[0, 0] = 0.0
    values = values.bfloat16() if dtype == "b" else values
    minimum = -0.5 if bounded else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep_cpu, "GRAIN", grain)
        patch.setattr(torch, "get_num_threads", lambda: 3)
        fast = moved(values, law, rule, queries, lr, True, minimum)
    assert torch.equal(fast, moved(values, law, rule, queries, lr, False, minimum))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sweep_is_what_runs(dtype: torch.dtype) -> None:
    space = tensors({"w": torch.zeros(4, 4, dtype=dtype)}, keep_master=False)
    method = Method("mine", lr=1e-2)
    tuner = Tuner(space, method, seed=0)
    estimate = method.estimator.tell(Key(0), Losses.of([2.0, 1.0]))
    assert Sweeps()(space, method, estimate, tuner.lr) == {"w"}


def test_decay_masters_and_half_precision_go_the_slow_way() -> None:
    estimate = TwoSided(1e-3).tell(Key(0), Losses.of([2.0, 1.0]))
    for options, dtype, decay in (
        ({"decay": True}, torch.float32, 0.1),
        ({}, torch.bfloat16, 0.0),
        ({"keep_master": False}, torch.float16, 0.0),
    ):
        space = tensors({"w": torch.zeros(4, 4, dtype=dtype)}, **options)
        method = Method("mine", lr=1e-2, weight_decay=decay)
        Tuner(space, method, seed=0)
        assert not Sweeps()(space, method, estimate, 1e-2)


def test_odd_numbers_stay_odd() -> None:
    values = torch.tensor([[float("nan"), float("inf"), -float("inf"), 0.0]]).bfloat16()
    for swept in (True, False):
        out = moved(values, Gaussian(), SGD(), 1, 1e-2, swept)
        assert out[0, 0].isnan()
        assert out[0, 1:3].tolist() == [float("inf"), -float("inf")]


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(0, 30), min_size=1, max_size=3), step=st.floats(-4, 4, width=32),
    bounded=st.booleans(), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_a_probe_sees_the_nearest_bfloat16(
    shape: list[int], step: float, bounded: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    values, u = (torch.randn(*shape, generator=generator) for _ in range(2))
    values = values.bfloat16()
    found = floats_cpu.shifted(values, u, step, 0.1 if bounded else None)
    truth = values.double() + step * u.double()
    truth = truth.clamp_min(0.1) if bounded else truth
    assert found.shape == values.shape
    away = (found.double() - truth).abs() - 2**-8 * 1.01 * truth.abs()
    assert (away <= 1e-7).all()  # half a unit of the last place, and the sum's own rounding
