"""The quantized linear layer as a module. Run: pytest tests/quant/test_linear.py"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from zotune.errors import BadInput
from zotune.quant import QuantLinear, Scheme, quantize_model_
from zotune.quant.affine import dequantize, quantize

SCHEMES = ["int4-g8", "int3-g8-asym", "int2-channel", "int8-tensor", "int8-channel-a8"]


def linear(columns: int = 16, rows: int = 6, bias: bool = True, seed: int = 0) -> nn.Linear:
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(columns, rows, bias=bias)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(generator=generator)
    return layer


def ones_to(columns: int) -> torch.Tensor:
    return torch.arange(2 * columns).reshape(2, columns).float() / columns


@pytest.mark.parametrize("text", SCHEMES)
def test_a_layer_holds_the_nearest_codes_of_its_linear(text: str) -> None:
    source, scheme = linear(), Scheme.parse(text)
    layer = QuantLinear.from_linear(source, scheme)
    codes, scale, zero = quantize(source.weight, scheme)
    assert torch.equal(layer.unpacked(), codes)
    assert torch.equal(layer.scale, scale)
    assert layer.zero is zero is None or torch.equal(layer.zero, zero)
    assert torch.equal(layer.dequantize(), dequantize(codes, scale, zero))
    assert layer.bias is source.bias
    assert (layer.codes.dtype == torch.uint8) == (scheme.bits < 8)


def test_conv1d_is_transposed() -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    source = conv1d(6, 16)
    twin = nn.Linear(16, 6)
    with torch.no_grad():
        twin.weight.copy_(source.weight.t())
        twin.bias.copy_(source.bias)
    scheme = Scheme.parse("int8-channel")
    a, b = (QuantLinear.from_linear(m, scheme) for m in (source, twin))
    assert (a.in_features, a.out_features) == (16, 6)
    assert torch.equal(a(ones_to(16)), b(ones_to(16)))
    assert (a(ones_to(16)) - source(ones_to(16))).abs().max() < 0.01


@pytest.mark.parametrize("text", SCHEMES)
@pytest.mark.parametrize("bias", [True, False])
def test_state_survives_a_round_trip(text: str, bias: bool) -> None:
    layer = QuantLinear.from_linear(linear(bias=bias), Scheme.parse(text))
    other = QuantLinear(16, 6, Scheme.parse(text), bias=bias)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(ones_to(16)), layer(ones_to(16)))
    assert torch.equal(copy.deepcopy(layer)(ones_to(16)), layer(ones_to(16)))


def test_a_state_of_another_width_is_refused() -> None:
    layer = QuantLinear.from_linear(linear(), Scheme.parse("int4-g8"))
    with pytest.raises(BadInput, match=r"codes has shape \(6, 8\); scheme int2-g8 wants \(6, 4\)"):
        QuantLinear(16, 6, Scheme.parse("int2-g8")).load_state_dict(layer.state_dict())


@pytest.mark.parametrize("text", SCHEMES)
def test_codes_are_written_into_the_same_storage(text: str) -> None:
    layer = QuantLinear.from_linear(linear(), Scheme.parse(text))
    place, before = layer.codes.data_ptr(), layer.unpacked().clone()
    layer.set_codes_(torch.ones(6, 16, dtype=torch.int8))
    assert layer.codes.data_ptr() == place
    assert (layer.unpacked() == 1).all()
    layer.set_codes_(before)
    assert torch.equal(layer.unpacked(), before)


def test_codes_that_do_not_fit_change_nothing() -> None:
    layer = QuantLinear.from_linear(linear(), Scheme.parse("int4-g8"))
    before = layer.unpacked()
    for wrong in (
        torch.full((6, 16), 8, dtype=torch.int8),
        torch.zeros(6, 15, dtype=torch.int8),
        torch.zeros(6, 16),
    ):
        with pytest.raises(BadInput):
            layer.set_codes_(wrong)
    assert torch.equal(layer.unpacked(), before)


@pytest.mark.parametrize("text", SCHEMES)
def test_swapped_buffers_are_what_the_forward_reads(text: str) -> None:
    layer = QuantLinear.from_linear(linear(), Scheme.parse(text))
    x, y = ones_to(16), layer(ones_to(16))
    kept = dict(layer._buffers)
    layer._buffers["codes"] = layer.unpacked().float() + 0.25
    layer._buffers["scale"] = layer.scale * 2
    probed = layer(x)
    layer._buffers.update(kept)
    shifted = dequantize(layer.unpacked().float() + 0.25, layer.scale * 2, layer.zero)
    wanted = nn.functional.linear(x, shifted, layer.bias)
    tolerance = 0.01 if layer.scheme.act_bits else 1e-5
    assert (probed - wanted).abs().max() <= tolerance * wanted.abs().max()
    assert torch.equal(layer(x), y)


def test_moving_the_model_to_bfloat16_keeps_scales_float32() -> None:
    layer = QuantLinear.from_linear(linear(), Scheme.parse("int4-g8-asym"))
    scale = layer.scale.clone()
    model = nn.Sequential(layer).to(torch.bfloat16)
    assert layer.scale.dtype == torch.float32
    assert torch.equal(layer.scale, scale)
    assert layer.zero is not None
    assert layer.zero.dtype == torch.float32
    assert layer.bias is not None
    assert layer.bias.dtype == torch.bfloat16
    assert model(ones_to(16).bfloat16()).dtype == torch.bfloat16


def test_rounding_to_storage_is_what_the_stored_dtype_keeps() -> None:
    layer = QuantLinear.from_linear(linear(), Scheme.parse("int4-g8-asym"))
    exact = layer.scale.clone()
    layer.round_to_storage_()
    assert torch.equal(layer.scale, exact)
    layer.scale_dtype = torch.float16
    layer.round_to_storage_()
    assert torch.equal(layer.scale, exact.half().float())
    assert not torch.equal(layer.scale, exact)


def test_the_text_of_a_layer_tells_its_scheme() -> None:
    layer = QuantLinear(16, 6, Scheme.parse("int4-g8"))
    assert repr(layer) == "QuantLinear(in_features=16, out_features=6, scheme=int4-g8, bias=True)"


class Tied(nn.Module):
    """An embedding, a layer, and a head that shares the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 16)
        self.body = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
        self.out = nn.Linear(16, 10, bias=False)
        self.out.weight = self.embedding.weight
        self.lm_head = nn.Linear(16, 10)


def test_tied_and_excluded_layers_stay_float() -> None:
    model = Tied()
    assert quantize_model_(model, "int4-g8") == ["body.0", "body.1"]
    assert model.out.weight is model.embedding.weight
    assert isinstance(model.lm_head, nn.Linear)
    assert isinstance(model.body[0], QuantLinear)


def test_patterns_choose_layers() -> None:
    assert quantize_model_(Tied(), "int4-g8", exclude=("body.1",)) == ["body.0", "lm_head"]
    assert quantize_model_(Tied(), "int4-g8", exclude=("*.0", "lm_head")) == ["body.1"]
    with pytest.raises(BadInput, match="no layer to quantize in Tied"):
        quantize_model_(Tied(), "int4-g8", exclude=("*",))


def test_nothing_is_replaced_when_one_layer_does_not_fit() -> None:
    model = nn.Sequential(nn.Linear(16, 12), nn.Linear(12, 4))
    with pytest.raises(BadInput, match="does not divide in_features=12 of '1'; use 6 or 12"):
        quantize_model_(model, "int4-g8")
    assert all(type(module) is nn.Linear for module in model)


def test_a_quantized_model_has_nothing_left_to_quantize() -> None:
    model = nn.Sequential(nn.Linear(16, 8))
    quantize_model_(model, "int4-g8")
    with pytest.raises(BadInput, match="no layer to quantize"):
        quantize_model_(model, "int4-g8")


@pytest.mark.parametrize("text", ["int4-g8", "int3-g8-asym", "int8-g8", "int4-g8-a8"])
def test_columns_out_of_order_give_the_weight_of_those_in_order(text: str) -> None:
    plain = QuantLinear.from_linear(linear(), Scheme.parse(text))
    order = torch.randperm(16, generator=torch.Generator().manual_seed(3))
    layer = QuantLinear(16, 6, plain.scheme, ordered=True)
    assert layer.order is not None
    assert torch.equal(layer(ones_to(16)), layer(ones_to(16)[:, layer.order.long()]))
    layer.load_state_dict({**plain.state_dict(), "order": order.int()})
    wanted = torch.empty(6, 16)
    wanted[:, order] = plain.dequantize()
    assert torch.equal(layer.dequantize(), wanted)
    x = ones_to(16)
    assert torch.equal(layer(x), plain(x[:, order]))
    assert torch.equal(copy.deepcopy(layer).to(torch.bfloat16).order, layer.order)


def test_float_schemes_have_no_zeros_and_are_not_made_here() -> None:
    with pytest.raises(BadInput, match="kind='fp' has no zero points"):
        Scheme.parse("fp4-g16-asym")
    with pytest.raises(BadInput, match="bits=3 of kind='fp' is not supported"):
        Scheme.parse("fp3-channel")
    with pytest.raises(BadInput, match="scheme fp8-channel is read from checkpoints only"):
        QuantLinear.from_linear(linear(), Scheme.parse("fp8-channel"))
    assert str(Scheme.parse("fp8-channel-a8")) == "fp8-channel-a8"
    assert QuantLinear(16, 6, Scheme.parse("fp8-channel")).codes.dtype == torch.float8_e4m3fn
