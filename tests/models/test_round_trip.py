"""Quantize, write, load: the same bits. Run: pytest tests/models/test_round_trip.py"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from zotune.errors import BadInput, FormatError
from zotune.models import fingerprint, linears, load, write
from zotune.quant import QuantLinear, quantize_model_

Tiny = Callable[..., Any]
CAUSAL = ["llama", "llama-tied", "qwen2", "qwen3", "mistral", "opt", "gpt2"]
ENCODERS = ["bert", "roberta"]
SCHEMES = ["int4-g16", "int8-channel-a8", "int3-g8-asym"]


def logits(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(tokens, attention_mask=torch.ones_like(tokens))[0]
    return found


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", CAUSAL + ENCODERS)
def test_a_quantized_model_is_saved_and_loaded_bit_for_bit(
    name: str, scheme: str, tiny: Tiny, tokens: torch.Tensor, tmp_path: Path
) -> None:
    model = tiny(name)
    replaced = quantize_model_(model, scheme)
    assert replaced
    assert all(isinstance(model.get_submodule(n), QuantLinear) for n in replaced)
    write(model, tmp_path / "out")
    loaded = load(tmp_path / "out", compute_dtype="float32")
    assert (loaded.format, loaded.kind) == ("zotune", "causal" if name in CAUSAL else "encoder")
    assert type(loaded.model) is type(model)
    assert not loaded.model.training
    assert torch.equal(logits(loaded.model, tokens), logits(model, tokens))
    assert fingerprint(loaded.model) == fingerprint(model)
    again = write(loaded.model, tmp_path / "again")
    for file in ("model.safetensors", "config.json"):
        assert (again / file).read_bytes() == (tmp_path / "out" / file).read_bytes()


@pytest.mark.parametrize("name", [*CAUSAL, *ENCODERS])
def test_a_float_model_is_saved_and_loaded_bit_for_bit(
    name: str, tiny: Tiny, tokens: torch.Tensor, tmp_path: Path
) -> None:
    model = tiny(name)
    write(model, tmp_path)
    loaded = load(tmp_path)
    assert loaded.format == "float"
    assert torch.equal(logits(loaded.model, tokens), logits(model, tokens))
    assert fingerprint(loaded.model) == fingerprint(model)


@pytest.mark.parametrize("quantized", [True, False])
def test_a_sequence_classifier_is_saved_and_loaded(
    quantized: bool, tiny: Tiny, tokens: torch.Tensor, tmp_path: Path
) -> None:
    model = tiny("bert", "classifier", num_labels=3)
    if quantized:
        quantize_model_(model, "int8-channel", exclude=("classifier",))
    write(model, tmp_path)
    loaded = load(tmp_path, compute_dtype="float32")
    assert loaded.kind == "classifier"
    assert logits(loaded.model, tokens).shape == (2, 3)
    assert torch.equal(logits(loaded.model, tokens), logits(model, tokens))


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "opt"])
def test_tied_heads_stay_tied_float_and_are_stored_once(
    name: str, tiny: Tiny, tmp_path: Path
) -> None:
    model = tiny(name)
    quantize_model_(model, "int8-channel", exclude=())
    assert isinstance(model.lm_head, nn.Linear)
    write(model, tmp_path)
    assert not any("lm_head" in tensor for tensor in load_file(tmp_path / "model.safetensors"))
    loaded = load(tmp_path).model
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight


def test_a_head_of_its_own_can_be_quantized(
    tiny: Tiny, tokens: torch.Tensor, tmp_path: Path
) -> None:
    model = tiny("llama")
    assert "lm_head" in quantize_model_(model, "int8-channel", exclude=())
    write(model, tmp_path)
    loaded = load(tmp_path, compute_dtype="float32").model
    assert isinstance(loaded.lm_head, QuantLinear)
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))
    assert "lm_head" not in dict(linears(loaded))


def test_layers_of_different_schemes_keep_theirs(
    tiny: Tiny, tokens: torch.Tensor, tmp_path: Path
) -> None:
    model = tiny("llama")
    quantize_model_(model, "int4-g16", exclude=("lm_head", "*.mlp.*"))
    quantize_model_(model, "int8-channel")
    write(model, tmp_path)
    record = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert record["scheme"] == "int4-g16"
    assert set(record["schemes"].values()) == {"int8-channel"}
    loaded = load(tmp_path, compute_dtype="float32").model
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))
    assert str(loaded.model.layers[1].mlp.up_proj.scheme) == "int8-channel"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_models_keep_their_dtype(
    dtype: str, tiny: Tiny, tokens: torch.Tensor, tmp_path: Path
) -> None:
    write(tiny("llama"), tmp_path / "float")
    half = load(tmp_path / "float", dtype=dtype, scheme="int4-g16")
    write(half.model, tmp_path / "half")
    loaded = load(tmp_path / "half").model
    assert loaded.model.norm.weight.dtype == getattr(torch, dtype)
    assert loaded.model.layers[0].mlp.up_proj.scale.dtype == torch.float32
    assert loaded.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(logits(loaded, tokens), logits(half.model, tokens))
    wide = load(tmp_path / "half", dtype="float32").model
    assert wide.model.norm.weight.dtype == torch.float32


def test_float16_scales_round_once_and_say_so(
    tiny: Tiny, tokens: torch.Tensor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny("llama")
    quantize_model_(model, "int4-g16-asym")
    layers = [m for _, m in linears(model) if isinstance(m, QuantLinear)]
    for layer in layers:
        layer.scale_dtype = torch.float16
    write(model, tmp_path / "rounded")
    assert "scales are rounded" in caplog.text
    caplog.clear()
    for layer in layers:
        layer.round_to_storage_()
    write(model, tmp_path / "exact")
    assert not caplog.text
    loaded = load(tmp_path / "exact", compute_dtype="float32").model
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))
    stored = load_file(tmp_path / "exact" / "model.safetensors")
    assert {t.dtype for n, t in stored.items() if n.endswith((".scale", ".zero"))} == {
        torch.float16
    }
    assert next(m for _, m in linears(loaded)).scale_dtype == torch.float16
    first, second = (tmp_path / d / "model.safetensors" for d in ("rounded", "exact"))
    assert first.read_bytes() == second.read_bytes()


def test_layers_must_agree_on_the_stored_scale_dtype(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("llama")
    quantize_model_(model, "int4-g16")
    model.model.layers[0].mlp.up_proj.scale_dtype = torch.float16
    with pytest.raises(BadInput, match="layers have scale_dtype"):
        write(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_loading_leaves_the_global_generator_alone(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("bert")
    write(model, tmp_path / "float")
    quantize_model_(model, "int4-g16")
    write(model, tmp_path / "native")
    for folder in ("float", "native"):
        before = torch.get_rng_state()
        load(tmp_path / folder)
        assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture
def native(tiny: Tiny, tmp_path: Path) -> Path:
    """A folder with a quantized tiny model."""
    model = tiny("llama-tied")
    quantize_model_(model, "int4-g16")
    return write(model, tmp_path / "native")


def edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"].update(changes)
    (folder / "config.json").write_text(json.dumps(config))


def test_missing_and_unexpected_tensors_are_listed(native: Path) -> None:
    tensors = load_file(native / "model.safetensors")
    tensors["stranger"] = tensors.pop("model.layers.1.mlp.up_proj.scale")
    save_file(tensors, native / "model.safetensors")
    with pytest.raises(
        FormatError, match=r"missing \[model\.layers\.1\.mlp\.up_proj\.scale\], .*\[stranger\]"
    ):
        load(native)


def test_tensors_of_wrong_shape_or_dtype_are_named(native: Path) -> None:
    tensors = load_file(native / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.codes"
    save_file({**tensors, name: tensors[name][:, :-1].contiguous()}, native / "model.safetensors")
    with pytest.raises(FormatError, match=r"up_proj\.codes \(48, 15\) instead of \(48, 16\)"):
        load(native)
    save_file({**tensors, name: tensors[name].to(torch.int8)}, native / "model.safetensors")
    with pytest.raises(FormatError, match=r"is torch\.int8; wanted torch\.uint8"):
        load(native)


def test_truncated_weights_are_refused(native: Path) -> None:
    path = native / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(FormatError, match=r"model\.safetensors is not a whole safetensors file"):
        load(native)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "has version=2; this zotune reads 1"),
        ({"modules": ["model.layers.9.mlp.up_proj"]}, r"\[model\.layers\.9\.mlp\.up_proj\]"),
        ({"modules": ["model.norm"]}, r"\[model\.norm\]"),
        ({"modules": "all"}, "no list of modules"),
        ({"scheme": "int4-gee"}, "'int4-gee' is not understood"),
        ({"scheme": "int4-g7"}, "group_size=7 does not divide"),
        ({"scale_dtype": "int8"}, "scale_dtype='int8'"),
    ],
)
def test_records_that_make_no_sense_are_refused(
    native: Path, changes: dict[str, Any], message: str
) -> None:
    edit(native, **changes)
    with pytest.raises(BadInput, match=message):
        load(native)


@pytest.mark.parametrize("quantized", [True, False])
def test_a_full_disk_leaves_the_old_checkpoint(
    quantized: bool, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import safetensors.torch
    import transformers.modeling_utils

    model = tiny("llama-tied")
    if quantized:
        quantize_model_(model, "int4-g16")
    folder = write(model, tmp_path / "out")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    monkeypatch.setattr(transformers.modeling_utils, "safe_save_file", full)
    with pytest.raises(OSError, match="No space left"):
        write(model, folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_rewriting_in_place_from_itself_keeps_companions(native: Path) -> None:
    (native / "merges.txt").write_text("words")
    loaded = load(native)
    write(loaded.model, native, source=native)
    assert (native / "merges.txt").read_text() == "words"
    assert fingerprint(load(native).model) == fingerprint(loaded.model)


def test_generation_settings_travel(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("llama")
    quantize_model_(model, "int4-g16")
    model.generation_config.max_new_tokens = 17
    write(model, tmp_path)
    assert load(tmp_path).model.generation_config.max_new_tokens == 17


def test_models_without_a_config_cannot_be_saved(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(16, 16))
    with pytest.raises(BadInput, match="Sequential has no config"):
        write(model, tmp_path / "out")
    quantize_model_(model, "int4-g16")
    with pytest.raises(BadInput, match="Sequential has no config"):
        write(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
