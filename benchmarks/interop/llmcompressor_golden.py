"""Checkpoints made by llm-compressor on the CPU, and what compressed-tensors computes with them.

    pip install llmcompressor==0.14.0.1 compressed-tensors==0.20.0    # an environment of its own
    python benchmarks/interop/llmcompressor_golden.py

The model is quantized to nearest from its weights alone and saved compressed. Where activations are
quantized it is loaded again through transformers in float32, and compressed-tensors decompresses it
and rounds the activations; else its compressors' own `decompress` gives the weights, from float32
scales where they take them.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import tiny
import torch

PER_TOKEN = {"num_bits": 8, "strategy": "token", "dynamic": True, "symmetric": True}
GROUPS: dict[str, dict[str, Any]] = {
    "ct-w4a16-asym": {
        "weights": {"num_bits": 4, "symmetric": False, "strategy": "group", "group_size": 32},
    },
    "ct-w4a16-sym": {
        "weights": {"num_bits": 4, "symmetric": True, "strategy": "group", "group_size": 32},
    },
    "ct-w3a16-channel": {
        "weights": {"num_bits": 3, "symmetric": False, "strategy": "channel"},
    },
    "ct-w8a16-tensor": {"weights": {"num_bits": 8, "symmetric": True, "strategy": "tensor"}},
    "ct-w8a8": {
        "weights": {"num_bits": 8, "symmetric": True, "strategy": "channel"},
        "input_activations": {"type": "int", **PER_TOKEN},
    },
    "ct-fp8-dynamic": {
        "weights": {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"},
        "input_activations": {"type": "float", **PER_TOKEN},
    },
    "ct-nvfp4a16": {
        "weights": {
            "num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group",
            "group_size": 16, "scale_dtype": torch.float8_e4m3fn,
        },
    },
    "ct-mxfp4a16": {
        "weights": {
            "num_bits": 4, "type": "float", "symmetric": True, "strategy": "group",
            "group_size": 32, "scale_dtype": torch.uint8,
        },
    },
}  # fmt: skip


def main(names: list[str]) -> None:
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from transformers import AutoModelForCausalLM

    for name in names or GROUPS:
        with tempfile.TemporaryDirectory() as scratch:
            out = Path(scratch, "out")
            tiny.make(Path(scratch, "base"), dtype=torch.bfloat16)
            group = {"targets": ["Linear"], **GROUPS[name]}
            recipe = QuantizationModifier(config_groups={"group_0": group}, ignore=["lm_head"])
            model = AutoModelForCausalLM.from_pretrained(Path(scratch, "base"), dtype="auto")
            oneshot(model=model, recipe=recipe)
            model.save_pretrained(out, save_compressed=True)
            tiny.tokenizer().save_pretrained(out)
            if "input_activations" in group:
                model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
            else:
                model = decompressed(Path(scratch, "base"), out)
            packages = ("llmcompressor", "compressed-tensors", "safetensors")
            tiny.keep(out, name, model, *packages)


def decompressed(base: Path, out: Path) -> Any:
    """The base model in float32 with the weights that the library makes of the compressed ones."""
    import json

    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    group = json.loads((out / "config.json").read_text())["quantization_config"]["config_groups"]
    scheme = QuantizationScheme(**group["group_0"])
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tensors = load_file(out / "model.safetensors")
    for name in {n.rpartition(".")[0] for n in tensors if n.endswith(".weight_scale")}:
        own = {n.rpartition(".")[2]: t for n, t in tensors.items() if n.startswith(name + ".")}
        if own["weight_scale"].dtype == torch.bfloat16:
            own["weight_scale"] = own["weight_scale"].float()
        weight = compressor.decompress(own, scheme)["weight"].float()
        model.get_submodule(name).weight = torch.nn.Parameter(weight)
    return model


if __name__ == "__main__":
    main(sys.argv[1:])
