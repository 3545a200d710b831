"""The Triton kernel against the reference: on a GPU where there is one, else interpreted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from zotune.errors import BadInput
from zotune.quant import kernels
from zotune.quant.affine import quantize
from zotune.quant.kernels import reference
from zotune.quant.packing import pack
from zotune.quant.scheme import Scheme

pytest.importorskip("triton", reason="triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# As in test_kernels.py; the interpreter cuts bits off where a GPU rounds to bfloat16.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-6, torch.float16: 2**-9}
SCHEMES = [
    "int2-g8", "int2-channel-asym", "int3-g12", "int4-g64", "int4-g24-asym", "int4-channel",
    "int8-channel", "int8-g8-asym", "int4-g8-a8", "int4-g24-asym-a8", "int4-g64-a8",
    "int8-channel-a8", "int8-tensor-a8", "int8-channel-asym-a8", "nf4-g64", "fp4-g8",
]  # fmt: skip


def layer(text: str, rows: int, columns: int, seed: int = 0) -> dict[str, Any]:
    """Arguments of a kernel after x, for random codes."""
    scheme, generator = Scheme.parse(text), torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    if scheme.kind == "int":
        codes, scale, zero = quantize(weight, scheme)
    else:
        codes, zero = torch.randint(-8, 8, weight.shape, generator=generator).to(torch.int8), None
        scale = torch.rand(scheme.scale_shape(rows, columns), generator=generator) + 0.1
    bias = torch.randn(rows, generator=generator)
    tensors = {"codes": pack(codes, scheme.bits), "scale": scale, "zero": zero, "bias": bias}
    return {k: None if t is None else t.to(DEVICE) for k, t in tensors.items()} | {"scheme": scheme}


def inputs(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def both(x: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
    """By Triton, and by the reference."""
    found = []
    for name in ("triton", "reference"):
        with kernels.force(name):
            found.append(kernels.linear(x, **arguments))
    return found[0], found[1]


def assert_close(fast: Tensor, slow: Tensor) -> None:
    assert fast.dtype == slow.dtype
    assert fast.shape == slow.shape
    if slow.numel():
        unit = slow.float().abs().max()
        assert (fast.float() - slow.float()).abs().max() <= TOLERANCE[slow.dtype] * unit


@pytest.mark.parametrize("text", SCHEMES)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_every_scheme_equals_the_reference(text: str, dtype: torch.dtype) -> None:
    scheme = Scheme.parse(text)
    for columns in (192, 70 if scheme.group_size is None else 24):
        if columns % (scheme.group_size or columns) == 0:
            assert_close(*both(inputs(5, columns).to(dtype), **layer(text, 10, columns)))


@settings(max_examples=25)
@given(
    text=st.sampled_from(("int4-g8", "int4-g5-asym", "int8-channel-a8", "int2-g3", "int4-g7-a8")),
    tokens=st.integers(0, 70), rows=st.integers(1, 70), columns=st.integers(1, 90),
    seed=st.integers(0, 2**31),
)  # fmt: skip
def test_odd_shapes_and_short_last_groups_equal_the_reference(
    text: str, tokens: int, rows: int, columns: int, seed: int
) -> None:
    scheme, generator = Scheme.parse(text), torch.Generator().manual_seed(seed)
    shape = scheme.scale_shape(rows, columns)
    codes = torch.randint(scheme.lowest, scheme.highest, (rows, columns), generator=generator)
    scale = (torch.rand(shape, generator=generator) + 0.1).to(DEVICE)
    zero = None if scheme.symmetric else torch.randn(shape, generator=generator).to(DEVICE)
    packed = pack(codes.to(torch.int8), scheme.bits).to(DEVICE)
    x = inputs(tokens, columns, seed=seed)
    assert_close(*both(x, codes=packed, scale=scale, zero=zero, bias=None, scheme=scheme))


@pytest.mark.parametrize("columns", [129, 132, 136])
def test_tiles_that_lie_in_the_padding_of_packed_rows_read_no_scale_beyond_the_last(
    columns: int,
) -> None:
    arguments = layer("int4-channel", 3, columns)
    around = torch.full((5, 1), float("nan"), device=DEVICE)
    around[:3] = arguments["scale"]
    assert_close(*both(inputs(4, columns), **{**arguments, "scale": around[:3]}))


@pytest.mark.parametrize("text", ["int4-g8", "int8-channel-a8"])
def test_fractional_codes_are_taken_as_they_are(text: str) -> None:
    arguments = layer(text, 6, 24)
    plain = reference.one_per_weight(arguments["codes"], arguments["scheme"].bits, 24)
    moved = plain.float() + inputs(6, 24, seed=3)
    assert_close(*both(inputs(4, 24), **{**arguments, "codes": moved}))


@pytest.mark.parametrize("parts", [1, 2, 3, 4])
@pytest.mark.parametrize("text", ["int4-g24-asym", "int8-channel-a8", "int8-tensor-a8"])
def test_stacked_parts_equal_each_part_alone(parts: int, text: str) -> None:
    from zotune.quant.kernels import triton

    own = layer(text, 10, 48)
    x, noise = inputs(parts, 5, 48), inputs(parts, *own["scale"].shape, seed=5)
    scale = own["scale"] * (1 + 0.1 * noise)
    zero = None if own["zero"] is None else own["zero"].unsqueeze(0)
    bias = inputs(parts, 10, seed=7)
    found = triton.stacked(x, own["codes"], scale, zero, bias, own["scheme"])
    for p in range(parts):
        one = {**own, "scale": scale[p], "bias": bias[p]}
        assert torch.equal(found[p], triton.linear(x[p], **one))
        assert_close(found[p], reference.linear(x[p], **one))


def test_more_parts_than_a_launch_takes_go_in_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from zotune.quant.kernels import triton

    own = layer("int4-g24-asym", 10, 48)
    x, scale = inputs(5, 3, 48), own["scale"] * (1 + 0.1 * inputs(5, *own["scale"].shape, seed=5))
    arguments = (x, own["codes"], scale, own["zero"][None], own["bias"][None], own["scheme"])
    whole = triton.stacked(*arguments)
    monkeypatch.setattr(triton, "MOST", 2)
    assert torch.equal(triton.stacked(*arguments), whole)


def test_the_kernel_refuses_to_lose_a_gradient() -> None:
    with kernels.force("triton"), pytest.raises(BadInput, match="'triton' has no gradient"):
        kernels.linear(inputs(1, 24).requires_grad_(), **layer("int4-g8", 4, 24))
