"""GGUF files of tiny models, and what ggml makes of them.

    pip install gguf==0.19.0 llama-cpp-python==0.3.36      # the second builds llama.cpp
    PYTHONPATH=. python benchmarks/interop/gguf_golden.py

The files of 32-weight blocks are made by the gguf package's quantizers, the K-quants by llama.cpp's
own. The logits are those of transformers in float32 with the weights that gguf.dequantize gives.
"""

from __future__ import annotations

import contextlib
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import gguf
import gguf_convert
import numpy as np
import tiny
import torch
from safetensors.torch import save_file

PIECES = [
    *((chr(32 + k).replace(" ", "\u2581"), -float(k), gguf.TokenType.NORMAL) for k in range(95)),
    ("</s>", 0.0, gguf.TokenType.CONTROL),
]
IDS = {"bos": 95, "eos": 95, "unk": 95}
# Name, class, ggml's type, settings.
FILES: list[tuple[str, str, str, dict[str, Any]]] = [
    ("gguf-q8_0", "Llama", "Q8_0", {"tie_word_embeddings": True}),
    ("gguf-q4_0", "Llama", "Q4_0", {"tie_word_embeddings": False}),
    ("gguf-q4_1-qwen2", "Qwen2", "Q4_1", {"tie_word_embeddings": False}),
    ("gguf-q5_0", "Llama", "Q5_0", {"tie_word_embeddings": True}),
    ("gguf-q5_1-qwen3", "Qwen3", "Q5_1", {"tie_word_embeddings": True, "head_dim": 32}),
    (
        "gguf-q4_k_m", "Llama", "Q4_K_M",
        {"hidden_size": 256, "intermediate_size": 256, "num_key_value_heads": 1},
    ),
]  # fmt: skip


def main() -> None:
    for name, family, kind, settings in FILES:
        out = tiny.GOLDEN / f"{name}.gguf"
        model = make(family, settings)
        if "_K" in kind:
            with tempfile.TemporaryDirectory() as scratch:
                plain = Path(scratch, "plain.gguf")
                gguf_convert.write(model, plain, "F32", PIECES, IDS)
                llama_quantize(plain, out, kind)
        else:
            gguf_convert.write(model, out, kind, PIECES, IDS)
        weights_(model, out)
        tokens = tiny.tokens()
        with torch.no_grad():
            logits = model(tokens).logits
        found = {}
        for package in ("gguf", "llama-cpp-python", "torch", "transformers"):
            with contextlib.suppress(PackageNotFoundError):
                found[package] = version(package)
        tensors = {"tokens": tokens, "logits": logits.contiguous()}
        save_file(tensors, out.with_suffix(".expected"), found)


def make(family: str, settings: dict[str, Any]) -> Any:
    """A model of random weights (seed 0), float32."""
    import transformers

    config = getattr(transformers, f"{family}Config")(
        **{**tiny.SIZES, "eos_token_id": 95, "bos_token_id": 95, **settings}
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 or name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model.float().eval()


def weights_(model: Any, path: Path) -> None:
    """Give the model the file's weights as gguf.dequantize computes them."""
    reader = gguf.GGUFReader(path)
    found = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    architecture = model.config.model_type
    names = gguf.get_tensor_name_map(
        gguf.MODEL_ARCH[architecture.upper()], model.config.num_hidden_layers
    )
    for name, parameter in model.named_parameters():
        own = names.get_name(name, try_suffixes=(".weight", ".bias"))
        array = found[own]
        if architecture == "llama" and own.split(".")[-2] in ("attn_q", "attn_k"):
            width = model.config.head_dim
            pairs = array.reshape(-1, width // 2, 2, *array.shape[1:])
            array = pairs.swapaxes(1, 2).reshape(array.shape)
        parameter.data = torch.from_numpy(np.array(array)).reshape(parameter.shape)


def llama_quantize(plain: Path, out: Path, kind: str) -> None:
    """llama.cpp's own quantizer."""
    import llama_cpp

    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    settings.nthread = 1
    if llama_cpp.llama_model_quantize(bytes(plain), bytes(out), settings):
        raise RuntimeError(f"llama.cpp could not make {kind} of {plain}")


if __name__ == "__main__":
    main()
