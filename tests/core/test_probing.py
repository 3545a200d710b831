"""Fast probed forwards against each slice alone. Run: pytest tests/core/test_probing.py"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from zotune.core import forwards, sites
from zotune.core.block import Block, FloatBlock, Owner
from zotune.core.grid import Grid
from zotune.core.low_rank import LowRank
from zotune.core.noise import Key
from zotune.core.perturbation import Gaussian, Perturbation, Rademacher, Sparse, Sphere
from zotune.core.probe import Probe
from zotune.core.sites import Site, StackingError, View, probing, sites_of
from zotune.core.spaces import Biases, Codes, Scales, Zeros
from zotune.errors import ZotuneError
from zotune.models import adapter
from zotune.quant import QuantLinear, Scheme, kernels
from zotune.quant.kernels import rounded

# Largest difference over largest value: the rounding of the dtype, a few operations deep.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}
dtype_of = st.sampled_from(tuple(TOLERANCE))
law_of = st.sampled_from((Gaussian(), Rademacher(), Sphere(), Sparse(0.5), LowRank(1)))


def close(a: Tensor, b: Tensor, tolerance: float | None = None) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    limit = (TOLERANCE[a.dtype] if tolerance is None else tolerance) * float(
        b.double().abs().max() or 1
    )
    return float((a.double() - b.double()).abs().max()) <= limit


@st.composite
def probe_lists(draw: st.DrawFn) -> list[Probe]:
    """A few probes, base points and shared directions among them, all shared or all per example."""
    lanes = draw(st.booleans())
    drawn = draw(
        st.lists(
            st.tuples(st.integers(0, 2), st.sampled_from((0.3, -0.3, 0.0))), min_size=1, max_size=4
        )
    )
    return [Probe(Key(1, step=2, query=q), step, lanes) for q, step in drawn]


def filled_(module: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + 0.1)
    return module.requires_grad_(False)


def float_blocks(module: nn.Module, attributes: Sequence[str], unit: float = 1.0) -> list[Block]:
    blocks: list[Block] = [
        FloatBlock.of(f"m.{a}", module.get_parameter(a), [Owner("m", module, a)], unit=unit)
        for a in attributes
    ]
    for block in blocks:
        block.bind_(0.3, 1.0, "relative")
    return blocks


def fast(
    module: nn.Module, blocks: Sequence[Block], view: View, x: Tensor, use: bool = True
) -> Tensor:
    with torch.no_grad(), probing(sites_of(blocks), view, use):
        out: Tensor = module(x)
    return out


def alone(module: nn.Module, blocks: Sequence[Block], view: View, x: Tensor) -> Tensor:
    """Each slice through a copy of the module that holds its values: nothing of sites.py."""
    lanes = range(view.examples) if view.lanes else [None]
    parts = [(p, lane) for p in view.probes for lane in lanes]
    pieces = x.chunk(len(parts)) if len(x) % len(parts) == 0 and len(x) > 1 else [x] * len(parts)
    outputs = []
    for piece, (probe, lane) in zip(pieces, parts, strict=True):
        one = copy.deepcopy(module)
        for block in blocks:
            key = probe.key if lane is None else probe.key.fold(lane=view.first + lane)
            value = block.at(view.perturbation.draw(key, block), probe.step)
            value = value if probe.step else block.value()
            for table in (one._parameters, one._buffers):
                if block.owners[0].attribute in table:
                    table[block.owners[0].attribute] = value  # type: ignore[assignment]
        with torch.no_grad():
            outputs.append(one(piece))
    return torch.cat(outputs)


def inputs(rows: int, tokens: int | None, width: int, dtype: torch.dtype, seed: int) -> Tensor:
    shape = (rows, width) if tokens is None else (rows, tokens, width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


shapes = st.tuples(
    st.integers(1, 4),
    st.integers(1, 3),
    st.none() | st.integers(1, 5),
    st.integers(1, 17),
    st.integers(1, 9),
)  # examples, rows per example, tokens, in, out


@settings(max_examples=40)
@given(
    probes=probe_lists(),
    shape=shapes,
    dtype=dtype_of,
    law=law_of,
    first=st.integers(0, 5),
    tuned=st.sampled_from((("A",), ("B",), ("A", "B"))),
    scaling=st.sampled_from((1.0, 2.0, 0.3)),
)
def test_low_rank_adapters(
    probes: list[Probe], shape: Any, dtype: torch.dtype, law: Perturbation, first: int,
    tuned: tuple[str, ...], scaling: float,
) -> None:  # fmt: skip
    examples, k, tokens, width, out = shape
    rank = min(3, width)
    module = filled_(adapter.LowRank(torch.zeros(rank, width), torch.zeros(out, rank), scaling))
    blocks = float_blocks(module, tuned)
    view = View(probes, examples, law, first, len(probes) * examples * k)
    x = inputs(view.rows, tokens, width, dtype, 1)
    truth = alone(module, blocks, view, x)
    assert close(fast(module, blocks, view, x), truth)
    assert close(fast(module, blocks, view, x, use=False), truth)


@settings(max_examples=40)
@given(
    probes=probe_lists(),
    shape=shapes,
    dtype=dtype_of,
    law=law_of,
    first=st.integers(0, 5),
    bias=st.booleans(),
    tuned=st.sampled_from((("weight",), ("weight", "bias"), ("bias",))),
)
def test_linear_layers(
    probes: list[Probe], shape: Any, dtype: torch.dtype, law: Perturbation, first: int, bias: bool,
    tuned: tuple[str, ...],
) -> None:  # fmt: skip
    examples, k, tokens, width, out = shape
    module = filled_(nn.Linear(width, out, bias=bias or "bias" in tuned)).to(dtype)
    blocks = float_blocks(module, tuned)
    view = View(probes, examples, law, first, len(probes) * examples * k)
    x = inputs(view.rows, tokens, width, dtype, 1)
    truth = alone(module, blocks, view, x)
    assert close(fast(module, blocks, view, x), truth)
    assert close(fast(module, blocks, view, x, use=False), truth)


@settings(max_examples=40)
@given(
    probes=probe_lists(),
    shape=shapes,
    dtype=dtype_of,
    law=law_of,
    mixed=st.booleans(),
    tuned=st.sampled_from((("weight",), ("weight", "bias"), ("bias",))),
    bias=st.booleans(),
)
def test_layer_norms(
    probes: list[Probe], shape: Any, dtype: torch.dtype, law: Perturbation, mixed: bool,
    tuned: tuple[str, ...], bias: bool,
) -> None:  # fmt: skip
    examples, k, tokens, width, _ = shape
    module = filled_(nn.LayerNorm(width, bias=bias or "bias" in tuned))
    mixed = mixed and dtype in (torch.bfloat16, torch.float16)  # float32 gains on 16-bit inputs
    module = module if mixed else module.to(dtype)
    blocks = float_blocks(module, tuned)
    view = View(probes, examples, law, 0, len(probes) * examples * k)
    x = inputs(view.rows, tokens, width, dtype, 1) * 3
    truth = alone(module, blocks, view, x)
    assert close(fast(module, blocks, view, x), truth)
    assert close(fast(module, blocks, view, x, use=False), truth)


@settings(max_examples=40)
@given(probes=probe_lists(), shape=shapes, dtype=dtype_of, law=law_of, padding=st.booleans())
def test_embeddings(
    probes: list[Probe], shape: Any, dtype: torch.dtype, law: Perturbation, padding: bool
) -> None:
    examples, k, tokens, width, vocabulary = shape
    module = filled_(nn.Embedding(vocabulary + 1, width, padding_idx=0 if padding else None)).to(
        dtype
    )
    blocks = float_blocks(module, ["weight"], unit=0.5)
    view = View(probes, examples, law, 0, len(probes) * examples * k)
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(0, vocabulary + 1, (view.rows, tokens or 1), generator=generator)
    truth = alone(module, blocks, view, x)
    assert close(fast(module, blocks, view, x), truth, 1e-6 if dtype != torch.bfloat16 else None)
    assert torch.equal(fast(module, blocks, view, x, use=False), truth)


@settings(max_examples=60)
@given(
    probes=probe_lists(),
    shape=shapes,
    dtype=st.sampled_from(tuple(TOLERANCE)[1:]),
    law=law_of,
    scheme=st.sampled_from(
        (
            "int4-channel",
            "int8-channel",
            "int8-tensor",
            "int8-channel-a8",
            "int4-channel-a8",
            "int8-tensor-a8",
            "int4-g2",
            "int4-channel-asym",
            "int4-g2-a8",
            "int3-channel",
        )
    ),
    compute=st.sampled_from((None, torch.bfloat16, torch.float32)),
    bias=st.booleans(),
    size=st.sampled_from((1.0, 300.0)),
    space=st.sampled_from((Scales(), Codes(), Zeros())),
)
def test_quantized_layers(
    probes: list[Probe], shape: Any, dtype: torch.dtype, law: Perturbation, scheme: str,
    compute: torch.dtype | None, bias: bool, size: float, space: Any,
) -> None:  # fmt: skip
    examples, k, tokens, width, out = shape
    width = 2 * width
    if isinstance(space, Zeros):
        scheme = "int4-g2-asym"
    source = filled_(nn.Linear(width, out, bias=bias))
    module = QuantLinear.from_linear(source, Scheme.parse(scheme))  # type: ignore[arg-type]
    module.compute_dtype = compute
    module.to(dtype)
    holder = nn.Sequential(module)
    built = space.build(holder)
    built.bind_(0.3, 1.0, "relative")
    blocks = list(built)
    view = View(probes, examples, law, 0, len(probes) * examples * k)
    x = inputs(view.rows, tokens, width, dtype, 1) * size
    truth = alone(module, blocks, view, x)
    worst = max(TOLERANCE[dtype], TOLERANCE[compute or dtype])
    assert close(fast(module, blocks, view, x), truth, worst)
    assert close(fast(module, blocks, view, x, use=False), truth, worst)


@settings(max_examples=15)
@given(probes=probe_lists(), shape=shapes, bias=st.booleans(),
       scheme=st.sampled_from(("int4-g2", "int8-channel", "int8-tensor-a8", "int4-g2-a8")),
       space=st.sampled_from((Scales(), Codes(), Zeros(), Biases())))  # fmt: skip
def test_quantized_layers_by_triton(
    probes: list[Probe], shape: Any, bias: bool, scheme: str, space: Any
) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    examples, k, tokens, width, out = shape
    scheme = "int4-g2-asym" if isinstance(space, Zeros) else scheme
    source = filled_(nn.Linear(2 * width, out, bias=bias or isinstance(space, Biases)))
    module = QuantLinear.from_linear(source, Scheme.parse(scheme))  # type: ignore[arg-type]
    built = space.build(nn.Sequential(module))
    built.bind_(0.3, 1.0, "relative")
    view = View(probes, examples, Gaussian(), 0, len(probes) * examples * k)
    x = inputs(view.rows, tokens, 2 * width, torch.float32, 1)
    truth = alone(module, list(built), view, x)
    with kernels.force("triton"):
        assert close(fast(module, list(built), view, x), truth)


# ---- slices of one output ------------------------------------------------------------


@settings(max_examples=80)
@given(probes=probe_lists(), shape=shapes, dtype=dtype_of, bias=st.booleans(),
       tuned=st.sampled_from((("weight",), ("weight", "bias"), ("bias",))))  # fmt: skip
def test_linear_slices_are_the_generic_ones_bit_for_bit(
    probes: list[Probe], shape: Any, dtype: torch.dtype, bias: bool, tuned: tuple[str, ...]
) -> None:
    examples, k, tokens, width, out = shape
    module = filled_(nn.Linear(width, out, bias=bias or "bias" in tuned)).to(dtype)
    blocks = float_blocks(module, tuned)
    probes = [Probe(p.key, p.step) for p in probes]
    view = View(probes, examples, Gaussian(), 0, len(probes) * examples * k)
    x = inputs(view.rows, tokens, width, dtype, 1)
    assert torch.equal(fast(module, blocks, view, x), fast(module, blocks, view, x, use=False))


@settings(max_examples=120)
@given(probes=probe_lists(), shape=shapes, dtype=dtype_of, bias=st.booleans(),
       scheme=st.sampled_from(("int4-g2", "int4-g2-asym", "int8-channel", "int8-channel-a8",
                               "int8-tensor-asym-a8", "int4-g2-a8", "int3-channel-a8")),
       compute=st.sampled_from((None, torch.bfloat16, torch.float32)),
       space=st.sampled_from((Scales(), Codes(), Zeros(), Biases(), Codes() + Scales())),
       law=st.sampled_from((Gaussian(), Grid(2.0))), eps=st.sampled_from((0.3, 1.0)))  # fmt: skip
def test_quantized_slices_are_the_generic_ones_bit_for_bit(
    probes: list[Probe], shape: Any, dtype: torch.dtype, bias: bool, scheme: str,
    compute: torch.dtype | None, space: Any, law: Perturbation, eps: float,
) -> None:  # fmt: skip
    """Whole codes and fractional ones, groups and channels, at base points and away from them."""
    examples, k, tokens, width, out = shape
    scheme = "int4-g2-asym" if isinstance(space, Zeros) else scheme
    source = filled_(nn.Linear(2 * width, out, bias=bias or isinstance(space, Biases)))
    module = QuantLinear.from_linear(source, Scheme.parse(scheme))  # type: ignore[arg-type]
    module.compute_dtype = compute
    if space == Scales() and module.zero is None and module.scale.shape[1] == 1:
        return  # scales of rows have a faster way, which is close, not equal
    built = space.build(nn.Sequential(module.to(dtype)))
    built.bind_(0.3, 1.0, "relative")
    probes = [Probe(p.key, p.step / 0.3 * eps, p.per_example) for p in probes]
    view = View(probes, examples, law, 0, len(probes) * examples * k)
    x = inputs(view.rows, tokens, 2 * width, dtype, 1)
    blocks = built.blocks
    assert torch.equal(fast(module, blocks, view, x), fast(module, blocks, view, x, use=False))


@pytest.mark.parametrize("scheme", ["fp4-g2", "fp8-channel", "fp8-channel-a8", "fp8-g2"])
def test_slices_of_layers_whose_codes_are_floats_are_the_generic_ones(scheme: str) -> None:
    module = QuantLinear(8, 5, Scheme.parse(scheme))
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(0, 256, module.codes.shape, generator=generator, dtype=torch.uint8)
    if module.codes.dtype != torch.uint8:
        numbers = (numbers.float() / 128 - 1).to(module.codes.dtype)
    module.codes.copy_(numbers)
    module.scale.copy_(torch.rand(module.scale.shape, generator=generator) + 0.1)
    filled_(module)
    built = (Biases() + Scales()).build(nn.Sequential(module))
    built.bind_(0.3, 1.0, "relative")
    view = View([Probe(Key(1), s) for s in (0.3, -0.3, 0.0)], 2, Gaussian(), 0, 6)
    x = inputs(6, 3, 8, torch.float32, 0)
    slices = fast(module, built.blocks, view, x)
    assert torch.equal(slices, fast(module, built.blocks, view, x, use=False))
    assert slices.isfinite().all()


@pytest.mark.parametrize("scheme", ["int8-channel-a8", "int4-g2-a8"])
def test_inputs_of_all_parts_are_quantized_once(
    monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    rows: list[int] = []

    def counted(x: Tensor, groups: int) -> rounded.Rows:
        rows.append(len(x))
        return round_rows(x, groups)

    round_rows = rounded.round_rows
    monkeypatch.setattr(rounded, "round_rows", counted)
    module = QuantLinear.from_linear(filled_(nn.Linear(6, 5)), Scheme.parse(scheme))  # type: ignore[arg-type]
    built = Codes().build(nn.Sequential(module))
    built.bind_(1.0, 1.0, "relative")
    view = View([Probe(Key(1), s) for s in (1.0, -1.0)], 2, Grid(), 0, 4)
    fast(module, built.blocks, view, inputs(4, 3, 6, torch.float32, 0))
    assert rows == [12]


@pytest.mark.parametrize("kind", ["linear", "quantized"])
def test_what_slices_cannot_do_is_left_to_the_generic_forward(kind: str) -> None:
    """Strided inputs, a wrapper around the forward, gradients, autocast, another kernel."""
    source = filled_(nn.Linear(6, 5))
    module: nn.Module = source
    blocks: Sequence[Block] = float_blocks(source, ["weight"])
    if kind == "quantized":
        module = QuantLinear.from_linear(source, Scheme.parse("int4-g2"))  # type: ignore[arg-type]
        built = Scales().build(nn.Sequential(module))
        built.bind_(0.3, 1.0, "relative")
        blocks = built.blocks
    view = View([Probe(Key(1), s) for s in (0.3, -0.3)], 2, Gaussian(), 0, 4)
    x = inputs(4, 3, 6, torch.float32, 0)
    truth = fast(module, blocks, view, x, use=False)
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert close(fast(module, blocks, view, strided), truth)
    assert fast(module, blocks, view, x[:, :0]).shape == (4, 0, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert close(fast(module, blocks, view, x).float(), truth, 3e-2)
    with kernels.force("reference"):
        assert close(fast(module, blocks, view, x), truth)
    with probing(sites_of(blocks), view):
        asked = x.clone().requires_grad_()
        module(asked).sum().backward()
    assert asked.grad is not None
    calls: list[int] = []
    own = type(module).forward
    module.forward = lambda x: calls.append(len(x)) or own(module, x)  # type: ignore[method-assign, func-returns-value]
    assert torch.equal(fast(module, blocks, view, x), truth)
    assert calls == [2, 2]


def test_a_product_with_whole_codes_does_not_overflow_half_precision() -> None:
    """127 codes x large activations x many columns: beyond 65504 before the scale comes."""
    module = QuantLinear.from_linear(filled_(nn.Linear(256, 3)), Scheme.parse("int8-channel"))  # type: ignore[arg-type]
    module.set_codes_(torch.full((3, 256), 127, dtype=torch.int8))
    module.scale.fill_(1e-4)
    module.half()
    space = Scales().build(nn.Sequential(module))
    space.bind_(0.01, 1.0, "relative")
    blocks = space.blocks
    view = View([Probe(Key(1), s) for s in (0.01, -0.01)], 2, Gaussian(), 0, 4)
    x = torch.full((4, 256), 100.0, dtype=torch.float16)
    assert close(fast(module, blocks, view, x), alone(module, blocks, view, x))


# ---- which path is taken -------------------------------------------------------------


def test_the_fast_forwards_are_taken_where_they_should(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("generic")

    monkeypatch.setattr(sites, "generic", refuse)
    pair = [Probe(Key(1), s) for s in (0.3, -0.3)]
    lanes = [Probe(Key(1), s, per_example=True) for s in (0.3, -0.3)]
    x = inputs(4, 3, 6, torch.float32, 0)
    low = filled_(adapter.LowRank(torch.zeros(2, 6), torch.zeros(5, 2)))
    head, norm = filled_(nn.Linear(6, 5)), filled_(nn.LayerNorm(6))
    for probes in (pair, lanes):
        view = View(probes, 2, Gaussian(), 0, 4)
        fast(low, float_blocks(low, ["B"]), view, x)
        fast(norm, float_blocks(norm, ["weight", "bias"]), view, x)
        for scheme in ("int8-channel", "int8-channel-a8", "int4-tensor"):
            layer = QuantLinear.from_linear(head, Scheme.parse(scheme))
            fast(layer, Scales().build(nn.Sequential(layer)).blocks, view, x)
    fast(head, float_blocks(head, ["weight"]), View(lanes, 2, Gaussian(), 0, 4), x)
    table = filled_(nn.Embedding(9, 6))
    ids = torch.arange(4).view(4, 1)
    fast(table, float_blocks(table, ["weight"]), View(pair, 2, Gaussian(), 0, 4), ids)
    fast(head, float_blocks(head, ["weight"]), View(pair, 2, Gaussian(), 0, 4), x)
    for scheme, space in (("int4-g2", Scales()), ("int8-channel-a8", Codes())):
        layer = QuantLinear.from_linear(head, Scheme.parse(scheme))  # type: ignore[arg-type]
        fast(layer, space.build(nn.Sequential(layer)).blocks, View(pair, 2, Gaussian(), 0, 4), x)
    with pytest.raises(AssertionError, match="generic"):
        fast(head, float_blocks(head, ["weight"]), View(pair[:1], 2, Gaussian(), 0, 2), x[:2])


def test_large_layers_fall_back_to_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forwards, "_SMALL", 8)
    module = filled_(nn.Linear(6, 5))
    blocks = float_blocks(module, ["weight"])
    view = View([Probe(Key(1), s, per_example=True) for s in (0.3, -0.3)], 2, Gaussian(), 0, 4)
    x = inputs(4, 3, 6, torch.float32, 0)
    assert close(fast(module, blocks, view, x), alone(module, blocks, view, x))


def test_a_subclass_of_a_known_layer_gets_the_generic_forward() -> None:
    class Doubling(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    module = filled_(Doubling(6, 5))
    blocks = float_blocks(module, ["weight"])
    view = View([Probe(Key(1), s, per_example=True) for s in (0.3, -0.3)], 2, Gaussian(), 0, 4)
    x = inputs(4, 3, 6, torch.float32, 0)
    assert close(fast(module, blocks, view, x), alone(module, blocks, view, x))


def test_a_layer_type_is_registered_once() -> None:
    with pytest.raises(ZotuneError, match="already has"):
        sites.probed(nn.Linear)(lambda *a: None)


def test_keyword_inputs_reach_a_layer_with_a_fast_forward() -> None:
    module = filled_(nn.Linear(6, 5))
    blocks = float_blocks(module, ["weight"])
    view = View([Probe(Key(1), s, per_example=True) for s in (0.3, -0.3)], 2, Gaussian(), 0, 4)
    x = inputs(4, 3, 6, torch.float32, 0)
    with torch.no_grad(), probing(sites_of(blocks), view):
        out = module(input=x)
    assert close(out, alone(module, blocks, view, x))


# ---- rows ----------------------------------------------------------------------------


@pytest.mark.parametrize("use", [True, False])
@pytest.mark.parametrize("lanes", [True, False])
def test_a_broadcast_input_gives_each_part_its_own_rows(use: bool, lanes: bool) -> None:
    """Position embeddings are called once with (1, T) and added to every row."""
    module = filled_(nn.Embedding(7, 4))
    blocks = float_blocks(module, ["weight"])
    probes = [Probe(Key(1), s, lanes) for s in (0.3, -0.3, 0.0)]
    view = View(probes, 2, Gaussian(), 0, rows=12)
    positions = torch.arange(5).unsqueeze(0)
    out = fast(module, blocks, view, positions, use)
    assert out.shape == (12, 5, 4)
    truth = alone(module, blocks, view, positions)
    assert torch.equal(out, truth.repeat_interleave(12 // len(truth), 0))


def test_rows_that_cannot_be_told_apart_are_an_error_that_says_what_to_do() -> None:
    module = filled_(nn.Linear(6, 5))
    blocks = float_blocks(module, ["weight"])
    view = View([Probe(Key(1), s) for s in (0.3, -0.3)], 2, Gaussian(), 0, 4)
    with pytest.raises(StackingError, match="site 'm' got 7 rows"):
        fast(module, blocks, view, inputs(7, None, 6, torch.float32, 0))


@pytest.mark.parametrize("use", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 5, 7])
def test_one_probe_alone_takes_any_number_of_rows(use: bool, rows: int) -> None:
    """Without a stack there is nothing to tell apart: relative positions, label texts, anything."""
    view = View([Probe(Key(1), 0.3)], 3, Gaussian(), 0, 3)
    layers = [
        nn.Linear(6, 5),
        nn.LayerNorm(6),
        adapter.LowRank(torch.zeros(2, 6), torch.zeros(5, 2)),
    ]
    for module in layers:
        name = "B" if isinstance(module, adapter.LowRank) else "weight"
        blocks = float_blocks(filled_(module), [name])
        x = inputs(rows, None, 6, torch.float32, 0)
        assert close(fast(module, blocks, view, x, use), alone(module, blocks, view, x))
    table = filled_(nn.Embedding(9, 6))
    blocks = float_blocks(table, ["weight"])
    ids = torch.arange(rows)
    assert torch.equal(fast(table, blocks, view, ids, use), alone(table, blocks, view, ids))
    quantized = QuantLinear.from_linear(filled_(nn.Linear(6, 5)), Scheme.parse("int8-channel"))  # type: ignore[arg-type]
    scales = Scales().build(nn.Sequential(quantized))
    x = inputs(rows, None, 6, torch.float32, 0)
    assert close(
        fast(quantized, scales.blocks, view, x, use), alone(quantized, scales.blocks, view, x)
    )


# ---- sites inside sites --------------------------------------------------------------


class Outer(nn.Module):
    """Own parameters and sites inside, called with keywords, a tuple and a tensor without batch."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))
        self.inner = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)

    def forward(
        self, x: Tensor, *, mask: Tensor, pair: tuple[Tensor, Tensor], scale: Tensor
    ) -> Tensor:
        assert len(x) == len(mask) == len(pair[0])
        out: Tensor = self.norm(self.inner(x) * self.gain) * mask * scale + pair[0] * pair[1]
        return out


@pytest.mark.parametrize("use", [True, False])
@pytest.mark.parametrize("lanes", [True, False])
def test_modules_with_own_parameters_may_contain_other_sites(use: bool, lanes: bool) -> None:
    module = filled_(Outer())
    model = nn.Sequential(module)
    from zotune.core.spaces import Weights

    space = Weights().build(model)
    space.bind_(0.3, 1.0, "relative")
    view = View([Probe(Key(1), s, lanes) for s in (0.3, -0.3, 0.0)], 2, Gaussian(), 0, 6)
    x, mask, shift = (inputs(6, None, 5, torch.float32, i) for i in range(3))
    once = torch.ones(5)

    def run(rows: slice) -> Tensor:
        out: Tensor = module(
            x[rows], mask=mask[rows], pair=(shift[rows], once), scale=torch.tensor(2.0)
        )
        return out

    with torch.no_grad(), probing(sites_of(space.blocks), view, use):
        out = run(slice(0, 6))
    parts = [(p, b) for p in view.probes for b in (range(2) if lanes else [None])]
    each = 6 // len(parts)
    held = {b.name: b.value().clone() for b in space}
    for i, (probe, lane) in enumerate(parts):
        key = probe.key if lane is None else probe.key.fold(lane=lane)
        for block in space:
            value = (
                block.at(Gaussian().draw(key, block), probe.step)
                if probe.step
                else held[block.name]
            )
            model.get_parameter(block.name).data = value
        truth = run(slice(i * each, (i + 1) * each))
        for block in space:
            model.get_parameter(block.name).data = held[block.name]
        assert close(out[i * each : (i + 1) * each], truth)


def test_the_forward_attribute_is_removed_and_one_that_was_there_comes_back() -> None:
    module = filled_(nn.Linear(6, 5))
    blocks = float_blocks(module, ["weight"])
    view = View([Probe(Key(1), 0.3)], 2, Gaussian(), 0, 2)
    with probing(sites_of(blocks), view):
        assert "forward" in vars(module)
    assert "forward" not in vars(module)
    calls = []

    def wrapped(x: Tensor) -> Tensor:  # what offloading libraries leave on a module
        calls.append(len(x))
        return nn.Linear.forward(module, x)

    module.forward = wrapped  # type: ignore[method-assign]
    x = inputs(2, None, 6, torch.float32, 0)
    with torch.no_grad(), probing(sites_of(blocks), view):
        module(x)
    assert module.forward is wrapped
    assert calls == [2]


def test_hooks_run_once_per_call_however_many_slices_there_are() -> None:
    module = filled_(nn.Linear(6, 5))
    blocks = float_blocks(module, ["weight"])
    calls: list[int] = []
    module.register_forward_hook(lambda m, a, out: calls.append(len(out)))
    module.register_forward_pre_hook(lambda m, a: calls.append(len(a[0])))
    view = View([Probe(Key(1), s) for s in (0.3, -0.3)], 2, Gaussian(), 0, 4)
    fast(module, blocks, view, inputs(4, None, 6, torch.float32, 0), use=False)
    assert calls == [4, 4]


def test_a_site_that_returns_no_tensor_says_so() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> tuple[Tensor, None]:
            return x * self.weight, None

    module = Pair()
    blocks = float_blocks(module, ["weight"])
    view = View([Probe(Key(1), s) for s in (0.3, -0.3)], 2, Gaussian(), 0, 4)
    with pytest.raises(StackingError, match="returned tuple"):
        fast(module, blocks, view, torch.ones(4, 3))


def test_sites_group_blocks_by_module_and_show_tied_blocks_at_each_owner() -> None:
    first, second = nn.Embedding(5, 4), nn.Linear(4, 5, bias=True)
    second.weight = first.weight
    shared = FloatBlock.of(
        "w", first.weight, [Owner("a", first, "weight"), Owner("b", second, "weight")]
    )
    bias = FloatBlock.of("b", second.bias, [Owner("b", second, "bias")])
    found: list[Site] = sites_of([shared, bias])
    assert [(s.path, sorted(s.blocks)) for s in found] == [
        ("a", ["weight"]),
        ("b", ["bias", "weight"]),
    ]
    assert found[0].blocks["weight"] is found[1].blocks["weight"]
