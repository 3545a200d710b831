"""Tiny ONNX checkpoints as ONNX Runtime's own quantizers make them, in the folders Optimum leaves.

    pip install onnx==1.23.2 onnxruntime==1.32.0 onnxscript==0.7.2
    PYTHONPATH=. python benchmarks/interop/onnx_golden.py

A Llama and a BERT (seed 0) are exported by torch.onnx. `name`.expected holds what ONNX Runtime
computes from the file with its default settings on one thread.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_export
import onnxruntime
import tiny
import torch
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.quantization import matmul_nbits_quantizer as nbits
from safetensors.torch import save_file

PACKAGES = ("torch", "transformers", "onnx", "onnxruntime", "onnxscript")


def main() -> None:
    logging.getLogger().setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as scratch:
        plain = {name: Path(scratch, f"{name}.onnx") for name in ("llama", "half", "bert")}
        configs = {name: export(name, path) for name, path in plain.items()}
        settings: dict[str, Any] = {"block_size": 32, "is_symmetric": True, "accuracy_level": 4}
        table = ("MatMul", "Gather"), (("MatMul", 0), ("Gather", 1))
        everywhere = dict(zip(("op_types_to_quantize", "quant_axes"), table, strict=True))
        for name, source, algorithm in (
            ("int4-asym", "llama", nbits.DefaultWeightOnlyQuantConfig(32, False)),
            ("int4-level4", "llama", nbits.DefaultWeightOnlyQuantConfig(**settings, **everywhere)),
            ("int8-half", "half", nbits.DefaultWeightOnlyQuantConfig(32, True, bits=8)),
            ("int4-hqq", "llama", nbits.HQQWeightOnlyQuantConfig(block_size=32)),
        ):
            quantizer = nbits.MatMulNBitsQuantizer(onnx.load(plain[source]), algo_config=algorithm)
            quantizer.process()
            beside = name == "int4-level4"
            keep(f"onnx-{name}", quantizer.model.model, configs[source], beside)
        out = Path(scratch, "out.onnx")
        quantize_static(
            plain["bert"], out, Sentences(), quant_format=QuantFormat.QDQ, per_channel=True,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
        )  # fmt: skip
        keep("onnx-qdq", onnx.load(out), configs["bert"])
        quantize_dynamic(plain["bert"], out, weight_type=QuantType.QInt8, per_channel=True)
        keep("onnx-dynamic", onnx.load(out), configs["bert"])


def export(name: str, path: Path) -> Any:
    """Write a float graph, and give the transformers configuration back."""
    import transformers

    kind = "Bert" if name == "bert" else "Llama"
    sizes = {k: v for k, v in tiny.SIZES.items() if kind == "Llama" or "key_value" not in k}
    config = getattr(transformers, f"{kind}Config")(**sizes, eos_token_id=95)
    torch.manual_seed(0)
    if kind == "Bert":
        model = transformers.BertModel(config, add_pooling_layer=False)
    else:
        model = transformers.LlamaForCausalLM(config)
    for parameter in model.parameters():  # no two alike, or the exporter makes them one
        parameter.data += 0.1 * torch.randn(parameter.shape)
    model.to(torch.float16 if name == "half" else torch.float32).eval()
    config.architectures = [type(model).__name__]
    onnx_export.export(model, path)
    return config


class Sentences(CalibrationDataReader):  # type: ignore[misc]
    """Four batches of random characters."""

    def __init__(self) -> None:
        self.batches = self._batches()

    def _batches(self) -> Iterator[dict[str, Any]]:
        random = np.random.default_rng(0)
        for _ in range(4):
            ids = random.integers(0, 95, (2, 24))
            yield {"input_ids": ids, "attention_mask": np.ones_like(ids)}

    def get_next(self) -> dict[str, Any] | None:
        return next(self.batches, None)


def keep(name: str, model: Any, config: Any, beside: bool = False) -> None:
    """A folder as Optimum's, and beside it what ONNX Runtime computes."""
    folder = tiny.GOLDEN / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    config.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    outside = {"save_as_external_data": True, "location": "model.onnx_data"} if beside else {}
    onnx.save(model, folder / "model.onnx", **outside)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(folder / "model.onnx", options)
    ids = tiny.tokens().numpy()
    (output,) = session.run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})
    stored = {"logits": torch.from_numpy(output), "tokens": tiny.tokens()}
    versions = {package: version(package) for package in PACKAGES}
    save_file(stored, folder.with_suffix(".expected"), metadata=versions)


if __name__ == "__main__":
    main()
