"""GPTQ and AWQ checkpoints made by GPTQModel on the CPU, and what GPTQModel computes with them.

    pip install "gptqmodel==7.7.0"      # in an environment of its own; no GPU is needed
    python benchmarks/interop/gptqmodel_golden.py

GPTQModel loads what it wrote and gives the weights back (`dequantize_weight` of its modules for
GPTQ, `dequantize_gemm` for AWQ), with float32 scales; the logits are transformers' with those
weights.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "4")

import tiny
import torch

CASES: dict[str, dict[str, Any]] = {
    "gptq-4bit-asym-act": {"bits": 4, "group_size": 32, "desc_act": True, "sym": False},
    "gptq-4bit-sym": {"bits": 4, "group_size": 32, "desc_act": False, "sym": True},
    "gptq-v2-2bit-asym": {
        "bits": 2, "group_size": 32, "desc_act": False, "sym": False, "format": "gptq_v2",
    },
    "gptq-3bit-asym-act": {"bits": 3, "group_size": 32, "desc_act": True, "sym": False},
    "gptq-8bit-sharded": {"bits": 8, "group_size": -1, "desc_act": False, "sym": True,
                          "act_group_aware": False},
    "awq-4bit": {"method": "awq", "format": "gemm", "bits": 4, "group_size": 32, "sym": False},
}  # fmt: skip

# AWQ wants multiples of 64 outputs; biases are met once.
MODELS = {"awq-4bit": {"num_key_value_heads": 4}, "gptq-4bit-sym": {"attention_bias": True}}


def main(names: list[str]) -> None:
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(0, 95, (16, 48), generator=generator).tolist()
    texts = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows]
    for name in names or CASES:
        with tempfile.TemporaryDirectory() as scratch:
            base, out = Path(scratch, "base"), Path(scratch, "out")
            tiny.make(base, **MODELS.get(name, {}))
            config = QuantizeConfig(offload_to_disk=False, **CASES[name])
            model = GPTQModel.load(str(base), config)
            model.quantize(texts, batch_size=1)
            model.save(str(out), max_shard_size=20_000 if "sharded" in name else None)
            backend = BACKEND.AWQ_TORCH if "awq" in name else BACKEND.GPTQ_TORCH
            model = GPTQModel.load(str(out), backend=backend, device="cpu", dtype=torch.float16)
            (out / "quant_log.csv").unlink(missing_ok=True)
            tiny.keep(out, name, dequantized(model.model), "gptqmodel", "safetensors")


def dequantized(model: Any) -> Any:
    """The model in float32 with plain linear layers, their weights by the library."""
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    for name, module in list(model.named_modules()):
        if hasattr(module, "qweight"):
            module.scales = module.scales.float()
            if hasattr(module, "dequantize_weight"):
                weight = module.dequantize_weight().float().t()
            else:
                size = module.group_size
                grid = module.qweight, module.qzeros, module.scales
                weight = dequantize_gemm(*grid, 4, size).float().t()
            linear = torch.nn.Linear(*weight.shape[::-1], bias=module.bias is not None)
            linear.weight = torch.nn.Parameter(weight.contiguous())
            if module.bias is not None:
                linear.bias = torch.nn.Parameter(module.bias.float())
            model.set_submodule(name, linear)
    return model.float()


if __name__ == "__main__":
    main(sys.argv[1:])
