"""AWQ's layout. Run: pytest tests/quant/test_awq.py"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quant.restated import awq, headers, weight
from torch import Tensor, nn

from zotune.errors import FormatError
from zotune.quant.formats.awq import FORMAT, AwqLayout
from zotune.quant.formats.layout import place_, values_of
from zotune.quant.formats.shards import raw_bytes
from zotune.quant.linear import QuantLinear


def drawn(columns: int, rows: int, size: int, seed: int) -> tuple[dict[str, Tensor], Any]:
    """A layer's tensors and, in float64, its weight."""
    random = np.random.default_rng(seed)
    g_idx = np.arange(columns) // size
    codes = random.integers(0, 16, (columns, rows))
    zeros = random.integers(0, 16, (int(g_idx.max()) + 1, rows))
    scales = torch.from_numpy(random.uniform(0.01, 1, zeros.shape)).half()
    return awq(codes, zeros, scales), weight(codes, zeros, scales, g_idx)


def layer(stored: dict[str, Tensor], layout: AwqLayout, shape: tuple[int, int]) -> QuantLinear:
    model = nn.Sequential(nn.Linear(shape[1], shape[0], bias=False, device="meta"))
    return place_(model, "0", layout, stored, bias=False)


def layout_of(folder: Path, stored: dict[str, Tensor], shape: tuple[int, int], size: int) -> Any:
    return FORMAT.layout({"group_size": size}, "q_proj", headers(folder, stored), shape)


@given(
    eights=st.integers(1, 5), columns=st.integers(1, 70), size=st.integers(1, 80),
    seed=st.integers(0, 2**31),
)  # fmt: skip
def test_layers_are_the_restated_ones_and_come_back_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, eights: int, columns: int, size: int, seed: int
) -> None:
    shape = (8 * eights, columns)
    stored, expected = drawn(columns, 8 * eights, size, seed)
    layout = layout_of(tmp_path_factory.mktemp("awq"), stored, shape, size)
    found = layer(stored, layout, shape)
    np.testing.assert_allclose(found.dequantize().double().numpy(), expected, rtol=1e-6)
    encoded = layout.encode(values_of(found))
    assert {k: v.tolist() for k, v in encoded.items()} == {k: stored[k].tolist() for k in encoded}


@given(seed=st.integers(0, 2**31))
def test_tuned_values_come_back_as_they_were_rounded(
    tmp_path_factory: pytest.TempPathFactory, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    stored, _ = drawn(64, 16, 24, seed)
    layout = layout_of(tmp_path_factory.mktemp("awq"), stored, (16, 64), 24)
    found = layer(stored, layout, (16, 64))
    assert found.zero is not None
    found.scale.mul_(torch.rand(found.scale.shape, generator=generator) + 0.5)
    found.zero.copy_((torch.rand(found.zero.shape, generator=generator) - 0.5) * 24)
    found.set_codes_(torch.randint(-8, 8, (16, 64), generator=generator).to(torch.int8))
    found.round_to_storage_()
    values = values_of(found)
    again = layout.decode(layout.encode(values))
    for one, other in zip(values, again, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(raw_bytes(one), raw_bytes(other))


@pytest.mark.parametrize(
    ("change", "shape", "message"),
    [
        ({}, (12, 64), "has 12 outputs; AWQ packs eight at a time"),
        ({"qzeros": None}, (16, 64), "tensor 'q_proj.qzeros' is missing"),
        ({"scales": torch.ones(3, 16)}, (16, 64), r"scales' is torch.float32 \(3, 16\); wanted"),
        ({"qweight": torch.zeros(64, 2)}, (16, 64), "qweight' is torch.float32"),
        ({"g_idx": torch.zeros(64)}, (16, 64), r"not understood: \['g_idx'\]"),
    ],
)
def test_what_does_not_fit_is_named(
    tmp_path: Path, change: dict[str, Any], shape: tuple[int, int], message: str
) -> None:
    stored = {**drawn(64, 16, 32, 0)[0], **change}
    stored = {k: v for k, v in stored.items() if v is not None}
    with pytest.raises(FormatError, match=message):
        layout_of(tmp_path, stored, shape, 32)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"bits": 4, "group_size": 128, "version": "gemv"}, "version='gemv' with bits=4"),
        ({"bits": 8, "group_size": 128}, "version='gemm' with bits=8"),
        ({"w_bit": 4, "q_group_size": 0, "version": "GEMM"}, "group_size=0"),
        ({"bits": 4, "version": "GEMM"}, "group_size=None"),
    ],
)
@pytest.mark.parametrize("place", ["config.json", "quant_config.json"])
def test_settings_that_are_not_read_are_named(
    tmp_path: Path, place: str, record: dict[str, Any], message: str
) -> None:
    config: dict[str, Any] = {"quantization_config": {"quant_method": "awq", **record}}
    if place != "config.json":
        config = {}
        (tmp_path / place).write_text(json.dumps(record))
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert FORMAT.detect(tmp_path)
    with pytest.raises(FormatError, match=message):
        FORMAT.record(tmp_path)
