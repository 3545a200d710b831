"""The layouts of compressed-tensors. Run: pytest tests/quant/test_compressed_tensors.py"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quant.restated import headers, rows_of_words
from torch import Tensor, nn

from zotune.errors import FormatError
from zotune.quant.formats.compressed_tensors import FORMAT, CompressedLayout
from zotune.quant.formats.layout import place_, values_of
from zotune.quant.formats.shards import raw_bytes
from zotune.quant.linear import QuantLinear

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
NAME = "model.layers.0.q_proj"
Made = tuple[dict[str, Tensor], dict[str, Any], Any]


def integers(
    random: Any, rows: int, columns: int, bits: int, symmetric: bool, size: int | None,
    act: bool, packed: bool,
) -> Made:  # fmt: skip
    """Tensors, settings of the weights, and the weight in float64."""
    half = 1 << (bits - 1)
    g_idx = np.arange(columns) // (size or columns)
    if act and packed and size:
        g_idx = random.permutation(g_idx)
    groups = int(g_idx.max()) + 1
    codes = random.integers(-half, half, (rows, columns))
    zeros = random.integers(-half, half, (rows, groups)) * (not symmetric)
    scales = torch.from_numpy(random.uniform(0.01, 1, (rows, groups))).bfloat16()
    stored = {"weight_scale": scales}
    if packed:
        stored["weight_packed"] = rows_of_words(codes + half, bits)
        stored["weight_shape"] = torch.tensor([rows, columns])
        if not symmetric:
            stored["weight_zero_point"] = rows_of_words((zeros + half).T, bits).T.contiguous()
        if act and size:
            stored["weight_g_idx"] = torch.from_numpy(g_idx.astype(np.int32))
    else:
        stored["weight"] = torch.from_numpy(codes.astype(np.int8))
        if not symmetric:
            stored["weight_zero_point"] = torch.from_numpy(zeros.astype(np.int8))
    settings = {
        "num_bits": bits, "type": "int", "symmetric": symmetric,
        "strategy": "group" if size else "channel", "group_size": size,
    }  # fmt: skip
    return stored, settings, (codes - zeros[:, g_idx]) * scales.double().numpy()[:, g_idx]


def floats(random: Any, rows: int, columns: int, kind: str) -> Made:
    """The same for E4M3 and E2M1 numbers."""
    if kind in ("fp8", "fp8-tensor"):
        weight = torch.from_numpy(random.standard_normal((rows, columns)) * 9).float()
        weight = weight.to(torch.float8_e4m3fn)
        shape = (rows, 1) if kind == "fp8" else (1,)
        scale = torch.from_numpy(random.uniform(0.01, 1, shape)).float()
        settings = {
            "num_bits": 8, "type": "float", "strategy": "channel" if kind == "fp8" else "tensor",
        }  # fmt: skip
        expected = weight.double() * scale.double().reshape(-1, 1)
        return {"weight": weight, "weight_scale": scale}, settings, expected.numpy()
    size = 16 if kind == "nvfp4" else 32
    columns *= size
    nibbles = random.integers(0, 16, (rows, columns))
    numbers = np.array([*E2M1, *(-n for n in E2M1)])[nibbles]
    pairs = torch.from_numpy((nibbles[:, 0::2] + 16 * nibbles[:, 1::2]).astype(np.uint8))
    stored = {"weight_packed": pairs}
    grid = (rows, columns // size)
    if kind == "nvfp4":
        scale = torch.from_numpy(random.uniform(1, 400, grid)).to(torch.float8_e4m3fn)
        total = torch.tensor([float(random.uniform(10, 3000))])
        stored.update(weight_scale=scale, weight_global_scale=total)
        values = scale.double().numpy() / total.double().item()
    else:
        stored["weight_scale"] = torch.from_numpy(random.integers(100, 140, grid).astype(np.uint8))
        values = 2.0 ** (stored["weight_scale"].double().numpy() - 127)
    settings = {
        "num_bits": 4, "type": "float", "group_size": size,
        "strategy": "tensor_group" if kind == "nvfp4" else "group",
    }  # fmt: skip
    return stored, settings, numbers * values.repeat(size, axis=1)


def layout_of(folder: Path, made: Made, shape: tuple[int, int], **more: Any) -> Any:
    groups = {"group_0": {"targets": ["Linear"], "weights": {**made[1], **more}}}
    return FORMAT.layout(groups, NAME, headers(folder, made[0]), shape)


def layer(stored: dict[str, Tensor], layout: CompressedLayout) -> QuantLinear:
    model = nn.Sequential(nn.Linear(layout.columns, layout.rows, bias=False, device="meta"))
    return place_(model, "0", layout, stored, bias=False)


def check(folder: Path, made: Made) -> None:
    """Read, compared in float64, written again, and the same for what was tuned."""
    stored, _, expected = made
    layout = layout_of(folder, made, expected.shape)
    found = layer(stored, layout)
    np.testing.assert_allclose(found.dequantize().double().numpy(), expected, rtol=1e-6)
    x = torch.ones(2, expected.shape[1]) / 8
    wanted = x.double().numpy() @ expected.T
    np.testing.assert_allclose(found(x), wanted, rtol=1e-4, atol=1e-4 * abs(expected).max() * 9)
    for name, tensor in layout.encode(values_of(found)).items():
        assert tensor.dtype == stored[name].dtype
        assert tensor.shape == stored[name].shape
        assert torch.equal(raw_bytes(tensor), raw_bytes(stored[name])), name
    generator = torch.Generator().manual_seed(0)
    found.scale.mul_(torch.rand(found.scale.shape, generator=generator) * 3 + 0.1)
    if found.zero is not None:
        found.zero.add_(torch.randn(found.zero.shape, generator=generator) * 5)
    found.round_to_storage_()
    values = values_of(found)
    again = layout.decode({**stored, **layout.encode(values)})
    for one, other in zip(values, again, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(raw_bytes(one), raw_bytes(other))


@given(
    bits=st.sampled_from((2, 3, 4, 8)), rows=st.integers(1, 40), columns=st.integers(1, 70),
    symmetric=st.booleans(), size=st.none() | st.integers(1, 80), act=st.booleans(),
    packed=st.booleans(), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_integer_layers_are_the_restated_ones(
    tmp_path_factory: pytest.TempPathFactory, bits: int, rows: int, columns: int, symmetric: bool,
    size: int | None, act: bool, packed: bool, seed: int,
) -> None:  # fmt: skip
    bits = bits if packed else 8
    random = np.random.default_rng(seed)
    made = integers(random, rows, columns, bits, symmetric, size, act, packed)
    check(tmp_path_factory.mktemp("ct"), made)


@given(
    kind=st.sampled_from(("fp8", "fp8-tensor", "nvfp4", "mxfp4")), rows=st.integers(1, 9),
    columns=st.integers(1, 5), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_float_layers_are_the_restated_ones(
    tmp_path_factory: pytest.TempPathFactory, kind: str, rows: int, columns: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    check(tmp_path_factory.mktemp("ct"), floats(random, rows, columns, kind))


def made() -> Made:
    return integers(np.random.default_rng(0), 16, 64, 4, False, 32, False, True)


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        ({"weight_scale": None}, {}, "weight_scale' is missing"),
        ({"weight_scale": torch.ones(16, 3)}, {}, r"weight_scale' is torch.float32 \(16, 3\)"),
        ({"weight_zero_point": None}, {}, "weight_zero_point' is missing"),
        ({"weight_shape": None}, {}, "weight_shape' is missing"),
        ({"weight_packed": torch.zeros(16, 7, dtype=torch.int32)}, {}, r"weight_packed' is .*7\)"),
        ({"input_scale": torch.ones(1)}, {}, r"not understood: \['input_scale'\]"),
        ({}, {"num_bits": 6}, "num_bits=6: bits=6 of kind='int' is not read"),
        ({}, {"num_bits": "4"}, "num_bits='4'"),
        ({}, {"num_bits": [4]}, r"num_bits=\[4\]"),
        ({}, {"strategy": "block"}, "strategy='block'"),
        ({}, {"group_size": None}, "granularity='group' needs a group_size"),
        ({}, {"type": "complex"}, "type='complex'"),
        ({}, {"actorder": "group"}, "has no weight_g_idx, but the config says actorder"),
    ],
)
def test_what_does_not_fit_is_named(
    tmp_path: Path, change: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    stored, given, expected = made()
    stored = {k: v for k, v in {**stored, **change}.items() if v is not None}
    with pytest.raises(FormatError, match=message):
        layout_of(tmp_path, (stored, given, expected), (16, 64), **settings)


def test_a_shape_that_contradicts_the_tensors_is_refused(tmp_path: Path) -> None:
    found = made()
    found[0]["weight_shape"] = torch.tensor([16, 63])
    with pytest.raises(FormatError, match=r"weight_shape is \[16, 63\] in a layer of \[16, 64\]"):
        layout_of(tmp_path, found, (16, 64)).decode(found[0])


STATIC = {"num_bits": 8, "type": "int", "strategy": "tensor", "dynamic": False}
FLOAT = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}


@pytest.mark.parametrize("activations", [STATIC, FLOAT, {**STATIC, "num_bits": 4}])
def test_activations_that_are_not_computed_here_are_refused(
    tmp_path: Path, activations: dict[str, Any]
) -> None:
    stored, weights, _ = made()
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    with pytest.raises(FormatError, match="activations of layer"):
        FORMAT.layout({"group_0": group}, NAME, headers(tmp_path, stored), (16, 64))


def test_a_layer_s_name_goes_before_patterns_and_those_before_its_class(tmp_path: Path) -> None:
    stored, weights, _ = made()
    found, wrong = headers(tmp_path, stored), {**weights, "num_bits": 8}
    order = [("Linear", wrong), ("re:.*q_proj$", wrong), (NAME, weights)]
    for k in range(3):
        groups = {str(i): {"targets": [t], "weights": w} for i, (t, w) in enumerate(order[k:])}
        assert FORMAT.layout(groups, NAME, found, (16, 64)).scheme.bits == 4
    with pytest.raises(FormatError, match="no group of config_groups says"):
        FORMAT.layout({"0": {"targets": ["Conv"], "weights": weights}}, NAME, found, (16, 64))
    with pytest.raises(FormatError, match=r"target 're:\('"):
        FORMAT.layout({"0": {"targets": ["re:("], "weights": weights}}, NAME, found, (16, 64))


@pytest.mark.parametrize("total", [0.0, -1.0, float("nan"), float("inf")])
def test_a_total_scale_that_is_no_scale_is_refused(tmp_path: Path, total: float) -> None:
    found = floats(np.random.default_rng(0), 4, 2, "nvfp4")
    found[0]["weight_global_scale"] = torch.tensor([total])
    with pytest.raises(FormatError, match=r"weight_global_scale .* want a number > 0"):
        layout_of(tmp_path, found, (4, 32))


def test_four_bits_in_bytes_are_read_too(tmp_path: Path) -> None:
    found = integers(np.random.default_rng(0), 8, 64, 4, True, 32, False, False)
    assert found[0]["weight"].dtype == torch.int8
    check(tmp_path, found)


def test_packed_numbers_of_eight_bit_floats_are_refused(tmp_path: Path) -> None:
    stored, weights, expected = made()
    settings = {"type": "float", "num_bits": 8, "symmetric": True}
    with pytest.raises(FormatError, match="weight' is missing"):
        layout_of(tmp_path, (stored, weights, expected), (16, 64), **settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quantization_status": "frozen"}, "quantization_status='frozen'"),
        ({"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme="),
        ({"transform_config": {"config_groups": {}}}, "transform_config="),
        ({"sparsity_config": {"format": "sparse-24"}}, "sparse weights"),
        ({"config_groups": None}, "no config_groups"),
        ({"config_groups": {"group_0": 3}}, "no config_groups"),
        ({"config_groups": {"group_0": {"targets": 3}}}, "no config_groups"),
        ({"config_groups": {"group_0": {"targets": [3]}}}, "no config_groups"),
        ({"config_groups": {"group_0": {"input_activations": 3}}}, "no config_groups"),
    ],
)
def test_settings_that_are_not_read_are_named(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    record = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {}}, **change}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": record}))
    assert FORMAT.detect(tmp_path)
    with pytest.raises(FormatError, match=message):
        FORMAT.record(tmp_path)
