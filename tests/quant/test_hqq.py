"""HQQ's layout. Run: pytest tests/quant/test_hqq.py"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quant.restated import headers
from torch import Tensor, nn

from zotune.errors import FormatError
from zotune.quant import QuantLinear
from zotune.quant.formats.hqq import FORMAT, HqqLayout
from zotune.quant.formats.layout import place_, values_of
from zotune.quant.formats.shards import raw_bytes
from zotune.quant.scheme import Scheme

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def pack(codes: Any, bits: int) -> Tensor:
    """Rows of a matrix, part by part, the first part in the highest bits."""
    parts = {8: 1, 4: 2, 3: 10, 2: 4}[bits]
    rows = math.ceil(len(codes) / parts)
    words = np.zeros((rows, codes.shape[1]), dtype=np.int64)
    for row, values in enumerate(codes):
        words[row % rows] += values.astype(np.int64) << (bits * (parts - 1 - row // rows))
    return torch.from_numpy(words).to(torch.int32 if bits == 3 else torch.uint8)


def drawn(
    bits: int, rows: int, columns: int, size: int, dtype: torch.dtype, seed: int, as_float: bool
) -> tuple[dict[str, Tensor], Any]:
    """A layer's tensors and, in float64, its weight."""
    random = np.random.default_rng(seed)
    groups = rows * columns // size
    codes = random.integers(0, 1 << bits, (groups, size))
    scale = torch.from_numpy(random.uniform(0.01, 1, (groups, 1))).to(dtype)
    zero = torch.from_numpy(random.uniform(-1, 1 << bits, (groups, 1))).to(dtype)
    packed = pack(codes, bits)
    stored = {
        "W_q": packed.view(torch.float16) if as_float else packed,
        "scale": scale,
        "zero": zero,
        "nbits": torch.tensor(bits, dtype=torch.int32),
        "group_size": torch.tensor(size, dtype=torch.int32),
        "axis": torch.tensor(1, dtype=torch.int32),
        "shape": torch.tensor([rows, columns]),
        "packing": torch.tensor(list(b"4bit_u8"), dtype=torch.uint8),
        "quant_scale": torch.tensor(0, dtype=torch.uint8),
        "quant_zero": torch.tensor(0, dtype=torch.uint8),
    }
    weight = (codes - zero.double().numpy()) * scale.double().numpy()
    return stored, weight.reshape(rows, columns)


def layer(stored: dict[str, Tensor], layout: HqqLayout) -> QuantLinear:
    model = nn.Sequential(nn.Linear(layout.columns, layout.rows, bias=False, device="meta"))
    return place_(model, "0", layout, stored, bias=False)


def layout_of(folder: Path, stored: dict[str, Tensor], shape: tuple[int, int]) -> HqqLayout:
    return FORMAT.layout({}, "q_proj", headers(folder, stored), shape)


@given(
    bits=st.sampled_from((8, 4, 3, 2)), rows=st.integers(1, 24), blocks=st.integers(1, 3),
    size=st.sampled_from((4, 16, 30)), dtype=st.sampled_from(DTYPES), as_float=st.booleans(),
    seed=st.integers(0, 2**31),
)  # fmt: skip
def test_layers_are_the_restated_ones_and_come_back_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, bits: int, rows: int, blocks: int, size: int,
    dtype: torch.dtype, as_float: bool, seed: int,
) -> None:  # fmt: skip
    rows *= 4 if bits in (2, 4) else 1
    stored, expected = drawn(bits, rows, blocks * size, size, dtype, seed, as_float)
    layout = layout_of(tmp_path_factory.mktemp("hqq"), stored, (rows, blocks * size))
    found = layer(stored, layout)
    atol = 1e-6 * (1 << bits)
    np.testing.assert_allclose(found.dequantize().double(), expected, rtol=1e-6, atol=atol)
    x = torch.from_numpy(np.random.default_rng(seed).standard_normal((3, blocks * size))).float()
    np.testing.assert_allclose(found(x), x.double() @ expected.T, atol=1e-3 * (1 << bits))
    encoded = layout.encode(values_of(found))
    for part in ("W_q", "scale"):
        assert torch.equal(raw_bytes(encoded[part]), raw_bytes(stored[part]))
    # Centring may cost a zero near 0 its last bits, once.
    torch.testing.assert_close(encoded["zero"].float(), stored["zero"].float(), rtol=0, atol=1e-5)
    assert all(encoded[k].dtype == stored[k].dtype for k in encoded)


@given(
    bits=st.sampled_from((8, 4, 3, 2)), dtype=st.sampled_from(DTYPES), as_float=st.booleans(),
    seed=st.integers(0, 2**31),
)  # fmt: skip
def test_tuned_values_come_back_as_they_were_rounded(
    bits: int, dtype: torch.dtype, as_float: bool, seed: int
) -> None:
    stored, _ = drawn(bits, 8, 32, 16, dtype, seed, as_float)
    stored["zero"][0] = float(torch.finfo(dtype).smallest_normal)
    layout = HqqLayout(Scheme(bits, False, 16), 8, 32, stored["W_q"].dtype, dtype, dtype)
    found = layer(stored, layout)
    assert found.zero is not None
    untouched = found.zero.clone()
    found.round_to_storage_()
    assert torch.equal(raw_bytes(found.zero), raw_bytes(untouched))
    random, half = torch.Generator().manual_seed(seed), 1 << (bits - 1)
    found.scale.mul_(torch.rand(found.scale.shape, generator=random) + 0.5)
    found.zero.add_((torch.rand(found.zero.shape, generator=random) - 0.5) * 3 * half)
    found.set_codes_(torch.randint(-half, half, (8, 32), generator=random).to(torch.int8))
    found.round_to_storage_()
    values = values_of(found)
    again = layout.decode({**stored, **layout.encode(values)})
    for one, other in zip(values[:3], again[:3], strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(raw_bytes(one), raw_bytes(other))


def number(value: int) -> Tensor:
    return torch.tensor(value, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nbits": number(1)}, r"nbits=\[1\], axis=\[1\]"),
        ({"nbits": number(5)}, r"nbits=\[5\]"),
        ({"nbits": torch.tensor(1.58)}, r"nbits' is torch.float32 \(\); wanted integers"),
        ({"nbits": None}, "nbits' is missing; HQQ is read as transformers"),
        ({"nbits": torch.zeros(0, dtype=torch.int32)}, r"nbits=\[\]"),
        ({"axis": number(0)}, r"axis=\[0\]"),
        ({"quant_zero": number(1)}, r"quant_scale and quant_zero=\[\[0\], \[1\]\]"),
        ({"shape": torch.tensor([64, 6])}, r"shape=\[64, 6\]"),
        ({"shape": torch.zeros(1000, dtype=torch.int64)}, r"shape' is torch.int64 \(1000,\)"),
        ({"group_size": number(0)}, r"group_size=\[0\]"),
        ({"group_size": number(24)}, r"group_size=\[24\]; wanted .* a divisor of its 64 inputs"),
        ({"W_q": torch.zeros(12, 15, dtype=torch.uint8)}, r"W_q' is torch.uint8 \(12, 15\)"),
        ({"W_q": torch.zeros(12, 16, dtype=torch.int8)}, r"W_q' is torch.int8"),
        ({"scale": torch.ones(24)}, r"scale' is torch.float32 \(24,\)"),
        ({"scale": torch.ones(24, 1, dtype=torch.uint8)}, "scale' is torch.uint8"),
        ({"zero": None}, "zero' is missing"),
        ({"zero_q": torch.ones(1)}, r"not understood: \['zero_q'\]"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, change: Any, message: str) -> None:
    stored, _ = drawn(4, 6, 64, 16, torch.float16, 0, False)
    stored = {k: v for k, v in {**stored, **change}.items() if v is not None}
    with pytest.raises(FormatError, match=message):
        layout_of(tmp_path, stored, (6, 64))


def test_groups_that_fill_no_whole_bytes_are_refused(tmp_path: Path) -> None:
    stored, _ = drawn(2, 6, 16, 16, torch.float16, 0, False)
    with pytest.raises(FormatError, match="6 groups, which do not fill whole bytes"):
        layout_of(tmp_path, stored, (6, 16))


@given(
    part=st.sampled_from(("nbits", "group_size", "axis", "shape", "quant_scale", "W_q", "zero")),
    dtype=st.sampled_from((torch.uint8, torch.int32, torch.int64, torch.float16, torch.bool)),
    shape=st.lists(st.integers(0, 5), max_size=3), fill=st.integers(0, 200),
)  # fmt: skip
def test_any_tensor_in_a_wrong_place_is_refused_with_a_message(
    tmp_path_factory: pytest.TempPathFactory, part: str, dtype: torch.dtype, shape: list[int],
    fill: int,
) -> None:  # fmt: skip
    stored, _ = drawn(4, 6, 64, 16, torch.float16, 0, False)
    right = stored[part]
    stored[part] = torch.full(shape, fill).to(dtype)
    here = tmp_path_factory.mktemp("hqq")
    if stored[part].flatten().tolist() == right.flatten().tolist():
        layout_of(here, stored, (6, 64))
        return
    with pytest.raises(FormatError, match="q_proj"):
        layout_of(here, stored, (6, 64))


@pytest.mark.parametrize(("method", "mine"), [("hqq", True), ("gptq", False)])
def test_folders_are_told_by_their_config(tmp_path: Path, method: str, mine: bool) -> None:
    config = {"quantization_config": {"quant_method": method}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert FORMAT.detect(tmp_path) is mine
