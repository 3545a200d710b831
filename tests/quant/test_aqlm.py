"""AQLM's layout. Run: pytest tests/quant/test_aqlm.py"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quant.restated import headers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from zotune.core.spaces import get
from zotune.errors import BadInput, FormatError
from zotune.quant import formats
from zotune.quant.formats.aqlm import FORMAT, AdditiveLinear, AqlmLayout
from zotune.quant.formats.layout import place_, values_of

GOLDEN = Path(__file__).parent / "golden"
RECORD = {
    "num_codebooks": 2, "nbits_per_codebook": 8, "in_group_size": 4, "out_group_size": 1,
}  # fmt: skip


def drawn(
    books: int, bits: int, size: int, rows: int, columns: int, dtype: torch.dtype, seed: int
) -> tuple[dict[str, Tensor], Any]:
    """A layer's tensors and, in float64, its weight, vector by vector."""
    random = np.random.default_rng(seed)
    codes = random.integers(0, 1 << bits, (rows, columns // size, books))
    signed = np.where(codes < 1 << (bits - 1), codes, codes - (1 << bits))
    generator = torch.Generator().manual_seed(seed)
    stored = {
        "codebooks": torch.randn(books, 1 << bits, 1, size, generator=generator).to(dtype),
        "codes": torch.from_numpy(signed).to(torch.int8 if bits == 8 else torch.int16),
        "scales": (torch.rand(rows, 1, 1, 1, generator=generator) + 0.1).to(dtype),
    }
    tables, scales = stored["codebooks"].double().numpy(), stored["scales"].double().numpy()
    weight = np.zeros((rows, columns))
    for row in range(rows):
        for group in range(columns // size):
            place = slice(group * size, group * size + size)
            for book in range(books):
                weight[row, place] += tables[book, codes[row, group, book], 0]
        weight[row] *= scales[row, 0, 0, 0]
    return stored, weight


def layer(stored: dict[str, Tensor], layout: AqlmLayout, columns: int) -> AdditiveLinear:
    model = nn.Sequential(nn.Linear(columns, len(stored["codes"]), bias=False, device="meta"))
    found = place_(model, "0", layout, stored, bias=False)
    assert isinstance(found, AdditiveLinear)
    found.codebooks = nn.Parameter(stored["codebooks"])
    return found


@given(
    shape=st.sampled_from(((1, 16), (2, 8), (1, 8), (3, 8))), size=st.sampled_from((4, 8)),
    rows=st.integers(1, 12), groups=st.integers(1, 5), seed=st.integers(0, 2**31),
    dtype=st.sampled_from((torch.float16, torch.bfloat16, torch.float32)),
)  # fmt: skip
def test_layers_are_the_restated_ones_and_come_back_tuned_or_not(
    tmp_path_factory: pytest.TempPathFactory, shape: tuple[int, int], size: int, rows: int,
    groups: int, seed: int, dtype: torch.dtype,
) -> None:  # fmt: skip
    (books, bits), columns = shape, groups * size
    stored, expected = drawn(books, bits, size, rows, columns, dtype, seed)
    record = {
        "num_codebooks": books, "nbits_per_codebook": bits, "in_group_size": size,
        "out_group_size": 1,
    }  # fmt: skip
    found = headers(tmp_path_factory.mktemp("aqlm"), stored)
    layout = FORMAT.layout(record, "q_proj", found, (rows, columns))
    linear = layer(stored, layout, columns)
    np.testing.assert_allclose(linear.dequantize().double(), expected, rtol=1e-5, atol=1e-5)
    x = torch.from_numpy(np.random.default_rng(seed).standard_normal((3, columns))).float()
    with torch.no_grad():
        np.testing.assert_allclose(linear(x), x.double() @ expected.T, atol=1e-3)
    encoded = layout.encode(values_of(linear))
    assert list(encoded) == ["scales"]
    assert torch.equal(encoded["scales"], stored["scales"])
    linear.scale.mul_(torch.rand(linear.scale.shape) + 0.5)
    linear.round_to_storage_()
    again = layout.decode({**stored, **layout.encode(values_of(linear))})
    assert torch.equal(again.scale, linear.scale)
    assert torch.equal(again.codes, linear.codes)


def test_codebooks_are_weights_and_codes_do_not_move() -> None:
    model = formats.read(GOLDEN / "aqlm-2x8", AutoModelForCausalLM, dtype=torch.float32)
    names = {block.name for block in get("weights").build(model)}
    assert "model.layers.0.self_attn.q_proj.codebooks" in names
    with pytest.raises(BadInput, match=r"codes of .* are floats"):
        get("codes").build(model)
    linear = model.get_submodule("model.layers.0.self_attn.q_proj")
    assert isinstance(linear, AdditiveLinear)
    # The model in 16 bits keeps its scales in 32.
    model.to(torch.bfloat16)
    assert (linear.codebooks.dtype, linear.scale.dtype) == (torch.bfloat16, torch.float32)
    assert linear(torch.ones(2, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codebooks": torch.ones(2, 256, 4)}, r"codebooks' is torch.float32 \(2, 256, 4\)"),
        ({"codebooks": torch.ones(2, 256, 1, 4, dtype=torch.int8)}, "codebooks' is torch.int8"),
        ({"codes": torch.zeros(6, 4, 2, dtype=torch.int16)}, "codes' is torch.int16"),
        ({"codes": torch.zeros(4, 6, 2, dtype=torch.int8)}, r"codes' is torch.int8 \(4, 6, 2\)"),
        ({"codes": None}, "codes' is missing"),
        ({"scales": torch.ones(6)}, r"scales' is torch.float32 \(6,\)"),
        ({"g_idx": torch.ones(6)}, r"not understood: \['g_idx'\]"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path: Path, change: Any, message: str) -> None:
    stored, _ = drawn(2, 8, 4, 6, 16, torch.float32, 0)
    stored = {k: v for k, v in {**stored, **change}.items() if v is not None}
    with pytest.raises(FormatError, match=message):
        FORMAT.layout(RECORD, "q_proj", headers(tmp_path, stored), (6, 16))


def test_vectors_that_do_not_fill_a_row_are_refused(tmp_path: Path) -> None:
    stored, _ = drawn(2, 8, 4, 6, 16, torch.float32, 0)
    with pytest.raises(FormatError, match="18 inputs in vectors of 4"):
        FORMAT.layout(RECORD, "q_proj", headers(tmp_path, stored), (6, 18))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nbits_per_codebook": 12}, "'nbits_per_codebook': 12"),
        ({"nbits_per_codebook": [8]}, r"'nbits_per_codebook': \[8\]"),
        ({"out_group_size": 2}, "'out_group_size': 2"),
        ({"num_codebooks": 0}, "'num_codebooks': 0"),
        ({"num_codebooks": True}, "'num_codebooks': True"),
        ({"in_group_size": None}, "'in_group_size': None"),
    ],
)
def test_settings_that_are_not_read_are_named(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    config = {"quantization_config": {"quant_method": "aqlm", **RECORD, **change}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert FORMAT.detect(tmp_path)
    with pytest.raises(FormatError, match=message):
        FORMAT.record(tmp_path)
