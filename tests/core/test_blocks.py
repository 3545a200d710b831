"""Blocks: the only writers of parameters. Run: pytest tests/core/test_blocks.py"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toys import float_block, keys, point, small

from zotune.core.block import Block, CodeBlock, FloatBlock, Owner
from zotune.core.noise import Key
from zotune.core.perturbation import Gaussian
from zotune.core.spaces import Codes, Scales
from zotune.errors import BadInput
from zotune.quant import QuantLinear, Scheme

HALVES = [torch.bfloat16, torch.float16]
SCHEMES = ["int2-channel", "int3-channel", "int4-g4", "int8-tensor", "int4-g4-asym"]
scheme_of = st.sampled_from(SCHEMES)


def half_block(dtype: torch.dtype, value: float, n: int, keep_master: bool) -> FloatBlock:
    return FloatBlock.of("w", torch.full((n,), value, dtype=dtype), keep_master=keep_master)


def code_block(scheme: str, rows: int = 4, columns: int = 12, seed: int = 0) -> CodeBlock:
    parsed = Scheme.parse(scheme)
    layer = QuantLinear(columns, rows, parsed)
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(
        parsed.lowest, parsed.highest + 1, (rows, columns), generator=generator, dtype=torch.int8
    )
    layer.set_codes_(codes)
    return CodeBlock.of("w.codes", Owner("w", layer, "codes"))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("keep_master", [True, False])
def test_a_thousand_small_steps_add_up_in_sixteen_bits(
    dtype: torch.dtype, keep_master: bool
) -> None:
    n, tiny = 4096, 1e-6  # a hundredth of the spacing at 0.02 in bf16, a fifteenth in fp16
    block = half_block(dtype, 0.02, n, keep_master)
    start = block.value().double().mean()
    for key in keys(1000):
        block.move_(0, n, torch.full((n,), tiny), key)
    moved = float(start - block.value().double().mean())
    # The mean of n roundings, each with a spread of a few spacings of the dtype.
    spacing = 2.0**-13 if dtype == torch.bfloat16 else 2.0**-16
    assert abs(moved - 1e-3) < (spacing / 2 if keep_master else 5 * 3 * spacing / math.sqrt(n))
    lost = torch.full((n,), 0.02, dtype=dtype)
    for _ in range(10):
        lost -= tiny
    assert torch.equal(lost, torch.full((n,), 0.02, dtype=dtype))  # what plain subtraction does


@pytest.mark.parametrize("dtype", HALVES)
@given(
    value=st.floats(-3, 3, width=16).filter(lambda v: abs(v) > 1e-3), step=st.floats(-0.01, 0.01)
)
def test_stochastic_rounding_of_sixteen_bits_is_unbiased(
    dtype: torch.dtype, value: float, step: float
) -> None:
    n = 20_000
    block = half_block(dtype, value, n, keep_master=False)
    before = float(block.value()[0])
    block.move_(0, n, torch.full((n,), step), Key(3))
    after = block.value().double()
    target = float(torch.tensor(before, dtype=torch.float32) - torch.tensor(step))
    assert len(after.unique()) <= 2
    gap = float(after.max() - after.min())
    assert abs(float(after.mean()) - target) <= 5 * max(gap, 1e-7) / 2 / math.sqrt(n) + 1e-7


@pytest.mark.parametrize("dtype", HALVES)
def test_values_on_the_grid_stay_when_the_step_is_zero(dtype: torch.dtype) -> None:
    values = torch.linspace(-2, 2, 999).to(dtype)
    block = FloatBlock.of("w", values.clone(), keep_master=False)
    block.move_(0, 999, torch.zeros(999), Key(1))
    assert torch.equal(block.value(), values)


@given(shape=st.lists(st.integers(1, 9), max_size=3).map(tuple), cut=st.integers(0, 9),
       dtype=st.sampled_from((torch.float64, torch.float32, torch.bfloat16, torch.float16)),
       keep_master=st.booleans())  # fmt: skip
def test_moving_in_runs_of_rows_is_moving_at_once(
    shape: tuple[int, ...], cut: int, dtype: torch.dtype, keep_master: bool
) -> None:
    generator = torch.Generator().manual_seed(len(shape))
    start = torch.randn(shape, generator=generator).to(dtype)
    step = torch.randn(shape, generator=generator) * 1e-3
    whole, pieces = (FloatBlock.of("w", start.clone(), keep_master=keep_master) for _ in range(2))
    whole.move_(0, whole.rows, step.clone(), Key(1))
    cut = min(cut, pieces.rows)
    for low, high in ((0, cut), (cut, pieces.rows)):
        if high > low:
            pieces.move_(low, high, (step[low:high] if shape else step).clone(), Key(1))
    assert torch.equal(whole.value(), pieces.value())
    assert whole.value().dtype == dtype
    if dtype in (torch.float32, torch.float64):
        assert torch.equal(whole.value(), start - step)


def test_a_float64_block_keeps_its_precision() -> None:
    start = torch.full((3,), 1 + 2.0**-40, dtype=torch.float64)
    block = FloatBlock.of("w", start.clone())
    block.move_(0, 3, torch.full((3,), 0.5), Key(0))
    assert torch.equal(block.value(), start - 0.5)
    assert torch.equal(block.at(torch.ones(3), 2.0**-30), start - 0.5 + 2.0**-30)


@given(scheme=scheme_of, step=st.floats(-3, 3), seed=st.integers(0, 99))
def test_codes_move_by_whole_codes_unbiased_and_stay_in_range(
    scheme: str, step: float, seed: int
) -> None:
    block = code_block(scheme, 40, 100, seed) if "g4" not in scheme else code_block(scheme, 50, 80)
    low, high = block.limits
    before = block.value().double()
    block.move_(0, block.rows, torch.full(block.shape, step), Key(seed))
    after = block.value().double()
    assert float(after.min()) >= low
    assert float(after.max()) <= high
    free = (before - math.floor(step) - 1 >= low) & (before - math.floor(step) <= high)
    free &= (before - step - 1 >= low) & (before - step + 1 <= high)
    moved = (before - after)[free]
    if len(moved):
        assert set(moved.unique().tolist()) <= {math.floor(step), math.floor(step) + 1.0}
        chance = step - math.floor(step)
        error = math.sqrt(chance * (1 - chance) / len(moved))
        assert abs(float(moved.mean()) - step) <= 5 * error + 5 / len(moved)


@given(scheme=scheme_of, cut=st.integers(0, 5), seed=st.integers(0, 99))
def test_codes_moved_in_runs_are_codes_moved_at_once(scheme: str, cut: int, seed: int) -> None:
    whole, pieces = code_block(scheme, 5, 12, seed), code_block(scheme, 5, 12, seed)
    step = torch.randn(5, 12, generator=torch.Generator().manual_seed(seed))
    whole.move_(0, 5, step.clone(), Key(seed))
    for low, high in ((0, cut), (cut, 5)):
        if high > low:
            pieces.move_(low, high, step[low:high].clone(), Key(seed))
    assert torch.equal(whole.state(), pieces.state())


@given(scheme=scheme_of, step=st.sampled_from((-2.0, -1.0, -0.37, 0.25, 1.0, 2.5)))
def test_a_probe_sees_codes_in_range_and_integers_stay_integers(scheme: str, step: float) -> None:
    block = code_block(scheme)
    before = block.state().clone()
    u = Gaussian().draw(Key(1), block).round()
    seen = block.at(u, step)
    low, high = block.limits
    assert torch.equal(seen.float(), (block.value().float() + step * u).clamp(low, high))
    assert seen.dtype == (
        torch.int8 if torch.equal(seen.float(), seen.float().round()) else seen.dtype
    )
    if step == int(step):
        assert seen.dtype == torch.int8
    assert torch.equal(block.state(), before)


@given(eps=st.floats(1e-3, 100), seed=st.integers(0, 50))
def test_scales_stay_positive_in_probes_and_after_steps(eps: float, seed: int) -> None:
    space = Scales().build(small(0, "int4-g8"))
    space.bind_(eps, 1.0, "relative")
    for block in space:
        u = Gaussian().draw(Key(seed), block)
        for step in (eps, -eps):
            assert float(block.at(u, step).min()) > 0
        block.move_(0, block.rows, 10 * u, Key(seed))
        assert float(block.value().min()) > 0


def test_a_relative_eps_counts_in_each_scales_own_size() -> None:
    space = Scales().build(small(0, "int4-g8"))
    space.bind_(0.01, 1.0, "relative")
    for block in space:
        ratio = block.at(torch.ones(block.shape), 0.01) / block.value()
        assert torch.allclose(ratio, torch.full_like(ratio, 1.01))
    space.bind_(0.01, 1.0, "absolute")
    for block in space:
        shift = block.at(torch.ones(block.shape), 0.01) - block.value()
        assert torch.allclose(shift, torch.full_like(shift, 0.01), atol=1e-7)


def test_every_code_has_the_weight_of_its_own_scale() -> None:
    for scheme in SCHEMES:
        block = code_block(scheme)
        block.module.scale.copy_(
            torch.arange(1.0, 1 + block.module.scale.numel()).view_as(block.module.scale)
        )
        shifted = block.module.dequantize()
        block.move_(0, block.rows, -torch.ones(block.shape), Key(0))
        change = block.module.dequantize() - shifted
        free = block.value() < block.limits[1]
        assert torch.allclose(change[free], block.grid.expand(block.shape)[free])


@given(dtype=st.sampled_from((torch.float32, torch.bfloat16)), keep_master=st.booleans())
def test_decay_shrinks_a_block_by_its_factor(dtype: torch.dtype, keep_master: bool) -> None:
    n = 5000
    block = half_block(dtype, 1.5, n, keep_master)
    block.decay_(0.01, Key(0))
    assert abs(float(point(block).mean()) - 1.5 * 0.99) < 5 * 2.0**-7 / math.sqrt(n)


def test_codes_have_no_decay_and_integers_are_no_float_block() -> None:
    with pytest.raises(BadInput, match="codes have no decay"):
        code_block("int4-g4").decay_(0.1, Key(0))
    with pytest.raises(BadInput, match="'codes' space"):
        FloatBlock.of("w", torch.zeros(3, dtype=torch.int8))


@pytest.mark.parametrize("space", [Codes(), Scales()], ids=repr)
def test_state_and_load_restore_a_block_bit_for_bit(space: Codes | Scales) -> None:
    built = space.build(small(0, "int3-channel"))
    before = {k: v.clone() for k, v in built.state().items()}
    for block in built:
        block.move_(0, block.rows, torch.full(block.shape, 0.7), Key(2))
    assert any(not torch.equal(before[k], v) for k, v in built.state().items())
    built.load_(before)
    assert all(torch.equal(before[k], v) for k, v in built.state().items())


def test_a_master_and_its_sixteen_bit_tensor_are_restored_together() -> None:
    block = half_block(torch.bfloat16, 0.3, 5, True)
    block.move_(0, 5, torch.full((5,), 1e-5), Key(0))
    state = block.state().clone()
    other = half_block(torch.bfloat16, 7.0, 5, True)
    other.load_(state)
    assert torch.equal(other.value(), block.value())
    assert torch.equal(other.state(), state)


def test_reach_and_stride_follow_unit_eps_and_lr() -> None:
    def bound(units: str, **options: float) -> Block:
        block = float_block("w", 2, unit=3.0, **options)
        block.bind_(0.1, 0.01, units)
        return block

    assert (bound("relative").reach, bound("relative").stride) == (3.0, 3.0)
    assert (bound("absolute").reach, bound("absolute").stride) == (1.0, 1.0)
    own = bound("relative", eps=0.2, lr=0.05)
    assert (own.reach, own.stride) == pytest.approx((6.0, 15.0))
