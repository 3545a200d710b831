"""Loading: kinds, dtypes, tokenizers, refusals. Run: pytest tests/models/test_load.py"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from zotune.errors import BadInput, FormatError
from zotune.models import Loaded, fingerprint, linears, load, pad_token_id, write
from zotune.models import load as load_function
from zotune.models.load import find_folder, resolve_kind, set_compute_dtype_
from zotune.models.tokenizer import load_tokenizer
from zotune.quant import QuantLinear, Scheme

Tiny = Callable[..., Any]


@pytest.fixture
def llama(tiny: Tiny, tmp_path: Path) -> Path:
    return write(tiny("llama"), tmp_path / "llama")


def save_tokenizer(folder: Path, **special: str) -> None:
    """A word tokenizer with the given special tokens."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "a", "b", *special.values()]
    tokenizer = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **special)
    fast.save_pretrained(folder)


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "causal"),
        ({"architectures": ["LlamaForCausalLM"]}, "causal"),
        ({"architectures": ["BertForSequenceClassification"]}, "classifier"),
        ({"architectures": ["BertModel"], "model_type": "bert"}, "encoder"),
        ({"architectures": ["RobertaForMaskedLM"], "model_type": "roberta"}, "encoder"),
        ({"model_type": "llama"}, "causal"),
        ({"architectures": ["BertModel"], "zotune_head": {}}, "classifier"),
        ({"architectures": ["ViTForImageClassification"]}, "vision"),
        ({"model_type": "resnet"}, "vision"),
        ({"architecture": "resnet18", "pretrained_cfg": {}}, "vision"),
    ],
)
def test_kinds_are_told_by_the_config(config: dict[str, Any], kind: str) -> None:
    assert resolve_kind(config, "auto", Path("folder")) == kind
    assert resolve_kind(config, "encoder", Path("folder")) == "encoder"


def test_kinds_that_are_not_known_are_refused() -> None:
    with pytest.raises(BadInput, match="is a 'ViTModel', whose kind is not known; give kind="):
        resolve_kind({"architectures": ["ViTModel"], "model_type": "vit"}, "auto", Path("folder"))
    with pytest.raises(BadInput, match="kind='seq2seq' is unknown"):
        resolve_kind({}, "seq2seq", Path("folder"))


def test_a_float_model_is_float32_on_the_cpu(tiny: Tiny, tmp_path: Path) -> None:
    write(tiny("llama").bfloat16(), tmp_path)
    assert load(tmp_path).model.dtype == torch.float32
    assert load(tmp_path, dtype="bfloat16").model.dtype == torch.bfloat16
    assert load(tmp_path, dtype=torch.float16).model.dtype == torch.float16
    with pytest.raises(BadInput, match="dtype='int8' is not supported"):
        load(tmp_path, dtype="int8")


def test_a_scheme_quantizes_while_loading(llama: Path) -> None:
    loaded = load(llama, scheme="int4-g16", exclude=("lm_head", "*.mlp.*"))
    assert loaded.format == "float"
    schemes = {n: getattr(m, "scheme", None) for n, m in linears(loaded.model)}
    assert schemes["model.layers.0.self_attn.q_proj"] == Scheme.parse("int4-g16")
    assert schemes["model.layers.0.mlp.up_proj"] is None
    assert "lm_head" not in schemes
    with pytest.raises(BadInput, match="group_size=64 does not divide in_features=32 of 'model"):
        load(llama, scheme="int4-g64")


def test_a_quantized_folder_takes_no_second_scheme(llama: Path, tmp_path: Path) -> None:
    write(load(llama, scheme="int4-g16").model, tmp_path / "out")
    with pytest.raises(BadInput, match="is already quantized"):
        load(tmp_path / "out", scheme="int8-channel")


def test_the_compute_dtype_reaches_quantized_layers(llama: Path) -> None:
    loaded = load(llama, scheme="int4-g16", compute_dtype="bfloat16")
    layers = [m for _, m in linears(loaded.model) if isinstance(m, QuantLinear)]
    assert {layer.compute_dtype for layer in layers} == {torch.bfloat16}
    set_compute_dtype_(loaded.model, "float32")
    assert {layer.compute_dtype for layer in layers} == {torch.float32}
    set_compute_dtype_(loaded.model)
    assert {layer.compute_dtype for layer in layers} <= {torch.bfloat16, None}
    with pytest.raises(BadInput, match="dtype='float8'"):
        set_compute_dtype_(loaded.model, "float8")


def test_an_encoder_without_its_pooler_loads_without(
    tiny: Tiny, tokens: torch.Tensor, tmp_path: Path
) -> None:
    write(tiny("bert"), tmp_path / "float")
    path = tmp_path / "float" / "model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if "pooler" not in k}, path)
    loaded = load(tmp_path / "float", scheme="int8-channel", compute_dtype="float32")
    assert loaded.model.pooler is None
    write(loaded.model, tmp_path / "native")
    again = load(tmp_path / "native", compute_dtype="float32")
    assert again.model.pooler is None
    with torch.no_grad():
        a, b = (m(tokens).last_hidden_state for m in (loaded.model, again.model))
    assert torch.equal(a, b)


def test_weights_that_the_model_needs_must_be_there(llama: Path) -> None:
    path = llama / "model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if "q_proj" not in k}, path)
    with pytest.raises(FormatError, match=r"lacks tensors of LlamaForCausalLM: \[model\.layers\.0"):
        load(llama)


def test_weights_that_no_one_uses_are_named(llama: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = llama / "model.safetensors"
    save_file({**load_file(path), "stranger": torch.ones(1)}, path, metadata={"format": "pt"})
    load(llama)
    assert "are dropped: [stranger]" in caplog.text


def test_a_sharded_folder_loads(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("llama")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert fingerprint(load(tmp_path).model) == fingerprint(model)
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(FormatError, match=shard.name.replace(".", r"\.")):
        load(tmp_path)


def test_pickled_weights_are_refused(llama: Path) -> None:
    (llama / "model.safetensors").rename(llama / "pytorch_model.bin")
    with pytest.raises(FormatError, match="only as pickles"):
        load(llama)


def test_paths_that_lead_nowhere_are_refused(tmp_path: Path, monkeypatch: Any) -> None:
    with pytest.raises(FormatError, match="does not exist; give a checkpoint folder or a hub id"):
        load(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(FormatError, match="is a file"):
        load(tmp_path / "file")
    import huggingface_hub

    def fail(*_: Any, **__: Any) -> str:
        raise ConnectionError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(FormatError, match=r"'org/model' is no folder here.*offline"):
        load("org/model")


def test_the_hub_is_asked_for_safe_files_only(llama: Path, monkeypatch: Any) -> None:
    import huggingface_hub

    asked: list[dict[str, Any]] = []

    def answer(repo: str, **options: Any) -> str:
        asked.append(options)
        return str(llama)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", answer)
    assert find_folder("org/model") == llama
    assert find_folder("org/model", trust_remote_code=True) == llama
    assert "*.py" not in asked[0]["allow_patterns"]
    assert "*.py" in asked[1]["allow_patterns"]
    assert not any("bin" in pattern for pattern in asked[1]["allow_patterns"])


def test_a_missing_padding_token_is_the_end_of_text_and_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_tokenizer(tmp_path, eos_token="<end>")
    with caplog.at_level(logging.WARNING, "zotune"):
        first, second = load_tokenizer(tmp_path), load_tokenizer(tmp_path)
    assert first.pad_token == second.pad_token == "<end>"
    assert pad_token_id(first) == first.eos_token_id
    assert caplog.text.count("no padding token") == 1


def test_without_any_token_to_pad_with_the_need_is_the_error(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    with pytest.raises(BadInput, match="neither a padding nor an end-of-text token"):
        pad_token_id(tokenizer)


def test_a_tokenizer_with_a_padding_token_is_left_alone(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, eos_token="<end>", pad_token="<pad>")
    assert load_tokenizer(tmp_path).pad_token == "<pad>"


def test_a_damaged_tokenizer_is_an_error_and_none_is_none(llama: Path) -> None:
    assert load(llama).tokenizer is None
    (llama / "tokenizer.json").write_text("{")
    with pytest.raises(FormatError, match=r"the tokenizer of .* cannot be loaded"):
        load(llama)


def test_the_record_is_frozen_and_complete(llama: Path) -> None:
    loaded = load_function(llama)
    assert isinstance(loaded, Loaded)
    assert loaded.path == llama
    assert loaded.kind == "causal"
    assert loaded.config.model_type == "llama"
    assert not loaded.model.training
    with pytest.raises(AttributeError):
        loaded.kind = "encoder"  # type: ignore[misc]


def test_written_configs_hold_no_trace_of_the_machine(llama: Path, tmp_path: Path) -> None:
    write(load(llama, scheme="int4-g16").model, tmp_path / "out")
    text = (tmp_path / "out" / "config.json").read_text()
    assert str(tmp_path) not in text
    assert json.loads(text)["architectures"] == ["LlamaForCausalLM"]


def test_importing_models_does_not_import_transformers_or_numba() -> None:
    code = (
        "import sys, zotune.models, zotune.quant;"
        "print([m for m in ('transformers', 'numba', 'datasets', 'peft') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
