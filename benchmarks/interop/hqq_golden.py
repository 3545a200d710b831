"""HQQ checkpoints made by transformers on the CPU, and what HQQ computes with them.

    pip install hqq==0.2.8.post1 transformers==4.57.3     # in an environment of its own
    python benchmarks/interop/hqq_golden.py

That transformers still writes and reads HQQ; 5 does not. The logits are transformers' with the
weights that HQQ's `Quantizer.dequantize` gives back from float32 scales and zeros.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import tiny
import torch

CASES: dict[str, dict[str, Any]] = {
    "hqq-4bit": {"nbits": 4, "group_size": 32},
    "hqq-3bit": {"nbits": 3, "group_size": 32},
    "hqq-2bit-as-float": {"nbits": 2, "group_size": 16, "view_as_float": True},
    "hqq-8bit": {"nbits": 8, "group_size": 64},
}
MODELS: dict[str, dict[str, Any]] = {
    "hqq-4bit": {"attention_bias": True},
    "hqq-3bit": {"dtype": torch.float32},
    "hqq-8bit": {"dtype": torch.bfloat16},
}


def main(names: list[str]) -> None:
    from transformers import AutoModelForCausalLM, HqqConfig

    for name in names or CASES:
        with tempfile.TemporaryDirectory() as scratch:
            base, out = Path(scratch, "base"), Path(scratch, "out")
            tiny.make(base, **MODELS.get(name, {}))
            model = AutoModelForCausalLM.from_pretrained(
                base, quantization_config=HqqConfig(**CASES[name]), dtype="auto", device_map="cpu"
            )
            model.save_pretrained(out)
            tiny.tokenizer().save_pretrained(out)
            tiny.keep(out, name, library(out), "hqq")


def library(folder: Path) -> Any:
    """The saved model in float32, its weights by the library."""
    from hqq.core.quantize import HQQLinear, Quantizer
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", device_map="cpu")
    for name, module in list(model.named_modules()):
        if isinstance(module, HQQLinear):
            wide = {k: module.meta[k].float() for k in ("scale", "zero")}
            meta = {**module.meta, **wide, "compute_dtype": torch.float32}
            weight = Quantizer.dequantize(module.W_q, meta).float()
            linear = torch.nn.Linear(*weight.shape[::-1], bias=module.bias is not None)
            linear.weight = torch.nn.Parameter(weight)
            if module.bias is not None:
                linear.bias = torch.nn.Parameter(module.bias.float())
            model.set_submodule(name, linear)
    return torch.nn.Module.float(model)  # transformers refuses it


if __name__ == "__main__":
    main(sys.argv[1:])
