"""A tiny Stable Diffusion 3 transformer in NF4, made by diffusers and bitsandbytes on the CPU.

    pip install bitsandbytes==0.50.2 diffusers==0.42.1   # in an environment of its own
    python benchmarks/interop/diffusers_golden.py

The expected output is diffusers' with the weights that `dequantize_4bit` gives back in float32.
"""

from __future__ import annotations

import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import bitsandbytes_golden
import torch
from safetensors.torch import save_file

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "models" / "golden"
NAME = "sd3-nf4"


def main() -> None:
    from diffusers import BitsAndBytesConfig, SD3Transformer2DModel
    from diffusers.quantizers.bitsandbytes import BnB4BitDiffusersQuantizer

    # diffusers refuses machines without a GPU; bitsandbytes quantizes on the CPU as well.
    BnB4BitDiffusersQuantizer.validate_environment = lambda *given, **more: None
    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=1,
        attention_head_dim=32, num_attention_heads=2, joint_attention_dim=64,
        caption_projection_dim=64, pooled_projection_dim=64, pos_embed_max_size=8,
        qk_norm="rms_norm",
    )  # fmt: skip
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    out = GOLDEN / NAME
    with tempfile.TemporaryDirectory() as base:
        model.save_pretrained(base)
        quantized = SD3Transformer2DModel.from_pretrained(
            base, quantization_config=config, device_map="cpu", torch_dtype=torch.float32
        )
    quantized.register_to_config(_name_or_path=NAME)
    shutil.rmtree(out, ignore_errors=True)
    quantized.save_pretrained(out)
    plain = bitsandbytes_golden.dequantized(quantized)
    given = inputs()
    with torch.no_grad():
        made = plain(**given, return_dict=False)[0]
    versions = {p: version(p) for p in ("torch", "diffusers", "bitsandbytes")}
    save_file({**given, "made": made}, GOLDEN / f"{NAME}.expected", metadata=versions)


def inputs() -> dict[str, Any]:
    draw = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(2, 4, 8, 8, generator=draw),
        "timestep": torch.tensor([900.0, 100.0]),
        "encoder_hidden_states": torch.randn(2, 5, 64, generator=draw),
        "pooled_projections": torch.randn(2, 64, generator=draw),
    }


if __name__ == "__main__":
    main()
