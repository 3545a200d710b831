"""GGUF files: read, measured, tuned, given back. Run: pytest tests/quant/test_gguf.py

golden/gguf*.gguf and what ggml makes of them come from benchmarks/interop/gguf_golden.py.
"""

from __future__ import annotations

import os
import shutil
import struct
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

from zotune import tasks
from zotune.core.noise import Key
from zotune.core.perturbation import Gaussian
from zotune.core.probe import Probe
from zotune.core.sites import View, probing, sites_of
from zotune.core.spaces import get
from zotune.errors import BadInput, FormatError, ZotuneError
from zotune.models import fingerprint, load
from zotune.quant import QuantLinear, formats
from zotune.quant.formats.gguf_blocks import BLOCKS, BlockLayout, ordered, unordered
from zotune.quant.formats.gguf_file import GgufTensor, read_header
from zotune.quant.formats.gguf_layers import (
    BlockEmbedding,
    BlockLinear,
    TiedHead,
    dequantize,
    product,
    read_blocks,
)
from zotune.quant.formats.layout import values_of
from zotune.training import EvalConfig, TrainConfig, evaluate, replay, train

GOLDEN = Path(__file__).parent / "golden"
FILES = sorted(GOLDEN.glob("gguf*.gguf"))
golden = pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
SPACES = formats.formats()["gguf"].tunable


def read(path: Path, auto: Any = AutoModelForCausalLM) -> nn.Module:
    return formats.read(path, auto)


def ggml_size(kind: str) -> int:
    return int(gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1])


def drawn(kind: str, rows: int, blocks: int, seed: int) -> tuple[torch.Tensor, np.ndarray]:
    """Random bytes with sane d and offset, and what gguf makes of them."""
    random = np.random.default_rng(seed)
    own, size = BLOCKS[kind], ggml_size(kind)
    data = random.integers(0, 256, (rows, blocks, size), dtype=np.uint8)
    for start in (own.d, own.offset):
        if start is not None:
            halves = random.normal(0, 0.01, (rows, blocks, 1)).astype(np.float16)
            data[..., start : start + 2] = halves.view(np.uint8)
    data = data.reshape(rows, -1)
    return torch.from_numpy(data), gguf.dequantize(data, gguf.GGMLQuantizationType[kind])


@given(
    kind=st.sampled_from(sorted(BLOCKS)), rows=st.integers(1, 9), blocks=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)  # fmt: skip
def test_blocks_are_gguf_s_bit_for_bit_and_come_back(
    kind: str, rows: int, blocks: int, seed: int
) -> None:
    raw, expected = drawn(kind, rows, blocks, seed)
    layout = BlockLayout.of(kind)
    own = read_blocks(layout, raw)
    weight = dequantize(own, layout)
    np.testing.assert_array_equal(weight.numpy().view(np.uint32), expected.view(np.uint32))
    values = layout.decode({"weight": raw})
    assert torch.equal(layout.merged(raw, values), raw)
    x = torch.from_numpy(np.random.default_rng(seed).standard_normal((3, weight.shape[1]))).float()
    y = x.double() @ weight.double().t()
    size = (x.double().abs() @ weight.double().abs().t()).max()
    assert (product(x, own, layout) - y).abs().max() < 1e-5 * size


@given(kind=st.sampled_from(sorted(BLOCKS)), seed=st.integers(0, 2**31))
def test_tuned_values_come_back_as_they_were_rounded(kind: str, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    raw, _ = drawn(kind, 4, 2, seed)
    layout = BlockLayout.of(kind, (2, 2))
    values = layout.decode({"weight": raw})
    half = 1 << (layout.type.bits - 1)
    codes = torch.randint(-half, half, values.codes.shape, generator=random).to(torch.int8)
    scale, zero = layout.rounded(
        values.scale * (torch.rand(values.scale.shape, generator=random) + 0.5),
        None if values.zero is None else values.zero * 1.1 + 1e-3,
    )
    merged = layout.merged(raw, values._replace(codes=codes, scale=scale, zero=zero))
    again = layout.decode({"weight": merged})
    assert torch.equal(again.codes, codes)
    assert torch.equal(again.scale, scale)
    assert (zero is None) or torch.equal(again.zero, zero)
    subs, kept = layout.subs(merged), layout.subs(raw)
    if kept is not None and subs is not None:
        assert torch.equal(subs[0], kept[0])


def test_rows_of_q_and_k_are_restated() -> None:
    heads, width = 3, 8
    rows = torch.arange(heads * width)
    found = ordered(rows, (heads, width))
    for head in range(heads):
        for k in range(width // 2):
            for half in range(2):
                assert found[head * width + half * width // 2 + k] == head * width + 2 * k + half
    assert torch.equal(unordered(found, (heads, width)), rows)


@golden
def test_logits_are_those_of_ggml_s_weights(path: Path) -> None:
    expected = load_file(path.with_suffix(".expected"))
    model = read(path)
    with torch.no_grad():
        logits = model(expected["tokens"]).logits
    error = (logits - expected["logits"]).abs().max() / expected["logits"].abs().max()
    assert error < 2e-5
    assert any(isinstance(m, QuantLinear) for m in model.modules())


def test_quantized_tables_of_words_stay_quantized() -> None:
    model = read(GOLDEN / "gguf-q5_0.gguf")
    table = model.get_input_embeddings()
    assert isinstance(table, BlockEmbedding)
    assert isinstance(model.get_output_embeddings(), TiedHead)
    assert isinstance(read(GOLDEN / "gguf-q4_0.gguf").get_output_embeddings(), QuantLinear)
    assert "lm_head" not in {b.name for b in get("scales").build(model)}
    assert model.to(torch.bfloat16).get_input_embeddings().scale.dtype == torch.float32


@golden
def test_an_untouched_model_is_given_back_byte_for_byte(path: Path, tmp_path: Path) -> None:
    model = read(path)
    formats.round_to_storage_(model)
    out = formats.write(model, tmp_path / "out")
    assert [p.name for p in out.iterdir()] == [path.name]
    assert (out / path.name).read_bytes() == path.read_bytes()
    again = formats.write(read(out), tmp_path / "more")
    assert (again / path.name).read_bytes() == path.read_bytes()


@golden
@pytest.mark.parametrize("space", SPACES)
def test_what_can_be_tuned_is_kept_and_nothing_else_changes(
    path: Path, space: str, tmp_path: Path
) -> None:
    model = read(path)
    try:
        blocks = get(space).build(model)
    except BadInput:
        assert space in ("zeros", "biases")
        return  # another of the files has them
    for block in blocks:
        block.bind_(1.0, 1.0, "relative")
        unit = 1.0 if space == "codes" else block.unit
        step = torch.ones(block.shape) * (1.0 if space == "codes" else 0.25) * unit
        block.move_(0, block.rows, step, Key(0))
    formats.round_to_storage_(model)
    out = formats.write(model, tmp_path / "out")
    assert fingerprint(read(out)) == fingerprint(model)
    before, after = read_header(path), read_header(out / path.name)
    assert before.metadata == after.metadata
    old, new = path.read_bytes(), (out / path.name).read_bytes()
    places = np.flatnonzero(np.frombuffer(old, np.uint8) != np.frombuffer(new, np.uint8))
    assert len(places)
    assert len(old) == len(new)
    allowed = np.zeros(len(old), bool)
    for tensor in before.tensors.values():
        here = slice(tensor.start, tensor.stop)
        if tensor.type not in BLOCKS:
            allowed[here] = space in ("norms", "biases", "weights")
        elif space in ("scales", "zeros", "codes"):
            allowed[here] = bytes_of(tensor, space)
    assert allowed[places].all()


def bytes_of(tensor: GgufTensor, space: str) -> np.ndarray:
    """Which bytes of a tensor of blocks a space may change."""
    own, size = BLOCKS[tensor.type], ggml_size(tensor.type)
    found = np.zeros(size, bool)
    if space == "codes":
        for start, stop, _, _ in own.planes:
            found[start:stop] = True
    else:
        start = own.d if space == "scales" else own.offset
        if start is not None:
            found[start : start + 2] = True
    return np.tile(found, (tensor.stop - tensor.start) // size)


def test_every_space_is_met_in_some_file() -> None:
    for space in SPACES:
        met = 0
        for path in FILES:
            try:
                met += len(list(get(space).build(read(path))))
            except BadInput:
                continue
        assert met


def as_run(path: Path, tmp_path: Path, **more: Any) -> tuple[TrainConfig, dict[str, Any]]:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"It was a day like day {k}, and so on.\n\n" for k in range(40)))
    shared = {"task": "lm(dev_size=6)", "data": str(text), "max_length": 32, "dtype": "float32"}
    config = TrainConfig(
        model_name_or_path=str(path), output_dir=str(tmp_path / "run"), space="scales",
        method="qzo(lr=0.01)", max_steps=30, per_device_train_batch_size=8, report_to="none",
        show_progress=False, **shared, **more,
    )  # fmt: skip
    return config, shared


@golden
def test_thirty_steps_change_scale_bytes_alone_and_the_file_measures_the_same(
    path: Path, tmp_path: Path
) -> None:
    config, shared = as_run(path, tmp_path)
    result = train(config)
    model = tmp_path / "run" / "model"
    new, old = (model / path.name).read_bytes(), path.read_bytes()
    allowed = np.zeros(len(old), bool)
    for tensor in read_header(path).tensors.values():
        if tensor.type in BLOCKS:
            allowed[tensor.start : tensor.stop] = bytes_of(tensor, "scales")
    places = np.flatnonzero(np.frombuffer(old, np.uint8) != np.frombuffer(new, np.uint8))
    assert len(places)
    assert allowed[places].all()
    saved = evaluate(EvalConfig(model_name_or_path=str(model), **shared))
    assert saved["numbers"] == result.numbers["after"] != result.numbers["before"]
    again = replay(tmp_path / "run", path, tmp_path / "again")
    assert again is not None
    assert (tmp_path / "again" / path.name).read_bytes() == new


@golden
@pytest.mark.parametrize("space", ["scales", "zeros", "codes"])
def test_probes_stacked_are_those_one_by_one(path: Path, space: str) -> None:
    model = read(path)
    try:
        blocks = list(get(space).build(model))
    except BadInput:
        return
    for block in blocks:
        block.bind_(0.3, 1.0, "relative")
    probes = [Probe(Key(1, query=q), step, False) for q, step in ((0, 0.3), (0, -0.3), (1, 0.0))]
    ids = torch.arange(30).reshape(3, 10)

    def logits(fast: bool) -> torch.Tensor:
        view = View(probes, 1, Gaussian(), rows=3)
        with torch.no_grad(), probing(sites_of(blocks), view, fast):
            found: torch.Tensor = model(ids).logits
        return found

    torch.testing.assert_close(logits(True), logits(False), rtol=1e-4, atol=1e-3)


@golden
def test_a_model_without_its_head_is_read_and_given_back(path: Path, tmp_path: Path) -> None:
    body, whole = read(path, AutoModel), read(path)
    with torch.no_grad():
        ids = torch.arange(8).unsqueeze(0)
        assert torch.equal(body(ids)[0], whole.model(ids)[0])
    out = formats.write(body, tmp_path / "out")
    assert (out / path.name).read_bytes() == path.read_bytes()


def test_a_file_s_neighbours_stay_where_they_are_and_a_folder_s_go_along(tmp_path: Path) -> None:
    path = Path(shutil.copy(FILES[0], tmp_path / "model.gguf"))
    (tmp_path / "letters.txt").write_text("mine")
    assert load(path).format == load(tmp_path).format == "gguf"
    alone = formats.write(read(path), tmp_path / "alone")
    assert {p.name for p in alone.iterdir()} == {"model.gguf"}
    whole = formats.write(read(tmp_path), tmp_path / "whole")
    assert {p.name for p in whole.iterdir()} == {"model.gguf", "letters.txt"}
    model = read(whole)
    next(model.parameters()).data.mul_(2)
    formats.write(model, whole)
    assert fingerprint(read(whole)) == fingerprint(model)
    shutil.copy(FILES[0], whole / "another.gguf")
    with pytest.raises(BadInput, match="holds no checkpoint"):
        formats.write(model, whole)
    (whole / "config.json").write_text("{}")
    model.zotune_source = replace(model.zotune_source, folder=path)
    formats.write(model, whole)
    assert {p.name for p in whole.glob("*.gguf")} == {"model.gguf", "another.gguf"}


def test_the_tokenizer_is_the_file_s() -> None:
    loaded = load(FILES[0])
    text = "Once upon a time."
    assert loaded.tokenizer(text).input_ids[-4:] == [ord(c) - 32 for c in "ime."]
    assert loaded.tokenizer.decode(loaded.tokenizer(text).input_ids).strip() == text
    assert loaded.config.vocab_size == 96


def edited(
    path: Path,
    out: Path,
    change: dict[str, Any],
    kind: str | None = None,
    extra: dict[str, np.ndarray] | None = None,
) -> Path:
    """A copy with other metadata, the type of its first q changed, and tensors added."""
    reader = gguf.GGUFReader(path)
    architecture = str(reader.fields["general.architecture"].contents())
    writer = gguf.GGUFWriter(out, change.get("general.architecture", architecture))
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        value, types = change.get(name, field.contents()), field.types
        if value is None:
            continue
        if isinstance(value, list) and len(types) == 1:
            types = [gguf.GGUFValueType.ARRAY, types[0]]
        writer.add_key_value(name, value, types[0], types[1] if len(types) > 1 else None)
    for name, value in change.items():
        if name not in reader.fields:
            writer.add_key_value(name, value, gguf.GGUFValueType.get_type(value))
    for tensor in reader.tensors:
        data, type_ = tensor.data, tensor.tensor_type
        if kind is not None and tensor.name.endswith("attn_q.weight"):
            type_ = gguf.GGMLQuantizationType[kind]
            block, size = gguf.GGML_QUANT_SIZES[type_]
            rows, columns = (int(n) for n in tensor.shape[::-1])
            data = np.zeros((rows, columns // block * size), np.uint8)
        writer.add_tensor(tensor.name, data, raw_dtype=type_)
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"general.architecture": "gemma3"}, r"is a 'gemma3'; GGUF is read for \['llama'"),
        ({"llama.expert_count": 8}, "has experts"),
        ({"split.count": 3}, "join them with llama-gguf-split --merge"),
        ({"llama.block_count": 2}, "contradicts its own metadata.*1 layers"),
        ({"llama.attention.head_count": 3}, "contradicts its own metadata.*heads"),
        ({"llama.attention.head_count_kv": [2, 2]}, "head_count_kv=None; wanted one whole number"),
        ({"llama.attention.key_length": 1 << 30}, "contradicts its own metadata"),
        ({"llama.embedding_length": 128}, "contradicts its own metadata.*token_embd"),
        ({"llama.feed_forward_length": None}, "does not say 'llama.feed_forward_length'"),
        ({"llama.rope.scaling.type": "yarn"}, "scales its rotations by 'yarn'"),
        ({"llama.rope.freq_base": float("nan")}, "freq_base=nan; wanted a number > 0"),
    ],
)
def test_metadata_that_are_not_read_are_named(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(FormatError, match=message):
        read(edited(GOLDEN / "gguf-q8_0.gguf", tmp_path / "m.gguf", change))


@pytest.mark.parametrize("kind", ["Q2_K", "IQ4_NL", "MXFP4"])
def test_types_that_are_not_trained_are_named(tmp_path: Path, kind: str) -> None:
    source = GOLDEN / ("gguf-q4_k_m.gguf" if kind == "Q2_K" else "gguf-q8_0.gguf")
    message = rf"'blk.0.attn_q.weight'.* is {kind}, which is not trained; .*llama-quantize"
    with pytest.raises(FormatError, match=message):
        read(edited(source, tmp_path / "m.gguf", {}, kind))


def test_scaled_rotations_are_llama_3_s(tmp_path: Path) -> None:
    path = GOLDEN / "gguf-q8_0.gguf"
    linear = edited(
        path, tmp_path / "l.gguf",
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
    )  # fmt: skip
    own = read(path).model.rotary_emb.inv_freq
    torch.testing.assert_close(read(linear).model.rotary_emb.inv_freq, own / 4)
    factors = np.arange(1, 9, dtype=np.float32)
    divided = edited(path, tmp_path / "d.gguf", {}, extra={"rope_freqs.weight": factors})
    model = read(divided)
    assert torch.equal(model.model.rotary_emb.inv_freq, own / torch.from_numpy(factors))
    out = formats.write(model, tmp_path / "out")
    assert (out / "d.gguf").read_bytes() == divided.read_bytes()
    short = edited(path, tmp_path / "s.gguf", {}, extra={"rope_freqs.weight": factors[:5]})
    with pytest.raises(FormatError, match="has 5 numbers; wanted 8"):
        read(short)


def test_tensors_without_a_place_are_named(tmp_path: Path) -> None:
    extra = {"blk.0.attn_sinks.weight": np.zeros(4, np.float32)}
    with pytest.raises(FormatError, match=r"has no place for: \[blk.0.attn_sinks.weight\]"):
        read(edited(GOLDEN / "gguf-q8_0.gguf", tmp_path / "m.gguf", {}, extra=extra))


@pytest.mark.parametrize(("kind", "perplexity"), [("F32", 4.551), ("Q8_0", 4.551)])
def test_stories260k_measures_as_in_its_own_folder(
    tmp_path: Path, kind: str, perplexity: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(os.environ.get("ZOTUNE_DATA", Path(__file__).parents[2] / "../shared/data"))
    if not (root / "stories260K-hf").is_dir():
        pytest.skip("stories260K-hf is absent; set ZOTUNE_DATA to the data folder")
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks" / "interop"))
    gguf_convert = import_module("gguf_convert")
    path = tmp_path / "stories.gguf"
    gguf_convert.convert(root / "stories260K-hf", path, kind)
    task = tasks.get("tinystories", data=str(root))
    numbers = {}
    for folder in (root / "stories260K-hf", path):
        found = load(folder)
        model = task.prepare(found)
        numbers[folder] = task.evaluate(model, task.split("test"), 20)
    own, file = numbers.values()
    if kind == "F32":
        assert own == file
    assert file["perplexity"] == pytest.approx(perplexity, abs=1e-3 if kind == "F32" else 0.02)


def test_what_is_no_gguf_file_is_named(tmp_path: Path) -> None:
    other = tmp_path / "model.gguf"
    other.write_bytes(b"PK\x03\x04" * 10)
    with pytest.raises(FormatError, match="does not start with 'GGUF'"):
        load(other)
    other.write_bytes(b"GGUF" + struct.pack(">I", 3) + bytes(40))
    with pytest.raises(FormatError, match="little-endian"):
        load(other)
    shutil.copy(FILES[0], tmp_path / "a.gguf")
    with pytest.raises(FormatError):
        load(tmp_path)
    with pytest.raises(FormatError, match=r"give a .gguf or .onnx file"):
        load(__file__)


WHOLE = (GOLDEN / "gguf-q8_0.gguf").read_bytes()
HEADER = min(t.start for t in read_header(GOLDEN / "gguf-q8_0.gguf").tensors.values())
HUGE = st.sampled_from([0, 1, 255, 1 << 16, (1 << 31) - 1, (1 << 63) - 1, (1 << 64) - 1])


@settings(max_examples=300)
@given(
    place=st.integers(4, HEADER - 8), value=HUGE | st.integers(0, (1 << 64) - 1),
    width=st.sampled_from([1, 4, 8]), cut=st.none() | st.integers(0, len(WHOLE)),
)  # fmt: skip
def test_tampered_headers_end_in_format_errors_alone(
    tmp_path_factory: pytest.TempPathFactory, place: int, value: int, width: int, cut: int | None
) -> None:
    data = bytearray(WHOLE)
    data[place : place + width] = value.to_bytes(8, "little")[:width]
    path = tmp_path_factory.getbasetemp() / "fuzzed.gguf"
    path.write_bytes(bytes(data[:cut]))
    try:
        load(path)
    except FormatError:
        return


def test_models_with_more_than_their_file_are_refused(tmp_path: Path) -> None:
    model = read(FILES[0])
    model.extra = nn.Linear(2, 2)
    with pytest.raises(BadInput, match="have no place in"):
        formats.write(model, tmp_path / "out")
    with pytest.raises(ZotuneError, match="not read from a GGUF file"):
        formats.formats()["gguf"].write(nn.Linear(2, 2), tmp_path)


def test_offsets_take_their_own_units() -> None:
    model = read(GOLDEN / "gguf-q4_k_m.gguf")
    layer = next(m for m in model.modules() if isinstance(m, BlockLinear) and m.zero is not None)
    assert torch.equal(layer.zero_unit, layer.zero.abs())
    model = read(GOLDEN / "gguf-q4_1-qwen2.gguf")
    layer = next(m for m in model.modules() if isinstance(m, BlockLinear))
    assert torch.equal(layer.zero_unit, layer.scale.abs())
    values = values_of(layer)
    assert layer.grid.shape == values.codes.shape
    moved = layer.dequantize()
    layer.set_codes_(torch.full_like(values.codes, -1))
    down = layer.dequantize()
    layer.set_codes_(torch.full_like(values.codes, 0))
    torch.testing.assert_close(layer.dequantize() - down, layer.grid)
    assert moved.shape == down.shape
