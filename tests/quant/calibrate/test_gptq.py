"""GPTQ against its formula, column by column in float64, and against rounding to nearest."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from zotune.errors import BadInput
from zotune.quant.affine import dequantize, fit
from zotune.quant.calibrate.gptq import Gptq
from zotune.quant.calibrate.method import Grid, Rounded
from zotune.quant.scheme import Scheme


def drawn(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight and the second moments of correlated inputs, float64."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    x = torch.randn(4 * columns, columns, generator=generator, dtype=torch.float64) @ mix
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return weight, x.t() @ x / len(x)


def naive(weight: Tensor, gram: Tensor, scheme: Scheme, damping: float) -> Tensor:
    """The paper's update as it stands: the inverse loses a row and a column at every step."""
    rest, out = weight.clone(), torch.empty_like(weight)
    columns = weight.shape[1]
    diagonal = damping * gram.diagonal().mean() * torch.eye(columns, dtype=gram.dtype)
    inverse = torch.linalg.inv(gram + diagonal)
    size = scheme.group_size or columns
    per_row = Scheme(scheme.bits, scheme.symmetric, None, "channel")
    for q in range(columns):
        if q % size == 0:
            source = rest if scheme.group_size else weight
            scale, zero = fit(source[:, q : q + size], per_row)
            shift = 0.0 if zero is None else zero[:, 0].double()
        code = (rest[:, q] / scale[:, 0].double() + shift).round()
        code = code.clamp(scheme.lowest, scheme.highest)
        out[:, q] = (code - shift) * scale[:, 0].double()
        error = (rest[:, q] - out[:, q]) / inverse[q, q]
        rest = rest - error[:, None] * inverse[q]
        inverse = inverse - torch.outer(inverse[:, q], inverse[q]) / inverse[q, q]
        inverse[q, q] = 1.0  # gone; never divided by again
    return out


def restored(values: Rounded, scheme: Scheme) -> Tensor:
    weight = dequantize(values.codes, values.scale, values.zero, scheme.group_size).double()
    if values.order is None:
        return weight
    return torch.empty_like(weight).index_copy_(1, values.order.long(), weight)


def loss(weight: Tensor, new: Tensor, gram: Tensor) -> float:
    error = new - weight
    return float(((error @ gram) * error).sum())


@given(
    scheme=st.sampled_from(["int4-g4", "int3-g8-asym", "int2-channel", "int4-channel-asym"]),
    rows=st.integers(1, 5),
    groups=st.integers(1, 4),
    block=st.sampled_from([1, 3, 8, 128]),
    seed=st.integers(0, 5),
)
def test_blocks_and_cholesky_give_what_the_formula_gives(
    scheme: str, rows: int, groups: int, block: int, seed: int
) -> None:
    parsed = Scheme.parse(scheme)
    weight, gram = drawn(rows, 8 * groups, seed)
    values = Gptq(block=block).round(weight, Grid(parsed), gram, "w")
    wanted = naive(weight, gram, parsed, 0.01)
    torch.testing.assert_close(restored(values, parsed), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scheme", ["int4-g8", "int3-g16-asym", "int2-channel"])
@pytest.mark.parametrize(
    "method", [Gptq(), Gptq(act_order=True), Gptq(act_order=True, static_groups=False)]
)
def test_errors_of_outputs_are_well_below_those_of_rounding(scheme: str, method: Gptq) -> None:
    parsed = Scheme.parse(scheme)
    weight, gram = drawn(32, 64)
    rounded = restored(Grid(parsed).round(weight), parsed)
    made = restored(method.round(weight, Grid(parsed), gram, "w"), parsed)
    assert loss(weight, made, gram) < 0.6 * loss(weight, rounded, gram)


def test_static_groups_need_no_order_and_keep_the_grid_of_the_weights() -> None:
    parsed = Scheme.parse("int4-g8-asym")
    weight, gram = drawn(6, 32)
    values = Gptq(act_order=True).round(weight, Grid(parsed), gram, "w")
    scale, zero = fit(weight, parsed)
    assert values.order is None
    assert zero is not None
    assert torch.equal(values.scale, scale)
    assert values.zero is not None
    assert torch.equal(values.zero, zero)


def test_act_order_without_static_groups_says_which_columns_lie_together() -> None:
    weight, gram = drawn(6, 32)
    method = Gptq(act_order=True, static_groups=False)
    values = method.round(weight, Grid(Scheme.parse("int4-g8")), gram, "w")
    assert values.order is not None
    assert torch.equal(values.order.long(), gram.diagonal().argsort(descending=True, stable=True))


def test_inputs_that_were_always_zero_keep_their_nearest_weights() -> None:
    parsed = Scheme.parse("int4-channel")
    weight, gram = drawn(4, 16)
    gram[5], gram[:, 5] = 0.0, 0.0
    values = Gptq().round(weight, Grid(parsed), gram, "w")
    assert torch.equal(values.codes[:, 5], Grid(parsed).round(weight).codes[:, 5])


def test_moments_of_rank_one_are_damped_until_they_can_be_inverted() -> None:
    weight, _ = drawn(4, 16)
    values = Gptq(damping=1e-12).round(
        weight.float(), Grid(Scheme.parse("int4-channel")), torch.ones(16, 16), "w"
    )
    assert torch.isfinite(values.scale).all()


def test_what_cannot_be_calibrated_is_refused() -> None:
    weight, gram = drawn(4, 16)
    gram[0, 0] = torch.nan
    with pytest.raises(BadInput, match="inputs of 'fc'"):
        Gptq().round(weight, Grid(Scheme.parse("int4-channel")), gram, "fc")
    with pytest.raises(BadInput, match="damping"):
        Gptq(damping=0.0)
    with pytest.raises(BadInput, match="block"):
        Gptq(block=0)
