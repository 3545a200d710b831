"""GPTQ's layout. Run: pytest tests/quant/test_gptq.py"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quant.restated import gptq, headers, weight
from torch import Tensor, nn

from zotune.errors import FormatError
from zotune.quant.formats.gptq import FORMAT, GptqLayout
from zotune.quant.formats.layout import place_, values_of
from zotune.quant.formats.shards import raw_bytes
from zotune.quant.linear import QuantLinear
from zotune.quant.scheme import Scheme

RECORD: dict[str, Any] = {"bits": 4, "group_size": 32, "desc_act": False, "version": 1}


def drawn(
    bits: int, version: int, size: int | None, act: bool, columns: int, rows: int, seed: int,
    dtype: torch.dtype,
) -> tuple[dict[str, Tensor], Any]:  # fmt: skip
    """A layer's tensors and, in float64, its weight."""
    random = np.random.default_rng(seed)
    g_idx = np.arange(columns) // (size or columns)
    if act:
        g_idx = random.permutation(g_idx)
    codes = random.integers(0, 1 << bits, (columns, rows))
    zeros = random.integers(1, 1 << bits, (int(g_idx.max()) + 1, rows))
    scales = torch.from_numpy(random.uniform(0.01, 1, zeros.shape)).to(dtype)
    stored = gptq(codes, zeros, scales, bits, version, g_idx if act else None)
    return stored, weight(codes, zeros, scales, g_idx)


def layer(stored: dict[str, Tensor], layout: GptqLayout) -> QuantLinear:
    rows, columns = layout.rows, layout.columns
    model = nn.Sequential(nn.Linear(columns, rows, bias=False, device="meta"))
    return place_(model, "0", layout, stored, bias=False)


def layout_of(folder: Path, stored: dict[str, Tensor], shape: tuple[int, int], **more: Any) -> Any:
    found = headers(folder, {k: v.contiguous() for k, v in stored.items()})
    return FORMAT.layout({**RECORD, **more}, "q_proj", found, shape)


@given(
    bits=st.sampled_from((2, 3, 4, 8)), version=st.sampled_from((1, 2)), act=st.booleans(),
    size=st.none() | st.integers(1, 80), columns=st.sampled_from((32, 64, 96)),
    rows=st.integers(1, 40), seed=st.integers(0, 2**31),
    dtype=st.sampled_from((torch.float16, torch.bfloat16)),
)  # fmt: skip
def test_layers_are_the_restated_ones_and_come_back_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, bits: int, version: int, act: bool, size: int | None,
    columns: int, rows: int, seed: int, dtype: torch.dtype,
) -> None:  # fmt: skip
    stored, expected = drawn(bits, version, size, act, columns, rows, seed, dtype)
    layout = layout_of(
        tmp_path_factory.mktemp("gptq"), stored, (rows, columns), bits=bits, version=version,
        group_size=size or -1, desc_act=act,
    )  # fmt: skip
    found = layer(stored, layout)
    np.testing.assert_allclose(found.dequantize().double().numpy(), expected, rtol=1e-6)
    x = torch.from_numpy(np.random.default_rng(seed).standard_normal((3, columns))).float()
    np.testing.assert_allclose(found(x), x.double() @ expected.T, atol=1e-3 * (1 << bits))
    encoded = layout.encode(values_of(found))
    assert {k: v.tolist() for k, v in encoded.items()} == {k: stored[k].tolist() for k in encoded}
    assert {"qweight", "scales"} <= set(encoded)


@given(
    bits=st.sampled_from((2, 3, 4, 8)), version=st.sampled_from((1, 2)), seed=st.integers(0, 2**31)
)
def test_tuned_values_come_back_as_they_were_rounded(bits: int, version: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    stored, _ = drawn(bits, version, 32, True, 64, 24, seed, torch.float16)
    layout = GptqLayout(Scheme(bits, False, 32), 24, 64, version, torch.float16)
    found = layer(stored, layout)
    half = 1 << (bits - 1)
    found.scale.mul_(torch.rand(found.scale.shape, generator=generator) + 0.5)
    assert found.zero is not None
    # Beyond the range at both ends: 0 and 2^b - 1 are stored too.
    found.zero.copy_((torch.rand(found.zero.shape, generator=generator) - 0.5) * 3 * half)
    found.set_codes_(torch.randint(-half, half, (24, 64), generator=generator).to(torch.int8))
    found.round_to_storage_()
    values = values_of(found)
    again = layout.decode({**stored, **layout.encode(values)})
    for one, other in zip(values, again, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(raw_bytes(one), raw_bytes(other))


def test_symmetric_layers_have_no_zeros_and_keep_the_stored_ones() -> None:
    stored, _ = drawn(4, 1, 32, False, 64, 16, 0, torch.float16)
    stored["qzeros"] = torch.full_like(stored["qzeros"], 0x77777777)
    layout = GptqLayout(Scheme(4, False, 32), 16, 64, 1, torch.float16)
    found = layer(stored, layout)
    assert found.zero is None
    assert found.scheme.symmetric
    assert "qzeros" not in layout.encode(values_of(found))


def broken(**change: Any) -> dict[str, Tensor]:
    stored, _ = drawn(4, 1, 32, True, 64, 16, 0, torch.float16)
    stored.update(change)
    return {k: v for k, v in stored.items() if v is not None}


@pytest.mark.parametrize(
    ("change", "more", "message"),
    [
        (
            {"g_idx": None},
            {"desc_act": True},
            "no g_idx, but the config says desc_act",
        ),
        ({"qzeros": None}, {}, "tensor 'q_proj.qzeros' is missing"),
        ({"scales": None}, {}, "group_size=32 does not make so many"),
        ({"scales": torch.ones(3, 16).half()}, {}, "has 3 groups; group_size=32 does not make"),
        ({"scales": torch.ones(2, 15).half()}, {}, r"scales' is torch.float16 \(2, 15\); wanted"),
        ({"scales": torch.ones(2, 16).long()}, {}, "scales' is torch.int64"),
        ({"scales": torch.tensor(1.0)}, {}, "group_size=32"),
        (
            {"qweight": torch.zeros(8, 15, dtype=torch.int32)},
            {},
            r"is torch.int32 \(8, 15",
        ),
        ({"qweight": torch.zeros(8, 16)}, {}, r"qweight' is torch.float32"),
        ({"qweight": torch.tensor(1)}, {"dynamic": {"x": 1}}, r"qweight' is torch.int64"),
        (
            {"qweight": torch.zeros(10, 16, dtype=torch.int32)},
            {"dynamic": {"-:x": {}}},
            "has 5 bits",
        ),
        ({"g_idx": torch.zeros(63, dtype=torch.int32)}, {}, r"g_idx' is torch.int32 \(63,\)"),
        ({"perm": torch.zeros(1)}, {}, r"not understood: \['perm'\]"),
    ],
)
def test_what_does_not_fit_is_named(
    tmp_path: Path, change: dict[str, Any], more: dict[str, Any], message: str
) -> None:
    with pytest.raises(FormatError, match=message):
        layout_of(tmp_path, broken(**change), (16, 64), **more)


@pytest.mark.parametrize("g_idx", [[0] * 64, [0] * 31 + [1] * 33, [5] * 64, [-1] * 64])
def test_groups_of_uneven_sizes_are_refused(tmp_path: Path, g_idx: list[int]) -> None:
    stored = broken(g_idx=torch.tensor(g_idx, dtype=torch.int32))
    with pytest.raises(FormatError, match="g_idx gives groups other than 32 columns"):
        layout_of(tmp_path, stored, (16, 64)).decode(stored)


def test_inputs_that_fill_no_whole_words_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"60 inputs, whose .*codes do not fill whole words"):
        layout_of(tmp_path, broken(), (16, 60))


def test_exceptions_of_the_config_are_told_by_shapes(tmp_path: Path) -> None:
    stored, expected = drawn(8, 1, 16, False, 64, 16, 0, torch.float16)
    layout = layout_of(tmp_path, stored, (16, 64), dynamic={"q_proj": {"bits": 8}})
    assert str(layout.scheme) == "int8-g16-asym"
    np.testing.assert_allclose(layer(stored, layout).dequantize(), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 5}, "bits=5; GPTQ is read with"),
        ({"bits": None}, "bits=None"),
        ({"bits": "4"}, "bits='4'"),
        ({"group_size": 0}, "group_size=0; want -1"),
        ({"group_size": True}, "group_size=True"),
        ({"group_size": -2}, "group_size=-2"),
        ({"checkpoint_format": "marlin"}, r"checkpoint_format='marlin'.*\['gptq', 'gptq_v2'\]"),
    ],
)
@pytest.mark.parametrize("place", ["config.json", "quantize_config.json"])
def test_settings_that_are_not_read_are_named(
    tmp_path: Path, place: str, change: dict[str, Any], message: str
) -> None:
    record = {"bits": 4, "group_size": 128, **change}
    config: dict[str, Any] = {}
    if place == "config.json":
        config = {"quantization_config": {"quant_method": "gptq", **record}}
    else:
        (tmp_path / place).write_text(json.dumps(record))
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert FORMAT.detect(tmp_path)
    with pytest.raises(FormatError, match=message):
        FORMAT.record(tmp_path)
