"""The quantized convolution. Run: pytest tests/quant/test_conv.py"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from zotune.errors import BadInput
from zotune.quant import QuantConv2d, Scheme, kernels, quantize_model_
from zotune.quant.affine import quantize
from zotune.quant.kernels.conv import Geometry, fake_quantize, integer_sums
from zotune.quant.layer import QuantLayer

SCHEMES = ["int8-channel", "int4-channel-asym", "int3-tensor", "int4-g4", "int2-g2-asym"]
ACT = ["int8-channel-a8", "int4-channel-asym-a8", "int8-tensor-a8", "int8-g4-a8"]


def conv(seed: int = 0, **options: Any) -> nn.Conv2d:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Conv2d(4, 8, **{"kernel_size": 3, **options}).requires_grad_(False)


def images(size: int = 3, side: int = 9, channels: int = 4, seed: int = 1) -> Tensor:
    return torch.randn(size, channels, side, side, generator=torch.Generator().manual_seed(seed))


GEOMETRIES: list[dict[str, Any]] = [
    {"padding": 1},
    {"kernel_size": (1, 3), "stride": 2, "dilation": 2, "padding": "valid"},
    {"padding": "same", "groups": 2, "dilation": 2},
    {"kernel_size": 2, "padding": (0, 1), "stride": (2, 1)},
    {"kernel_size": 1, "bias": False},
    {"kernel_size": 2, "padding": "same", "groups": 4},
    {"padding": 1, "padding_mode": "reflect"},
]


def twin(source: nn.Conv2d, layer: QuantConv2d) -> nn.Conv2d:
    """The float convolution that the quantized one stands for."""
    same = copy.deepcopy(source)
    same.weight.copy_(layer.dequantize())
    return same


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("text", SCHEMES)
def test_it_is_the_convolution_with_its_dequantized_weight(
    text: str, geometry: dict[str, Any]
) -> None:
    source, scheme = conv(**geometry), Scheme.parse(text)
    columns = source.weight[0].numel()
    if scheme.group_size and columns % scheme.group_size:
        with pytest.raises(BadInput, match=f"group_size={scheme.group_size} does not divide"):
            QuantConv2d.from_conv(source, scheme, "stem")
        return
    layer = QuantConv2d.from_conv(source, scheme)
    codes, scale, zero = quantize(source.weight.flatten(1), scheme)
    assert torch.equal(layer.unpacked(), codes)
    assert torch.equal(layer.scale, scale)
    assert layer.zero is zero is None or torch.equal(layer.zero, zero)
    for x in (images(), images(0), images(1)):
        wanted = twin(source, layer)(x)
        for name in ("reference", "cpu"):
            with kernels.force(name):
                torch.testing.assert_close(layer(x), wanted)


@pytest.mark.parametrize("geometry", GEOMETRIES[:5], ids=str)
@pytest.mark.parametrize("text", ACT)
def test_rounded_activations_give_the_convolution_of_rounded_images(
    text: str, geometry: dict[str, Any]
) -> None:
    source, scheme = conv(**geometry), Scheme.parse(text)
    columns = source.weight[0].numel()
    if scheme.group_size and columns % scheme.group_size:
        return
    layer, x = QuantConv2d.from_conv(source, scheme), images()
    x[1] *= 50  # each example has its own scale
    levels = 127 / x.flatten(1).abs().amax(1).view(-1, 1, 1, 1)
    wanted = twin(source, layer)((x * levels).round() / levels)
    for name in ("reference", "cpu"):
        with kernels.force(name):
            torch.testing.assert_close(layer(x), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("text", ["int8-channel-a4", "int4-channel-a6asym", "int8-channel-a8asym"])
def test_activations_of_other_grids_are_rounded_too(text: str) -> None:
    layer, x = QuantConv2d.from_conv(conv(padding=1), Scheme.parse(text)), images() + 1
    wanted = twin(conv(padding=1), layer)(fake_quantize(x, layer.scheme))
    assert float((fake_quantize(x, layer.scheme) - x).abs().max()) > 1e-3
    for name in ("reference", "cpu"):
        with kernels.force(name):
            torch.testing.assert_close(layer(x), wanted)


def test_an_example_is_the_same_alone_and_in_company() -> None:
    layer, x = QuantConv2d.from_conv(conv(padding=1), Scheme.parse("int8-channel-a8")), images(4)
    together = layer(x)
    assert torch.equal(torch.cat([layer(one) for one in x.split(1)]), together)


@settings(max_examples=25)
@given(
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(*[st.integers(0, 2)] * 4),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
)
def test_integer_sums_over_patches_are_exact(
    kernel: Any, stride: Any, padding: Any, dilation: Any
) -> None:
    geometry, x = Geometry(kernel, stride, padding, dilation), images(2, 7)
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(-128, 128, (5, 4 * geometry.area), generator=generator)
    codes = codes.to(torch.int8)
    sums, rows, scale = integer_sums(x, codes, geometry)
    whole = (x.double() / scale.double()).round()
    wanted = F.conv2d(
        F.pad(whole, padding), codes.double().view(5, 4, *kernel), None, stride, 0, dilation
    )
    assert torch.equal(sums.permute(0, 3, 1, 2).double(), wanted)
    assert rows.shape == (sums[..., 0].numel(), codes.shape[1])


@pytest.mark.parametrize("text", ["int8-channel", "int8-channel-a8", "int4-tensor"])
@pytest.mark.parametrize("geometry", [*GEOMETRIES[:5], GEOMETRIES[6]], ids=str)
def test_outputs_are_scaled_behind_the_codes(text: str, geometry: dict[str, Any]) -> None:
    layer, x = QuantConv2d.from_conv(conv(**geometry), Scheme.parse(text)), images()
    y = layer.unscaled(x) * layer.scale.view(1, -1, 1, 1)
    y = y if layer.bias is None else y + layer.bias[:, None, None]
    torch.testing.assert_close(y, layer(x), rtol=1e-4, atol=1e-4)


def test_products_may_be_taken_in_bfloat16() -> None:
    layer, x = QuantConv2d.from_conv(conv(), Scheme.parse("int8-channel")), images()
    exact = layer(x)
    layer.compute_dtype = torch.bfloat16
    assert layer(x).dtype == torch.float32
    assert 0 < float((layer(x) - exact).abs().max()) < 0.05


def test_fractional_codes_are_seen_by_a_forward() -> None:
    layer, x = QuantConv2d.from_conv(conv(), Scheme.parse("int4-channel-asym-a8")), images()
    before = layer(x)
    layer.codes = layer.unpacked().float() + 0.25
    shift = (0.25 * layer.scale).expand(8, 36).reshape(8, 4, 3, 3)
    wanted = before + F.conv2d(fake_quantize(x, layer.scheme), shift)
    torch.testing.assert_close(layer(x), wanted, rtol=1e-4, atol=1e-4)


def test_a_gradient_flows_through_the_reference() -> None:
    layer = QuantConv2d.from_conv(conv(), Scheme.parse("int8-channel"))
    layer.scale.requires_grad_()
    layer(images()).sum().backward()
    assert layer.scale.grad is not None
    with kernels.force("cpu"), pytest.raises(BadInput, match="kernel 'cpu' has no gradient"):
        layer(images())


@pytest.mark.parametrize("text", [*SCHEMES, *ACT])
def test_state_survives_a_round_trip(text: str) -> None:
    source, scheme = conv(), Scheme.parse(text)
    layer = QuantConv2d.from_conv(source, scheme)
    other = QuantConv2d(4, 8, scheme, layer.geometry).requires_grad_(False)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(images()), layer(images()))
    assert torch.equal(copy.deepcopy(layer)(images()), layer(images()))


@pytest.mark.parametrize("shape", [(2, 3, 9, 9), (4, 9, 9), (2, 36)], ids=str)
@pytest.mark.parametrize("text", ["int8-channel", "int8-channel-a8"])
def test_other_inputs_are_refused(text: str, shape: tuple[int, ...]) -> None:
    layer = QuantConv2d.from_conv(conv(), Scheme.parse(text))
    for forward in (layer, layer.unscaled):
        with pytest.raises(BadInput, match=r"a convolution of 4 channels got \("):
            forward(torch.zeros(shape))


def test_a_model_is_quantized_with_its_convolutions() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    assert quantize_model_(model, "int8-channel", exclude=("2",)) == ["0"]
    assert isinstance(model[0], QuantLayer)
    assert isinstance(model[2], nn.Linear)


def test_a_group_that_does_not_divide_a_patch_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(3, 4, 3))
    with pytest.raises(BadInput, match=r"group_size=4 does not divide in_features=27 of '1'"):
        quantize_model_(model, "int4-g4")
    assert all(type(layer) is nn.Conv2d for layer in model)


def test_codes_scale_zero_and_bias_are_all_there_is_to_a_layer() -> None:
    layer = QuantConv2d.from_conv(conv(), Scheme.parse("int4-channel-asym"))
    assert set(layer.state_dict()) == {"codes", "scale", "zero", "bias"}
