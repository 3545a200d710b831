"""An AQLM checkpoint of the aqlm package's own layers, and what they compute on the CPU.

    pip install aqlm==1.1.7      # in an environment of its own; no GPU is needed
    python benchmarks/interop/aqlm_golden.py

The package reads such models but does not make them; codes, codebooks and scales are drawn. Its
CPU kernel adds to one array from all threads at once, so it has to have one.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["NUMBA_NUM_THREADS"] = "1"

import tiny
import torch

# (codebooks, bits, length of a vector). 1x16 would hold a million numbers a layer.
CASES = {"aqlm-2x8": (2, 8, 8), "aqlm-1x8": (1, 8, 4)}
MODELS: dict[str, dict[str, Any]] = {"aqlm-1x8": {"attention_bias": True, "dtype": torch.float32}}


def main(names: list[str]) -> None:
    from transformers import AqlmConfig

    for name in names or CASES:
        with tempfile.TemporaryDirectory() as scratch:
            out = Path(scratch, "out")
            model = tiny.make(Path(scratch, "base"), **MODELS.get(name, {}))
            books, bits, size = CASES[name]
            config = AqlmConfig(
                in_group_size=size, num_codebooks=books, nbits_per_codebook=bits,
                linear_weights_not_to_quantize=["lm_head"],
            )  # fmt: skip
            fill(model, config)
            model.config.quantization_config = config
            model.save_pretrained(out)
            tiny.tokenizer().save_pretrained(out)
            tiny.keep(out, name, library(out), "aqlm")


def library(folder: Path) -> Any:
    """The saved model in float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu")


def fill(model: Any, config: Any) -> None:
    """Put aqlm's layers into the model and draw what they hold."""
    from aqlm import QuantizedLinear
    from aqlm.utils import pack_int_data
    from transformers.integrations import replace_with_aqlm_linear

    dtype = model.dtype
    replace_with_aqlm_linear(model, ["lm_head"], config)
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            for name, parameter in list(module.named_parameters(recurse=False)):
                drawn = torch.randn(parameter.shape, generator=generator) * 0.1
                if name == "codes":
                    size = module.codebook_size
                    drawn = torch.randint(0, size, parameter.shape, generator=generator)
                    drawn = pack_int_data(drawn, module.nbits_per_codebook)
                else:
                    drawn = (drawn + (1 if name == "scales" else 0)).to(dtype)
                setattr(module, name, torch.nn.Parameter(drawn, requires_grad=False))


if __name__ == "__main__":
    main(sys.argv[1:])
