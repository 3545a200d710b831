"""torchao checkpoints made by transformers on the CPU, and what torchao computes with them.

    pip install torchao==0.18.0      # in an environment of its own; no GPU is needed
    python benchmarks/interop/torchao_golden.py

The logits are transformers' with the weights that torchao's `dequantize_affine` gives back in
float32. Int4WeightOnlyConfig has no CPU kernels in this version and makes no checkpoint there.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import tiny
import torch

MODELS: dict[str, dict[str, Any]] = {
    "ao-int8": {"attention_bias": True},
    "ao-int4-asym": {"dtype": torch.float32},
}


def cases() -> dict[str, Any]:
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, MappingType
    from torchao.quantization.granularity import PerGroup

    groups = PerGroup(32)
    return {
        "ao-int8": Int8WeightOnlyConfig(),
        "ao-int8-groups": Int8WeightOnlyConfig(granularity=groups),
        "ao-int4": IntxWeightOnlyConfig(torch.int4, granularity=groups),
        "ao-int4-asym": IntxWeightOnlyConfig(torch.int4, groups, MappingType.ASYMMETRIC),
    }


def main(names: list[str]) -> None:
    from transformers import AutoModelForCausalLM, TorchAoConfig

    found = cases()
    for name in names or found:
        with tempfile.TemporaryDirectory() as scratch:
            base, out = Path(scratch, "base"), Path(scratch, "out")
            tiny.make(base, **{"dtype": torch.bfloat16, **MODELS.get(name, {})})
            model = AutoModelForCausalLM.from_pretrained(
                base, quantization_config=TorchAoConfig(found[name]), dtype="auto", device_map="cpu"
            )
            model.save_pretrained(out)
            tiny.tokenizer().save_pretrained(out)
            tiny.keep(out, name, library(out), "torchao")


def library(folder: Path) -> Any:
    """The saved model in float32, its weights by the library."""
    from torchao.quantization.quant_primitives import dequantize_affine
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", device_map="cpu")
    for name, module in list(model.named_modules()):
        found = getattr(module, "weight", None)
        if hasattr(found, "qdata"):
            weight = dequantize_affine(
                found.qdata, found.block_size, found.scale.float(), found.zero_point, torch.int8,
                output_dtype=torch.float32,
            )  # fmt: skip
            linear = torch.nn.Linear(*weight.shape[::-1], bias=module.bias is not None)
            linear.weight = torch.nn.Parameter(weight)
            if module.bias is not None:
                linear.bias = torch.nn.Parameter(module.bias.float())
            model.set_submodule(name, linear)
    return torch.nn.Module.float(model)


if __name__ == "__main__":
    main(sys.argv[1:])
