"""torchao's layouts. Run: pytest tests/quant/test_torchao.py"""

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
from safetensors.torch import save_file
from torch import Tensor, nn

from zotune.errors import FormatError
from zotune.quant.formats.layout import place_, values_of
from zotune.quant.formats.shards import raw_bytes
from zotune.quant.formats.torchao import FORMAT, TorchaoLayout


def metadata(
    bits: int = 4, size: int = 16, kind: str = "IntxUnpackedToInt8Tensor", **more: Any
) -> Any:
    settings = {
        "target_dtype": {"_type": "torch.dtype", "_data": f"int{bits}"},
        "block_size": [1, size],
        "activation_quantization": None,
        **more,
    }
    return {"model.q_proj.weight": json.dumps({"_type": kind, "_data": settings})}


def drawn(
    bits: int, rows: int, columns: int, size: int, dtype: torch.dtype, seed: int
) -> tuple[dict[str, Tensor], Any]:
    """A layer's tensors and, in float64, its weight."""
    random, half = np.random.default_rng(seed), 1 << (bits - 1)
    codes = random.integers(-half, half, (rows, columns)).astype(np.int8)
    zeros = random.integers(-half, half, (rows, columns // size)).astype(np.int8)
    scale = torch.from_numpy(random.uniform(0.01, 1, zeros.shape)).to(dtype)
    stored = {
        "_weight_qdata": torch.from_numpy(codes),
        "_weight_scale": scale,
        "_weight_zero_point": torch.from_numpy(zeros),
    }
    spread = (codes.astype(int) - zeros.repeat(size, axis=1)) * scale.double().numpy().repeat(
        size, axis=1
    )
    return stored, spread


def layout_of(folder: Path, stored: dict[str, Tensor], record: Any, shape: Any) -> TorchaoLayout:
    return FORMAT.layout(record, "q_proj", headers(folder, stored), shape)


@given(
    bits=st.sampled_from((2, 3, 4, 8)), rows=st.integers(1, 20), groups=st.integers(1, 4),
    size=st.sampled_from((8, 24)), seed=st.integers(0, 2**31),
    dtype=st.sampled_from((torch.float16, torch.bfloat16, torch.float32)),
)  # fmt: skip
def test_layers_are_the_restated_ones_and_come_back_bit_for_bit_tuned_or_not(
    tmp_path_factory: pytest.TempPathFactory, bits: int, rows: int, groups: int, size: int,
    seed: int, dtype: torch.dtype,
) -> None:  # fmt: skip
    columns = groups * size
    stored, expected = drawn(bits, rows, columns, size, dtype, seed)
    folder = tmp_path_factory.mktemp("ao")
    layout = layout_of(folder, stored, metadata(bits, size), (rows, columns))
    model = nn.Sequential(nn.Linear(columns, rows, bias=False, device="meta"))
    found = place_(model, "0", layout, stored, bias=False)
    np.testing.assert_allclose(found.dequantize().double(), expected, rtol=1e-6)
    encoded = layout.encode(values_of(found))
    assert {k: v.tolist() for k, v in encoded.items()} == {k: stored[k].tolist() for k in encoded}
    random, half = torch.Generator().manual_seed(seed), 1 << (bits - 1)
    found.scale.mul_(torch.rand(found.scale.shape, generator=random) + 0.5)
    found.set_codes_(torch.randint(-half, half, (rows, columns), generator=random).to(torch.int8))
    if found.zero is not None:
        found.zero.copy_((torch.rand(found.zero.shape, generator=random) - 0.5) * 3 * half)
    found.round_to_storage_()
    values = values_of(found)
    again = layout.decode({**stored, **layout.encode(values)})
    assert torch.equal(raw_bytes(again.codes), raw_bytes(values.codes))
    assert torch.equal(raw_bytes(again.scale), raw_bytes(values.scale))
    if values.zero is not None:
        assert (values.zero - (0.0 if again.zero is None else again.zero)).abs().max() == 0


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({}, "metadata do not tell what kind of tensor 'q_proj.weight' is"),
        ({"q_proj.weight": "{"}, "do not tell"),
        ({"q_proj.weight": "[" * 100_000}, "do not tell"),
        ({"q_proj.weight": "[]"}, "do not tell"),
        ({"q_proj.weight": '{"_type": "Int8Tensor", "_data": 1}'}, "do not tell"),
        (metadata(kind="Int4Tensor"), "is a Int4Tensor of torchao"),
        (metadata(kind="Float8Tensor"), "is a Float8Tensor"),
        (metadata(bits=5), "wanted .* one of"),
        (metadata(target_dtype=None), "target_dtype=None"),
        (metadata(size=48), r"block_size=\[1, 48\]"),
        (metadata(size=0), r"block_size=\[1, 0\]"),
        (metadata(block_size=[2, 16]), r"block_size=\[2, 16\]"),
        (metadata(block_size=None), "block_size=None"),
        (metadata(activation_quantization="int8_asym_per_token"), "rounds its activations"),
        (metadata(kind="Int8Tensor", act_quant_kwargs={"_type": "x"}), "rounds its activations"),
    ],
)
def test_settings_that_are_not_read_are_named(tmp_path: Path, record: Any, message: str) -> None:
    stored, _ = drawn(4, 4, 64, 16, torch.float32, 0)
    with pytest.raises(FormatError, match=message):
        layout_of(tmp_path, stored, record, (4, 64))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_weight_scale": torch.ones(4, 3)}, r"_weight_scale' is torch.float32 \(4, 3\)"),
        ({"_weight_scale": None}, "_weight_scale' is missing"),
        ({"_weight_qdata": torch.zeros(4, 64)}, "_weight_qdata' is torch.float32"),
        ({"_weight_act_pre_scale": torch.ones(64)}, "not understood"),
        (
            {"_weight_qdata": torch.full((4, 64), 8, dtype=torch.int8)},
            "reach from 8 to 8 in a layer of 4 bits",
        ),
        ({"_weight_zero_point": torch.full((4, 4), -9, dtype=torch.int8)}, "from -9 to -9"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path: Path, change: Any, message: str) -> None:
    stored, _ = drawn(4, 4, 64, 16, torch.float32, 0)
    stored = {k: v for k, v in {**stored, **change}.items() if v is not None}
    with pytest.raises(FormatError, match=message):
        layout_of(tmp_path, stored, metadata(), (4, 64)).decode(stored)


def test_metadata_are_gathered_from_the_files_and_pickles_are_refused(tmp_path: Path) -> None:
    config = {"quantization_config": {"quant_method": "torchao"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert FORMAT.detect(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FormatError, match="only as pickles"):
        FORMAT.record(tmp_path)
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors", metadata={"a": "b"})
    assert FORMAT.record(tmp_path) == {"a": "b"}
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    assert FORMAT.record(tmp_path) == {}
