"""Ways through a quantized layer on CPUs. Run: pytest tests/quant/test_rounded.py"""

from __future__ import annotations

import logging

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from zotune.errors import BadInput
from zotune.quant import kernels
from zotune.quant.affine import quantize
from zotune.quant.kernels import bf16, choice, cpu, panels, parts, reference, rounded, vnni
from zotune.quant.packing import pack
from zotune.quant.scheme import Scheme

needs_vnni = pytest.mark.skipif(not vnni.available(), reason="this processor has no AVX-512 VNNI")
WAYS = [pytest.param("vnni", marks=needs_vnni), "onednn", "dequantized"]
# The reference multiplies dequantized weights in float32; integers are exact until they are scaled.
TOLERANCE = 3e-6


def made(scheme: Scheme, rows: int, columns: int, seed: int) -> rounded.Point:
    generator = torch.Generator().manual_seed(seed)
    codes, scale, zero = quantize(torch.randn(rows, columns, generator=generator), scheme)
    if zero is not None:
        zero = zero + torch.rand(zero.shape, generator=generator)  # a tuned zero is fractional
    return rounded.Point(
        pack(codes, scheme.bits), scale, zero, torch.randn(rows, generator=generator)
    )


def inputs(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=[1, 2, 5])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(torch, "get_num_threads", lambda: request.param)
    monkeypatch.setattr(panels, "TASK", 1)
    monkeypatch.setattr(panels, "CHUNK", 7)
    monkeypatch.setattr(cpu, "GRAIN", 1)
    return int(request.param)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.parametrize("way", WAYS)
@given(
    bits=st.integers(2, 8), symmetric=st.booleans(), groups=st.integers(1, 4),
    size=st.integers(1, 12), rows=st.integers(1, 150), tokens=st.integers(1, 23),
    parts=st.integers(1, 3), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_every_way_is_the_reference_on_drawn_shapes(
    way: str, bits: int, symmetric: bool, groups: int, size: int, rows: int, tokens: int,
    parts: int, seed: int, threads: int,
) -> None:  # fmt: skip
    """Also the sizes that a way cannot take, where another steps in."""
    grain = "group" if groups > 1 else "channel"
    scheme = Scheme(bits, symmetric, size * 4 if groups > 1 else None, grain, 8)
    columns = size * 4 * groups
    points = [made(scheme, rows, columns, seed)]
    for k in range(1, parts):
        more = made(scheme, rows, columns, seed + k)
        points.append(more._replace(codes=points[0].codes))
    x = inputs(parts, tokens, columns, seed=seed)
    out = torch.full((parts, tokens, rows), float("nan"))
    with kernels.force(f"cpu/{way}"):
        rounded.linear_(out, x, [points], scheme, torch.float32)
    for y, part, point in zip(out, x, points, strict=True):
        slow = reference.linear(part, *point, scheme)
        assert (y - slow).abs().max() <= TOLERANCE * slow.abs().max() + 1e-12


@pytest.mark.skipif(not bf16.available(), reason="this processor has no AVX-512 BF16")
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    bits=st.integers(2, 8), symmetric=st.booleans(), groups=st.integers(1, 4),
    size=st.integers(1, 12), rows=st.integers(1, 150), tokens=st.integers(0, 23),
    parts_=st.integers(1, 3), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_products_in_bfloat16_are_those_of_the_rounded_weight(
    bits: int, symmetric: bool, groups: int, size: int, rows: int, tokens: int, parts_: int,
    seed: int, threads: int,
) -> None:  # fmt: skip
    """Weights and activations are rounded as everywhere, sums are float32; outputs are rounded only
    where odd sizes go to torch's product."""
    scheme = Scheme(bits, symmetric, size * 4)
    columns = size * 4 * groups
    first = made(scheme, rows, columns, seed)
    points = [first._replace(scale=first.scale * (1 + 0.1 * k)) for k in range(parts_)]
    x = inputs(parts_, tokens, columns, seed=seed)
    with kernels.force("cpu/bf16"):
        out = parts.linear(x, points, rows, scheme, torch.bfloat16, same_codes=True)
        apart = [
            cpu.linear(part, *point, scheme, torch.bfloat16)
            for part, point in zip(x, points, strict=True)
        ]
    assert torch.equal(out, torch.stack(apart))
    for y, part, (codes, scale, zero, bias) in zip(out, x, points, strict=True):
        weight = cpu.weight_scratch(codes, scale, zero, bits, columns, torch.bfloat16, size * 4)
        assert bias is not None
        slow = part.bfloat16().double() @ weight.double().t() + bias.double()
        if y.numel():
            most = TOLERANCE if bf16.fits(codes, scheme, columns) else 2**-7
            assert (y - slow).abs().max() <= most * slow.abs().max() + 1e-12


@needs_vnni
@pytest.mark.parametrize("text", ["int8-channel-a8", "int4-channel-asym-a8", "int8-tensor-a8"])
def test_integer_ways_give_the_same_bits(text: str) -> None:
    scheme, x = Scheme.parse(text), inputs(2, 11, 96)
    points = [made(scheme, 70, 96, 3), made(scheme, 70, 96, 3)._replace(bias=None)]
    points[1] = points[1]._replace(scale=points[0].scale * 1.01)
    found = []
    for way in ("vnni", "onednn"):
        out = torch.empty(2, 11, 70)
        with kernels.force(f"cpu/{way}"):
            rounded.linear_(out[:1], x[:1], [points[:1]], scheme, torch.float32)
            rounded.linear_(out[1:], x[1:], [points[1:]], scheme, torch.float32)
        found.append(out)
    assert torch.equal(*found)


@needs_vnni
def test_bits_do_not_depend_on_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    scheme, x, found = Scheme.parse("int4-g32-a8"), inputs(1, 50, 128), []
    point = made(scheme, 200, 128, 0)
    for count in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=count: count)
        monkeypatch.setattr(panels, "TASK", 1)
        out = torch.empty(1, 50, 200)
        found.append(rounded.linear_(out, x, [[point]], scheme, torch.float32))
    assert torch.equal(*found)


@needs_vnni
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_numbers_stay_in_their_row_and_column(value: float) -> None:
    scheme = Scheme.parse("int4-g32-a8")
    point, x = made(scheme, 70, 64, 0), inputs(1, 9, 64)
    x[0, 4, 3] = value
    point.scale[5, 1] = value
    out = torch.empty(1, 9, 70)
    with kernels.force("cpu/vnni"):
        rounded.linear_(out, x, [[point]], scheme, torch.float32)
    bad = ~torch.isfinite(out[0])
    assert bad[4].all()
    assert bad[:, 5].all()
    bad[4], bad[:, 5] = False, False
    assert not bad.any()


@pytest.mark.parametrize("way", WAYS)
def test_fractional_codes_are_dequantized_whatever_is_forced(way: str) -> None:
    scheme, x = Scheme.parse("int8-channel-a8"), inputs(1, 5, 24)
    point = made(scheme, 10, 24, 0)
    point = point._replace(codes=point.codes + 0.5)
    out = torch.empty(1, 5, 10)
    with kernels.force(f"cpu/{way}"):
        rounded.linear_(out, x, [[point]], scheme, torch.float32)
    slow = reference.linear(x[0], *point, scheme)
    assert (out[0] - slow).abs().max() <= TOLERANCE * slow.abs().max()


def test_without_the_instructions_another_way_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vnni, "available", lambda: False)
    scheme, x = Scheme.parse("int4-g32-a8"), inputs(1, 5, 64)
    point = made(scheme, 10, 64, 0)
    out = rounded.linear_(torch.empty(1, 5, 10), x, [[point]], scheme, torch.float32)
    slow = reference.linear(x[0], *point, scheme)
    assert (out[0] - slow).abs().max() <= TOLERANCE * slow.abs().max()


def test_an_unknown_way_is_named() -> None:
    with pytest.raises(BadInput, match="cpu goes"), kernels.force("cpu/fast"):
        pass


def test_each_size_is_measured_once(caplog: pytest.LogCaptureFixture) -> None:
    calls: list[str] = []
    ways = {name: lambda name=name: calls.append(name) for name in ("a", "b")}
    with caplog.at_level(logging.DEBUG, "zotune"):
        first = choice.fastest("a size of its own", ways)
    count = len(calls)
    assert set(calls) == {"a", "b"}
    assert choice.fastest("a size of its own", ways) == first
    assert len(calls) == count
    assert "a size of its own" in caplog.text
    assert first in choice.chosen().values()
