"""Fast probed forwards over images against each slice alone.

Run: pytest tests/core/test_image_probing.py
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from zotune.core import image_forwards, sites
from zotune.core.block import Block, FloatBlock, Owner
from zotune.core.evaluator import TorchEvaluator
from zotune.core.noise import Key
from zotune.core.perturbation import Gaussian
from zotune.core.probe import Probe
from zotune.core.sites import View, probing, sites_of
from zotune.core.spaces import Biases, Codes, Norms, Scales, Weights, Zeros
from zotune.models.shift import Shift
from zotune.quant import QuantConv2d, Scheme
from zotune.tasks.batch import Batch

TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 3e-2}
assert image_forwards


@st.composite
def probe_lists(draw: st.DrawFn) -> list[Probe]:
    lanes = draw(st.booleans())
    step = st.sampled_from((0.3, -0.3, 0.0))
    drawn = draw(st.lists(st.tuples(st.integers(0, 2), step), min_size=1, max_size=4))
    return [Probe(Key(1, step=2, query=q), step, lanes) for q, step in drawn]


def filled_(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator).abs() * 0.3 + 0.1)
    return module.eval().requires_grad_(False)


def images(rows: int, channels: int, last: bool, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(rows, channels, 5, 6, generator=torch.Generator().manual_seed(7)).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if last else x


def through(module: nn.Module, blocks: Sequence[Block], view: View, x: Tensor, fast: bool) -> Any:
    with torch.no_grad(), probing(sites_of(blocks), view, fast):
        return module(x)


def alone(module: nn.Module, blocks: Sequence[Block], view: View, x: Tensor) -> Tensor:
    """Each slice through a copy of the module that holds its values: nothing of sites.py."""
    lanes = range(view.examples) if view.lanes else [None]
    parts = [(p, lane) for p in view.probes for lane in lanes]
    outputs = []
    for piece, (probe, lane) in zip(x.chunk(len(parts)), parts, strict=True):
        one = copy.deepcopy(module)
        for block in blocks:
            key = probe.key if lane is None else probe.key.fold(lane=view.first + lane)
            value = block.at(view.perturbation.draw(key, block), probe.step)
            table = (
                one._parameters if block.owners[0].attribute in one._parameters else one._buffers
            )
            table[block.owners[0].attribute] = value if probe.step else block.value()
        with torch.no_grad():
            outputs.append(one(piece))
    return torch.cat(outputs)


def agree(
    module: nn.Module, blocks: Sequence[Block], view: View, x: Tensor, tolerance: float
) -> None:
    for block in blocks:
        block.bind_(0.3, 1.0, "relative")
    truth = alone(module, blocks, view, x)
    for fast in (True, False):
        found = through(module, blocks, view, x, fast)
        assert found.shape == truth.shape
        assert found.dtype == truth.dtype
        error = float((found.double() - truth.double()).abs().max())
        assert error <= tolerance * float(truth.double().abs().max() or 1)


def view_of(probes: list[Probe], examples: int, k: int) -> View:
    return View(probes, examples, Gaussian(), 1, len(probes) * examples * k)


@settings(max_examples=30)
@given(
    probes=probe_lists(),
    examples=st.integers(1, 3),
    k=st.integers(1, 2),
    tuned=st.sampled_from((("weight",), ("bias",), ("weight", "bias"))),
    dtype=st.sampled_from(tuple(TOLERANCE)),
    last=st.booleans(),
)
def test_batch_norms(
    probes: list[Probe], examples: int, k: int, tuned: tuple[str, ...], dtype: torch.dtype,
    last: bool,
) -> None:  # fmt: skip
    module = filled_(nn.BatchNorm2d(4))
    blocks: list[Block] = [
        FloatBlock.of(f"m.{a}", module.get_parameter(a), [Owner("m", module, a)]) for a in tuned
    ]
    view = view_of(probes, examples, k)
    agree(module, blocks, view, images(view.rows, 4, last, dtype), TOLERANCE[dtype])


@settings(max_examples=30)
@given(
    probes=probe_lists(),
    examples=st.integers(1, 3),
    k=st.integers(1, 2),
    dtype=st.sampled_from(tuple(TOLERANCE)),
    last=st.booleans(),
)
def test_shifts_of_batch_norms(
    probes: list[Probe], examples: int, k: int, dtype: torch.dtype, last: bool
) -> None:
    module = Shift(*(torch.arange(4.0) * f - 1 for f in (1.0, 0.5, 0.3)), share=0.5)
    block = FloatBlock.of("m.share", module.share, [Owner("m", module, "share")])
    view = view_of(probes, examples, k)
    agree(module, [block], view, images(view.rows, 4, last, dtype), TOLERANCE[dtype])


@settings(max_examples=30)
@given(
    probes=probe_lists(),
    examples=st.integers(1, 3),
    k=st.integers(1, 2),
    space=st.sampled_from((Weights(), Biases(), Weights(pattern="weight"))),
    groups=st.sampled_from((1, 2)),
    padding=st.sampled_from((0, 1, "same")),
    mode=st.sampled_from(("zeros", "circular")),
    last=st.booleans(),
)
def test_convolutions(
    probes: list[Probe], examples: int, k: int, space: Any, groups: int, padding: Any, mode: str,
    last: bool,
) -> None:  # fmt: skip
    module = nn.Conv2d(4, 6, 3, padding=padding, groups=groups, padding_mode=mode)
    blocks = list(space.build(filled_(module)))
    view = view_of(probes, examples, k)
    agree(module, blocks, view, images(view.rows, 4, last), TOLERANCE[torch.float32])


@settings(max_examples=40)
@given(
    probes=probe_lists(),
    examples=st.integers(1, 3),
    k=st.integers(1, 2),
    case=st.sampled_from(
        (
            (Scales(), "int8-channel"),
            (Scales(), "int4-g4"),
            (Scales(), "int8-tensor"),
            (Scales(), "int8-channel-asym"),
            (Zeros(), "int4-channel-asym"),
            (Codes(), "int4-channel"),
            (Scales() + Biases(), "int8-channel"),
        )
    ),
    act=st.booleans(),
    groups=st.sampled_from((1, 2)),
    last=st.booleans(),
)
def test_quantized_convolutions(
    probes: list[Probe], examples: int, k: int, case: Any, act: bool, groups: int, last: bool
) -> None:  # fmt: skip
    if groups == 2 and "g4" in case[1]:
        groups = 1
    source = filled_(nn.Conv2d(4, 6, 3, padding=1, groups=groups))
    scheme = Scheme.parse(case[1] + ("-a8" if act else ""))
    module = QuantConv2d.from_conv(source, scheme).requires_grad_(False)
    view = view_of(probes, examples, k)
    agree(module, list(case[0].build(module)), view, images(view.rows, 4, last), 2e-5)


def test_scales_of_all_probes_share_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    module = QuantConv2d.from_conv(filled_(nn.Conv2d(4, 6, 3)), Scheme.parse("int8-channel"))
    blocks = list(Scales().build(module))
    blocks[0].bind_(0.1, 1.0, "relative")
    products: list[int] = []
    own = QuantConv2d.unscaled

    def counted(layer: QuantConv2d, x: Tensor) -> Tensor:
        products.append(len(x))
        return own(layer, x)

    monkeypatch.setattr(QuantConv2d, "unscaled", counted)
    probes = [Probe(Key(0, query=q), step) for q in range(3) for step in (0.1, -0.1)]
    through(module, blocks, view_of(probes, 2, 1), images(12, 4, False), True)
    assert products == [12]


def test_norms_of_a_network_hold_its_batch_norms_and_leave_its_statistics() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    assert [block.name for block in Norms().build(model)] == ["1.weight", "1.bias"]


def test_each_image_layer_has_its_forward() -> None:
    assert {nn.Conv2d, nn.BatchNorm2d, QuantConv2d, Shift} <= set(sites._FORWARDS)


@pytest.mark.parametrize("size", [4, 5, 6, 8])
def test_what_lies_below_the_head_runs_once_whatever_the_size_of_batch_and_picture(
    size: int,
) -> None:
    """Also where there are as many examples as channels, rows or columns."""
    body = filled_(nn.Sequential(nn.Conv2d(4, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    model = nn.Sequential(body, filled_(nn.Linear(8, 3)))
    space = Weights(pattern="^1.").build(model)
    space.bind_(0.1, 1.0, "relative")
    probes = [Probe(Key(0, query=q), step) for q in range(2) for step in (0.1, -0.1)]
    batch = Batch({"pixels": images(size, 4, False)}, size)
    rows: list[int] = []
    handle = body[0].register_forward_hook(lambda module, args, out: rows.append(len(out)))

    def objective(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        loss = model(batch["pixels"]).square().mean(1)
        return loss, torch.ones_like(loss)

    shared, alone = (
        TorchEvaluator(model, space, objective, fast=fast).losses(probes, batch, Gaussian())
        for fast in (True, False)
    )
    handle.remove()
    assert rows == [size, 4 * size]  # fast, slow
    torch.testing.assert_close(shared.per_example, alone.per_example, rtol=1e-6, atol=1e-6)
