"""Quantization to uniform grids. Run: pytest tests/quant/test_affine.py"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zotune.errors import BadInput
from zotune.quant.affine import EMPTY_SCALE, dequantize, quantize
from zotune.quant.scheme import Scheme, nearest_divisors

BITS = st.sampled_from((2, 3, 4, 5, 6, 7, 8))


@st.composite
def schemes(draw: st.DrawFn) -> Scheme:
    granularity = draw(st.sampled_from(("group", "channel", "tensor")))
    return Scheme(
        bits=draw(BITS),
        symmetric=draw(st.booleans()),
        group_size=draw(st.integers(1, 9)) if granularity == "group" else None,
        granularity=granularity,
        **draw(st.sampled_from(({}, *({"act_bits": n, "act_symmetric": even}
               for n in (4, 6, 8) for even in (True, False))))),
    )  # fmt: skip


def weights(seed: int, rows: int, columns: int, spread: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * 10**spread


@given(schemes())
def test_a_scheme_is_rebuilt_from_its_text_and_its_repr(scheme: Scheme) -> None:
    assert Scheme.parse(str(scheme)) == scheme
    assert eval(repr(scheme)) == scheme


@given(
    scheme=schemes(),
    rows=st.integers(0, 5),
    groups=st.integers(1, 4),
    seed=st.integers(0, 2**31),
    spread=st.floats(-6, 6),
)
def test_error_is_at_most_half_a_scale(
    scheme: Scheme, rows: int, groups: int, seed: int, spread: float
) -> None:
    columns = groups * (scheme.group_size or 5)
    weight = weights(seed, rows, columns, spread)
    codes, scale, zero = quantize(weight, scheme)
    assert codes.dtype == torch.int8
    assert codes.shape == weight.shape
    assert scale.dtype == torch.float32
    assert scale.shape == scheme.scale_shape(rows, columns)
    assert (scale > 0).all()
    assert (zero is None) == scheme.symmetric
    if zero is not None:
        assert zero.shape == scale.shape
        assert torch.equal(zero, zero.round())
        assert ((zero >= scheme.lowest) & (zero <= scheme.highest)).all()
    if rows:
        assert scheme.lowest <= codes.min()
        assert codes.max() <= scheme.highest
    error = (dequantize(codes, scale, zero) - weight).abs()
    per_weight = scale.repeat_interleave(columns // scale.shape[1], dim=1).expand(rows, columns)
    # float32 rounding of the quotient and the product adds a few ulps of the weight itself.
    assert (error <= per_weight / 2 + 4e-7 * weight.abs()).all()


@given(scheme=schemes(), seed=st.integers(0, 2**31))
def test_points_of_the_grid_survive(scheme: Scheme, seed: int) -> None:
    columns = 4 * (scheme.group_size or 5)
    codes, scale, zero = quantize(weights(seed, 3, columns, 0.0), scheme)
    weight = dequantize(codes, scale, zero)
    again = dequantize(*quantize(weight, scheme))
    assert (again - weight).abs().max() <= scale.max() / 2 * (1 + 1e-5)


@given(seed=st.integers(0, 2**31), groups=st.integers(1, 4))
def test_fractional_codes_follow_the_formula(seed: int, groups: int) -> None:
    codes = weights(seed, 3, groups * 4, 0.5)
    scale, zero = weights(seed + 1, 3, groups, 0.0).abs(), weights(seed + 2, 3, groups, 0.0)
    wide = [t.double().repeat_interleave(4, dim=1) for t in (scale, zero)]
    expected = (codes.double() - wide[1]) * wide[0]
    torch.testing.assert_close(
        dequantize(codes, scale, zero).double(), expected, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("text", ["int4-g8", "int4-g8-asym", "int2-channel", "int8-tensor-asym"])
def test_a_group_of_zeros_stays_zero(text: str) -> None:
    codes, scale, zero = quantize(torch.zeros(2, 8), Scheme.parse(text))
    assert (scale == EMPTY_SCALE).all()
    assert not dequantize(codes, scale, zero).any()


def test_symmetric_scale_uses_the_longer_side_of_the_grid() -> None:
    _, scale, _ = quantize(torch.tensor([[-8.0, 7.0], [-7.0, 7.0]]), Scheme.parse("int4-channel"))
    assert scale.flatten().tolist() == [1.0, 1.0]


def test_bfloat16_weights_are_quantized_in_float32() -> None:
    weight = weights(0, 4, 16, 0.0).bfloat16()
    for low, high in zip(
        quantize(weight, Scheme.parse("int4-g8")),
        quantize(weight.float(), Scheme.parse("int4-g8")),
        strict=True,
    ):
        assert low is high is None or torch.equal(low, high)


def test_a_group_size_that_does_not_divide_names_layer_and_remedy() -> None:
    with pytest.raises(
        BadInput, match=r"group_size=48 .* in_features=1000 of 'lm_head'; use 40 or 50"
    ):
        quantize(torch.zeros(2, 1000), Scheme(4, group_size=48), "lm_head")


def test_a_prime_width_offers_what_is_left() -> None:
    assert nearest_divisors(7, 4) == "1 or 7"
    assert nearest_divisors(8, 16) == "8"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    weight = torch.zeros(2, 8)
    weight[1, 3] = value
    with pytest.raises(BadInput, match="'layer' holds NaN or infinity"):
        quantize(weight, Scheme.parse("int4-g8"), "layer")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 9}, "bits=9"),
        ({"granularity": "row"}, "granularity='row'"),
        ({"group_size": None}, "needs a group_size"),
        ({"group_size": 0}, "needs a group_size"),
        ({"granularity": "channel"}, "takes no group_size"),
        ({"act_bits": 3}, "act_bits=3"),
        ({"act_symmetric": False}, "act_bits=None"),
        ({"act_symmetric": False, "act_bits": 8, "bits": 8, "kind": "fp"}, "kind='fp'"),
    ],
)
def test_schemes_that_do_not_exist_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        Scheme(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text", ["", "int4", "int4-g", "4-g64", "int4-g64-a8-asym", "int4_g64", "int9-g8"]
)
def test_texts_that_are_no_scheme_are_refused(text: str) -> None:
    with pytest.raises(BadInput):
        Scheme.parse(text)
