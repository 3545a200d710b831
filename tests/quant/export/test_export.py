"""What is written in another format is read again here with the logits that the model had."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from zotune.errors import BadInput
from zotune.quant import QuantLinear, Scheme, formats, quantize_model_
from zotune.quant.calibrate import calibrate_, recipe
from zotune.quant.export import export_, exporter, exporters
from zotune.quant.formats.gguf_file import read_header
from zotune.quant.model import choose

CASES = [
    ("zotune", "int5-g16"), ("zotune", "int3-g8-asym"),
    ("gptq", "int4-g32"), ("gptq", "int8-channel"), ("gptq", "int3-g32"),
    ("gptq_v2", "int4-g32-asym"), ("gptq_v2", "int2-g16-asym"), ("gptq_v2", "int3-channel-asym"),
    ("compressed-tensors", "int4-g16"), ("compressed-tensors", "int4-g32-asym"),
    ("compressed-tensors", "int3-channel"), ("compressed-tensors", "int8-g32"),
    ("compressed-tensors", "int8-channel-a8"),
    ("gguf", "int8-g32"), ("gguf", "int4-g32"), ("gguf", "int4-g32-asym"), ("gguf", "int5-g32"),
    ("gguf", "int5-g32-asym"),
]  # fmt: skip


def model(family: str = "llama", seed: int = 0, **options: Any) -> nn.Module:
    """Sizes that every format divides: 64 and 96 columns."""
    config = AutoConfig.for_model(
        family,
        **{
            "vocab_size": 48, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
            "max_position_embeddings": 64, "tie_word_embeddings": True, **options,
        },
    )  # fmt: skip
    return toys.fill_(AutoModelForCausalLM.from_config(config), seed)


def logits(found: nn.Module) -> Tensor:
    ids = torch.randint(1, 48, (2, 12), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        out: Tensor = found(ids).logits
    return out


def written(
    found: nn.Module, to: str, scheme: str, folder: Path, terms: Any = (("rtn", {}),)
) -> Path:
    target = exporter(to, Scheme.parse(scheme))
    target.check(found, choose(found, Scheme.parse(scheme)), Scheme.parse(scheme))
    ids = [
        torch.randint(1, 48, (4, 16), generator=torch.Generator().manual_seed(k)) for k in (0, 1)
    ]
    calibrate_(found, scheme, recipe(terms), ids, stored=target.scale_dtype(torch.float32))
    return export_(found, folder / "out", target)


@pytest.mark.parametrize(("to", "scheme"), CASES)
def test_what_is_written_computes_the_same_when_it_is_read(
    to: str, scheme: str, tmp_path: Path
) -> None:
    found = model()
    out = written(found, to, scheme, tmp_path)
    assert formats.detect(out) == to.removesuffix("_v2")
    again = formats.read(out, AutoModelForCausalLM)
    # GGUF's offsets enter the product apart from the codes.
    exact = not (to == "gguf" and "asym" in scheme)
    torch.testing.assert_close(
        logits(again), logits(found), rtol=0.0 if exact else 1e-4, atol=0.0 if exact else 1e-4
    )
    assert sum(isinstance(m, QuantLinear) for m in again.modules()) == 14


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("to", ["gguf", "gptq", "compressed-tensors"])
def test_other_architectures_are_written_too(family: str, to: str, tmp_path: Path) -> None:
    found = model(family, tie_word_embeddings=False)
    again = formats.read(written(found, to, "int4-g32", tmp_path), AutoModelForCausalLM)
    torch.testing.assert_close(logits(again), logits(found), rtol=0.0, atol=0.0)


@pytest.mark.parametrize(
    "rotation",
    [
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
        {
            "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
        },
    ],
)  # fmt: skip
def test_scaled_rotations_survive_gguf(rotation: dict[str, Any], tmp_path: Path) -> None:
    found = model(rope_parameters=rotation)
    again = formats.read(written(found, "gguf", "int8-g32", tmp_path), AutoModelForCausalLM)
    torch.testing.assert_close(logits(again), logits(found), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("to", ["gptq", "gptq_v2", "compressed-tensors"])
def test_columns_in_another_order_travel_with_their_groups(to: str, tmp_path: Path) -> None:
    found = model()
    terms = [("gptq", {"act_order": True, "static_groups": False})]
    out = written(found, to, "int4-g16", tmp_path, terms)
    again = formats.read(out, AutoModelForCausalLM)
    torch.testing.assert_close(logits(again), logits(found), rtol=1e-5, atol=1e-5)
    record = json.loads((out / "config.json").read_text())["quantization_config"]
    weights = record.get("config_groups", {}).get("group_0", {}).get("weights", {})
    assert record.get("desc_act") or weights.get("actorder") == "group"


@pytest.mark.parametrize("to", ["zotune", "gguf"])
def test_formats_without_an_order_of_columns_say_what_to_use(to: str, tmp_path: Path) -> None:
    terms = [("gptq", {"act_order": True, "static_groups": False})]
    with pytest.raises(BadInput, match="static_groups=True"):
        written(model(), to, "int4-g32", tmp_path, terms)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("to", "scheme", "use"),
    [
        ("gptq", "int5-g32", "int4-g32"),
        ("gptq", "int4-tensor", "int4-channel"),
        ("gptq", "int4-g32-asym", "gptq_v2"),
        ("gptq", "int8-channel-a8", "compressed-tensors"),
        ("compressed-tensors", "int8-tensor", "int8-channel"),
        ("compressed-tensors", "int4-g32-a8", "int8-channel-a8"),
        ("compressed-tensors", "int8-channel-asym-a8", "int8-channel-a8"),
        ("compressed-tensors", "int5-g32", "gguf"),
        ("gguf", "int4-g64", "int4-g32"),
        ("gguf", "int3-g32", "int4-g32"),
        ("onnx", "int4-g32", "gguf"),
    ],
)
def test_what_a_format_does_not_express_is_refused_with_what_to_use(
    to: str, scheme: str, use: str
) -> None:
    with pytest.raises(BadInput, match=rf"'{to}'.*{use}"):
        exporter(to, Scheme.parse(scheme))


def test_models_that_a_format_does_not_hold_are_refused_before_calibration() -> None:
    gpt2, scheme = toys.gpt2(), Scheme.parse("int4-g8")
    with pytest.raises(BadInput, match="'gpt2' is not written as GGUF"):
        exporters()["gguf"].check(gpt2, choose(gpt2, scheme), scheme)
    odd, groups = model(intermediate_size=100), Scheme.parse("int4-g4")
    with pytest.raises(BadInput, match=r"mlp\.gate_proj.*100 outputs.*exclude it"):
        exporters()["gptq"].check(odd, choose(odd, groups), groups)
    yarn = model(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0})
    with pytest.raises(BadInput, match="'yarn'"):
        exporters()["gguf"].check(yarn, choose(yarn, groups), groups)


def test_layers_left_float_are_named_for_the_programs_that_load_the_files(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.down_proj"
    for to in ("gptq", "compressed-tensors"):
        found = model()
        quantize_model_(found, "int4-g32", exclude=("lm_head", "layers.0.mlp.down_proj"))
        out = export_(found, tmp_path / to, exporters()[to])
        record = (out / "config.json").read_text()
        assert name in record.replace("\\", "")
        again = formats.read(out, AutoModelForCausalLM)
        torch.testing.assert_close(logits(again), logits(found), rtol=0.0, atol=0.0)


def test_gguf_keeps_vectors_in_float32_and_other_matrices_in_float16(tmp_path: Path) -> None:
    header = read_header(written(model(), "gguf", "int5-g32", tmp_path) / "model.gguf")
    types = {name: tensor.type for name, tensor in header.tensors.items()}
    assert types["token_embd.weight"] == "F16"
    assert types["output_norm.weight"] == "F32"
    assert types["blk.1.ffn_down.weight"] == "Q5_0"
    assert "output.weight" not in types


def test_a_failed_export_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.save_torch_state_dict", fail)
    with pytest.raises(OSError, match="No space"):
        written(model(), "gptq", "int4-g32", tmp_path)
    assert list(tmp_path.iterdir()) == []
