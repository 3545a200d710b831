"""bitsandbytes' layouts. Run: pytest tests/quant/test_bitsandbytes.py"""

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
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from zotune.errors import FormatError
from zotune.quant import QuantLinear, formats
from zotune.quant.formats.bitsandbytes import FORMAT, RowLayout
from zotune.quant.formats.layout import Layout, place_, values_of
from zotune.quant.formats.nested import NestedScales
from zotune.quant.formats.shards import raw_bytes
from zotune.quant.scheme import Scheme

GOLDEN = Path(__file__).parent / "golden"
STATE = "weight.quant_state.bitsandbytes__nf4"
# What the libraries themselves store: NF4's and FP4's numbers, and nested quantization's 256.
MAPS = {
    "nf4": load_file(GOLDEN / "bnb-nf4" / "model.safetensors"),
    "fp4": load_file(GOLDEN / "bnb-fp4" / "model.safetensors"),
    "nested": load_file(GOLDEN / "bnb-nf4-nested" / "model.safetensors"),
}
ROWS = Scheme(8, True, None, "channel")
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def quant_map(kind: str) -> Tensor:
    return MAPS[kind][f"{Q_PROJ}.quant_map"]


def state(**change: Any) -> Tensor:
    record = {"quant_type": "nf4", "blocksize": 32, "dtype": "float16", "shape": [6, 64], **change}
    return torch.tensor(list(json.dumps(record).encode()), dtype=torch.uint8)


def drawn(
    kind: str, rows: int, columns: int, size: int, nested: bool, dtype: torch.dtype, seed: int
) -> tuple[dict[str, Tensor], Any]:
    """A layer's tensors and, in float64, its weight, restated weight by weight."""
    random = np.random.default_rng(seed)
    codes = random.integers(0, 16, rows * columns)
    data = torch.from_numpy((codes[0::2] * 16 + codes[1::2]).astype(np.uint8))
    stored = {"weight": data.view(dtype).unsqueeze(1), "weight.quant_map": quant_map(kind)}
    blocks = rows * columns // size
    more: dict[str, Any] = {}
    if nested:
        numbers = MAPS["nested"][f"{Q_PROJ}.nested_quant_map"]
        stored["weight.nested_quant_map"] = numbers
        outer = random.uniform(0.05, 0.2, -(-blocks // 16)).astype(np.float32)
        stored["weight.nested_absmax"] = torch.from_numpy(outer)
        inner = random.integers(0, 256, blocks).astype(np.uint8)
        stored["weight.absmax"] = torch.from_numpy(inner)
        more = {"nested_blocksize": 16, "nested_dtype": "float32", "nested_offset": 0.25}
        absmax = numbers.double().numpy()[inner] * outer.astype(float)[np.arange(blocks) // 16]
        absmax = absmax + 0.25
    else:
        absmax = random.uniform(0.01, 1, blocks).astype(np.float32)
        stored["weight.absmax"] = torch.from_numpy(absmax)
    stored[f"weight.quant_state.bitsandbytes__{kind}"] = state(
        quant_type=kind, blocksize=size, shape=[rows, columns], **more
    )
    weight = quant_map(kind).double().numpy()[codes] * absmax.astype(float).repeat(size)
    return stored, weight.reshape(rows, columns)


def layer(stored: dict[str, Tensor], layout: Layout, shape: tuple[int, int]) -> QuantLinear:
    model = nn.Sequential(nn.Linear(shape[1], shape[0], bias=False, device="meta"))
    return place_(model, "0", layout, stored, bias=False)


def layout_of(folder: Path, stored: dict[str, Tensor], shape: tuple[int, int]) -> Layout:
    return FORMAT.layout({}, "q_proj", headers(folder, stored), shape)


@given(
    kind=st.sampled_from(("nf4", "fp4")), rows=st.integers(1, 20), blocks=st.integers(1, 4),
    size=st.sampled_from((32, 64)), nested=st.booleans(), seed=st.integers(0, 2**31),
    dtype=st.sampled_from((torch.uint8, torch.bfloat16, torch.float32)),
)  # fmt: skip
def test_blocks_are_the_restated_ones_and_come_back_tuned_or_not(
    tmp_path_factory: pytest.TempPathFactory, kind: str, rows: int, blocks: int, size: int,
    nested: bool, seed: int, dtype: torch.dtype,
) -> None:  # fmt: skip
    columns = blocks * size
    stored, expected = drawn(kind, rows, columns, size, nested, dtype, seed)
    layout = layout_of(tmp_path_factory.mktemp("bnb"), stored, (rows, columns))
    found = layer(stored, layout, (rows, columns))
    np.testing.assert_allclose(found.dequantize().double(), expected, rtol=1e-5, atol=1e-7)
    x = torch.from_numpy(np.random.default_rng(seed).standard_normal((3, columns))).float()
    np.testing.assert_allclose(found(x), x.double() @ expected.T, atol=1e-3)
    before = found.scale.clone()
    found.round_to_storage_()
    assert torch.equal(found.scale, before)
    assert torch.equal(
        layout.decode({**stored, **layout.encode(values_of(found))}).scale, found.scale
    )
    generator = torch.Generator().manual_seed(seed)
    found.scale.mul_(torch.rand(found.scale.shape, generator=generator) * 4 - 0.5)
    tuned = found.scale.clone()
    found.round_to_storage_()
    encoded = layout.encode(values_of(found))
    assert {k: (v.dtype, v.shape) for k, v in encoded.items()} == {
        k: (stored[k].dtype, stored[k].shape) for k in encoded
    }
    again = layout.decode({**stored, **encoded})
    assert torch.equal(raw_bytes(again.codes), raw_bytes(values_of(found).codes))
    assert torch.equal(raw_bytes(again.scale), raw_bytes(found.scale))
    if not nested:
        assert torch.equal(found.scale, tuned)


@given(seed=st.integers(0, 2**31), offset=st.floats(-1, 1, width=32), count=st.integers(1, 700))
def test_nested_scales_are_rounded_once_and_to_nearest(
    seed: int, offset: float, count: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    numbers = MAPS["nested"][f"{Q_PROJ}.nested_quant_map"]
    # Zero for blocks of equal scales; scales reach far beyond what the file's absmax can say.
    absmax = torch.rand(-(-count // 256), generator=random) * (seed % 3)
    scales = NestedScales(numbers, absmax, offset)
    wanted = torch.randn(count, generator=random) * 10.0 ** float(seed % 5 - 3) + offset
    codes, wider = scales.store(wanted)
    once = scales.load(codes, wider)
    assert (wider >= absmax).all()
    assert torch.equal(scales.load(*scales.store(once)), once)
    for k, outer in enumerate(scales._absmax(wanted)):
        part = slice(256 * k, 256 * k + 256)
        if outer == wider[k]:
            grid = numbers.double() * outer.double() + offset
            best = (wanted[part].double().unsqueeze(1) - grid).abs().amin(1)
            error = (wanted[part].double() - once[part].double()).abs()
            assert (error <= best + 1e-6 * float(outer + abs(offset))).all()


def test_what_stays_within_reach_keeps_its_absmax_and_moves_by_little() -> None:
    numbers = MAPS["nested"][f"{Q_PROJ}.nested_quant_map"]
    scales = NestedScales(numbers, torch.tensor([0.1]), 0.25)
    wanted = torch.linspace(0.16, 0.34, 256)
    codes, absmax = scales.store(wanted)
    assert absmax.tolist() == scales.absmax.tolist()
    assert (scales.load(codes, absmax) / wanted - 1).abs().max() < 0.005
    for bad in (torch.nan, torch.inf, -torch.inf):
        assert torch.isfinite(scales.load(*scales.store(torch.tensor([0.2, bad, 0.3])))).all()


@given(seed=st.integers(0, 2**31))
def test_rows_lose_nothing_in_a_second_rounding(seed: int) -> None:
    random = np.random.default_rng(seed)
    codes = random.integers(-128, 128, (64, 8)).astype(np.int8)
    scb = random.uniform(1e-3, 10, 64).astype(np.float32)
    stored = {"weight": torch.from_numpy(codes), "SCB": torch.from_numpy(scb)}
    layout = RowLayout(ROWS)
    found = layer(stored, layout, (64, 8))
    expected = codes * (scb.astype(float) / 127)[:, None]
    np.testing.assert_allclose(found.dequantize().double(), expected, rtol=1e-6)
    before = found.scale.clone()
    found.round_to_storage_()
    assert torch.equal(found.scale, before)
    found.scale.mul_(torch.from_numpy(random.uniform(0.5, 2, (64, 1))).float())
    found.round_to_storage_()
    again = layout.decode({**stored, **layout.encode(values_of(found))})
    assert torch.equal(again.scale, found.scale)
    assert torch.equal(again.codes, found.codes)


def test_int8_differs_from_the_library_by_its_rounded_activations_alone() -> None:
    folder = GOLDEN / "bnb-int8"
    expected = load_file(folder.with_suffix(".expected"))
    model = formats.read(folder, AutoModelForCausalLM, dtype=torch.float32)

    def as_the_library_does(layer: QuantLinear, args: tuple[Tensor], out: object) -> object:
        """float16 inputs, rows rounded to int8; columns with a 6 or more in them are not.

        The library writes 1 / 127^2 as 6.200124e-5.
        """
        x = args[0].half().float()
        large = x.abs() >= 6
        outliers = large.flatten(0, -2).any(0)
        most = x.masked_fill(large, 0.0).abs().amax(-1, keepdim=True)
        rounded = (x * (127 / most)).round() * (most * (127 * 6.200124e-5))
        return nn.functional.linear(torch.where(outliers, x, rounded), layer.dequantize())

    with torch.no_grad():
        plain = model(expected["tokens"]).logits
        for module in model.modules():
            if isinstance(module, QuantLinear):
                module.register_forward_hook(as_the_library_does)
        logits = model(expected["tokens"]).logits
    scale = expected["logits"].abs().max()
    error = (logits - expected["logits"]).abs().max() / scale
    assert error < 1e-3
    assert error < (plain - expected["logits"]).abs().max() / scale


def broken(nested: bool = False, **change: Any) -> dict[str, Tensor]:
    stored, _ = drawn("nf4", 6, 64, 32, nested, torch.uint8, 0)
    stored.update({STATE if k == "state" else f"weight.{k}": v for k, v in change.items()})
    return {k: v for k, v in stored.items() if v is not None}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state": None}, r"has 0 tensors weight.quant_state.bitsandbytes__\*; want one"),
        ({"state": torch.zeros(5000, dtype=torch.uint8)}, r"\(5000,\); want JSON in bytes"),
        ({"state": torch.zeros(4)}, "want JSON in bytes"),
        ({"state": torch.full((9,), 255, dtype=torch.uint8)}, "is no JSON"),
        ({"state": torch.full((4096,), ord("["), dtype=torch.uint8)}, "is no JSON"),
        ({"state": torch.tensor([ord("7")], dtype=torch.uint8)}, "holds 7; want a JSON object"),
        ({"state": state(quant_type="nf8")}, "quant_type='nf8'"),
        ({"state": state(quant_type=["nf4"])}, r"quant_type=\['nf4'\]"),
        ({"state": state(blocksize=0)}, "blocksize=0"),
        ({"state": state(blocksize="32")}, "blocksize='32'"),
        ({"state": state(shape=[64, 6])}, r"shape=\[64, 6\]; want .* and \[6, 64\]"),
        ({"state": state(blocksize=128)}, "blocks of 128, which run over the ends"),
        ({"absmax": torch.ones(11)}, r"absmax' is torch.float32 \(11,\)"),
        ({"absmax": torch.ones(12, dtype=torch.uint8)}, r"absmax' is torch.uint8 \(12,\)"),
        ({"quant_map": None}, "quant_map' is missing"),
        ({"quant_map": torch.zeros(16)}, "a quant_map is not that of nf4"),
        ({"extra": torch.zeros(1)}, r"not understood: \['weight.extra'\]"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, change: Any, message: str) -> None:
    stored = broken(**change)
    with pytest.raises(FormatError, match=message):
        layout_of(tmp_path, stored, (6, 64)).decode(stored)


def nested_state(**change: Any) -> Tensor:
    return state(**{"nested_blocksize": 16, "nested_offset": 0.25, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state": nested_state(nested_offset=None)}, "nested_offset=None; want numbers"),
        ({"state": nested_state(nested_offset=float("nan"))}, "nested_offset=nan"),
        ({"state": nested_state(nested_blocksize=0)}, "nested_blocksize=0"),
        ({"nested_absmax": torch.ones(2)}, r"nested_absmax' is torch.float32 \(2,\)"),
        ({"nested_absmax": torch.tensor([-1.0])}, "nested_absmax' holds other than numbers >= 0"),
        ({"nested_absmax": torch.tensor([torch.nan])}, "holds other than"),
        ({"nested_quant_map": torch.ones(256).cumsum(0)}, "does not ascend from -1 to 1"),
        ({"nested_quant_map": torch.full((256,), torch.nan)}, "does not ascend"),
    ],
)
def test_nested_tensors_that_do_not_fit_are_named(
    tmp_path: Path, change: Any, message: str
) -> None:
    with pytest.raises(FormatError, match=message):
        layout_of(tmp_path, broken(nested=True, **change), (6, 64))


@given(data=st.binary(max_size=120))
def test_any_bytes_as_a_state_are_refused_with_a_message(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    stored = broken(state=torch.tensor(list(data), dtype=torch.uint8))
    with pytest.raises(FormatError, match=r"q_proj"):
        layout_of(tmp_path_factory.mktemp("bnb"), stored, (6, 64))


def test_int8_weights_in_a_gpu_s_order_are_refused() -> None:
    stored = {
        "weight": torch.zeros(2, 4, dtype=torch.int8),
        "SCB": torch.ones(2),
        "weight_format": torch.tensor(2, dtype=torch.uint8),
    }
    with pytest.raises(FormatError, match="weight_format=2, an order of some GPU"):
        RowLayout(ROWS).decode(stored)


@pytest.mark.parametrize(
    ("record", "mine"),
    [
        ({"quant_method": "bitsandbytes"}, True),
        ({"load_in_4bit": True}, True),
        ({"load_in_8bit": True, "quant_method": "hqq"}, False),
        ({}, False),
    ],
)
def test_folders_are_told_by_their_config(
    tmp_path: Path, record: dict[str, Any], mine: bool
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": record}))
    assert FORMAT.detect(tmp_path) is mine
