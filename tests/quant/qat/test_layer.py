"""A fake-quantized layer computes what the quantized one will."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from zotune.errors import BadInput
from zotune.quant import QuantLinear, Scheme, kernels
from zotune.quant.calibrate.folding import Fold
from zotune.quant.qat import FakeQuantLinear, fake_layers, fake_quantize_

SCHEMES = ["int2-g8-asym", "int3-channel", "int4-g8-a4", "int6-channel-asym-a6", "int4-tensor-a8",
           "int8-channel-a8", "int7-g8", "int5-channel-a5",
           "int4-channel-a4asym"]  # fmt: skip


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer(text: str, rows: int = 6, columns: int = 16, seed: int = 0) -> FakeQuantLinear:
    """A layer whose every tensor is away from where it starts."""
    made = FakeQuantLinear(drawn(rows, columns, seed=seed), drawn(rows), Scheme.parse(text))
    shape = made.upper.shape
    made.upper.copy_(drawn(*shape, seed=seed + 1).abs().neg() * 0.3)
    made.lower.copy_(drawn(*shape, seed=seed + 2).abs().neg() * 0.3)
    fold = Fold("norm", ("layer",), (0, columns), shifts=True)
    made.attach_(fold, drawn(columns, seed=seed + 3) * 0.4, drawn(columns, seed=seed + 4))
    if made.input_clip is not None:
        made.input_clip.fill_(math.log(0.8))
    return made


@pytest.mark.parametrize("text", SCHEMES)
def test_untouched_it_is_rounding_to_nearest(text: str) -> None:
    linear = nn.Linear(16, 6)
    linear.weight.data, linear.bias.data = drawn(6, 16), drawn(6)
    fake = FakeQuantLinear.from_linear(linear, Scheme.parse(text))
    plain = QuantLinear.from_linear(linear, Scheme.parse(text))
    assert torch.equal(fake.quantized().codes, plain.codes)
    assert torch.equal(fake.quantized().scale, plain.scale)
    with kernels.force("reference"):
        assert torch.allclose(fake(drawn(5, 16)), plain(drawn(5, 16)), atol=1e-5)


def at_rest(x: Tensor, scheme: Scheme) -> Tensor:
    """x clipped to 0.8 of its extremes and rounded, as compressed-tensors (and vLLM) have it."""
    assert scheme.act_bits is not None
    most = 2 ** (scheme.act_bits - 1) - 1
    if scheme.act_symmetric:
        high = x.abs().amax(-1, keepdim=True) * 0.8
        low = -high
        step, zero = high / (most if scheme.act_bits == 8 else most + 0.5), 0 * high
    else:
        low, high = (f(x, -1, keepdim=True) * 0.8 for f in (torch.amin, torch.amax))
        step = (high - low) / (2 * most + 1)
        zero = (-most - 1 - low / step).round()
    return ((x.clamp(low, high) / step + zero).round().clamp(-most - 1, most) - zero) * step


@given(text=st.sampled_from(SCHEMES), rows=st.integers(1, 5), seed=st.integers(0, 99))
def test_the_formula_in_float64(text: str, rows: int, seed: int) -> None:
    made = layer(text, rows, seed=seed)
    scheme = made.scheme
    s, shift = made.log_scale.double().exp(), made.shift.double()  # type: ignore[union-attr]
    weight = made.weight.double() * s
    width = scheme.group_size or 16
    groups = (
        weight.view(1, 1, -1) if scheme.granularity == "tensor" else weight.view(rows, -1, width)
    )
    low = groups.amin(-1).clamp(max=0) * made.lower.double().exp()
    high = groups.amax(-1).clamp(min=0) * made.upper.double().exp()
    if scheme.symmetric:
        step, zero = torch.maximum(high / scheme.highest, low / scheme.lowest), 0 * high
    else:
        step = (high - low) / (2**scheme.bits - 1)
        zero = (scheme.lowest - low / step).round().clamp(scheme.lowest, scheme.highest)
    codes = (groups / step[..., None] + zero[..., None]).round()
    codes = codes.clamp(scheme.lowest, scheme.highest)
    rounded = ((codes - zero[..., None]) * step[..., None]).view(rows, 16)
    x = (drawn(3, 16, seed=700).double() - shift) / s
    if scheme.act_bits:
        # Below 8 bits the largest number lies between two codes: its float32 value decides.
        plain = made.inputs(drawn(3, 16, seed=700), rounding=False)
        assert torch.allclose(plain.double(), x, atol=1e-6)
        x = at_rest(plain, scheme).double()
    wanted = x @ rounded.t() + made.bias.double() + made.weight.double() @ shift  # type: ignore[union-attr]
    away = (made(drawn(3, 16, seed=700)).double() - wanted).abs()
    assert float(away.max()) <= 1e-4 * float(wanted.abs().max())


@pytest.mark.parametrize("text", SCHEMES)
def test_the_quantized_layer_gives_the_same_numbers_for_transformed_inputs(text: str) -> None:
    made, x = layer(text), drawn(2, 5, 16, seed=9)
    assert made.log_scale is not None
    assert made.shift is not None
    inputs = (x - made.shift) / made.log_scale.exp()
    with kernels.force("reference"):
        assert torch.allclose(made.quantized()(inputs), made(x), atol=1e-5)


@pytest.mark.parametrize("text", SCHEMES)
def test_several_points_at_once_are_each_point_alone(text: str) -> None:
    made, x = layer(text), drawn(3, 4, 16)
    values = {
        name: torch.stack([value + 0.05 * drawn(*value.shape, seed=k) for k in range(3)])
        for name, value in made.point()._asdict().items()
        if value is not None
    }
    together = made.at(x, **values)
    for k in range(3):
        alone = made.at(x[k], **{name: value[k] for name, value in values.items()})
        assert torch.allclose(together[k], alone, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_thresholds_and_transforms_stay_float32_and_shared(dtype: torch.dtype) -> None:
    made, other = layer("int4-g8-a8"), layer("int4-g8-a8")
    other.attach_(made.fold, made.log_scale, made.shift)
    model = nn.ModuleList([made, other]).to(dtype)
    first, second = fake_layers(model).values()
    assert first.weight.dtype == dtype
    assert first.log_scale is second.log_scale
    assert {first.upper.dtype, first.log_scale.dtype} == {torch.float32}  # type: ignore[union-attr]
    assert first(drawn(2, 16).to(dtype)).dtype == dtype


def test_a_gradient_passes_straight_through_the_roundings() -> None:
    """The backprop baseline of the benchmark; forward-only methods never ask for it."""
    made = layer("int2-g8-asym")
    made.weight.requires_grad_(True)
    made(drawn(4, 16)).square().sum().backward()
    assert made.weight.grad is not None
    assert float(made.weight.grad.abs().sum()) > 0


def test_groups_of_zeros_stay_zeros() -> None:
    made = FakeQuantLinear(torch.zeros(2, 8), None, Scheme.parse("int4-g4-asym"))
    assert not made(drawn(3, 8)).any()
    assert not made.quantized()(drawn(3, 8)).any()


def test_layers_that_cannot_take_a_scheme_are_refused_before_any_is_replaced() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 12), nn.Linear(12, 2))
    with pytest.raises(BadInput, match=r"group_size=8 does not divide in_features=12 of '2'"):
        fake_quantize_(model, "int4-g8")
    assert not fake_layers(model)
    model[0].weight.data[0, 0] = math.inf
    with pytest.raises(BadInput, match="weight of '0' holds NaN or infinity"):
        fake_quantize_(model, "int4-g4")
    with pytest.raises(BadInput, match="bits=9"):
        fake_quantize_(model, "int9-g4")
