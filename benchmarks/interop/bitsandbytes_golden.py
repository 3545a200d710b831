"""bitsandbytes checkpoints made by transformers on the CPU, and what bitsandbytes computes.

    pip install bitsandbytes==0.50.2      # in an environment of its own; no GPU is needed
    python benchmarks/interop/bitsandbytes_golden.py

For 4 bits the logits are transformers' with the weights that `dequantize_4bit` gives back in
float32 (the library's own product may round to bfloat16, by processor); for LLM.int8 they are those
of the library's layers, which round activations.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import tiny
import torch

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
CASES: dict[str, dict[str, Any]] = {
    "bnb-nf4": NF4,
    "bnb-nf4-nested": {
        **NF4, "bnb_4bit_use_double_quant": True, "bnb_4bit_quant_storage": torch.bfloat16,
    },
    "bnb-fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "bnb-int8": {"load_in_8bit": True},
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "bnb-nf4": {"attention_bias": True},
    "bnb-fp4": {"dtype": torch.float32},
}


def main(names: list[str]) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    for name in names or CASES:
        with tempfile.TemporaryDirectory() as scratch:
            base, out = Path(scratch, "base"), Path(scratch, "out")
            tiny.make(base, **{"dtype": torch.bfloat16, **MODELS.get(name, {})})
            config = BitsAndBytesConfig(**CASES[name])
            model = AutoModelForCausalLM.from_pretrained(
                base, quantization_config=config, device_map="cpu"
            )
            model.save_pretrained(out)
            tiny.tokenizer().save_pretrained(out)
            tiny.keep(out, name, library(out), "bitsandbytes")


def library(folder: Path) -> Any:
    """The saved model in float32, its weights by the library."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, device_map="cpu", local_files_only=True
    )
    return dequantized(model)


def dequantized(model: Any) -> Any:
    """The same model with float32 layers, their weights by the library."""
    from bitsandbytes.functional import dequantize_4bit

    for name, module in list(model.named_modules()):
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            state.dtype = torch.float32
            weight = dequantize_4bit(module.weight.data, state)
            linear = torch.nn.Linear(*weight.shape[::-1], bias=module.bias is not None)
            linear.weight = torch.nn.Parameter(weight)
            if module.bias is not None:
                linear.bias = torch.nn.Parameter(module.bias.float())
            model.set_submodule(name, linear)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    return model


if __name__ == "__main__":
    main(sys.argv[1:])
