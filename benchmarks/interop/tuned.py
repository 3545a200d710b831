"""Tune every golden checkpoint here, load the result in the format's own library, compare.

    PYTHONPATH=. python benchmarks/interop/tuned.py      # where both golden scripts run

200 steps of QZO on one text; then the mean loss of that text's tokens as zotune measures it and as
the library does, on the same saved folder. Writes benchmarks/interop/tuned.json.
"""

from __future__ import annotations

import json
import os
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "4")

import gptqmodel_golden
import llmcompressor_golden
import tiny
import torch
from torch.nn.functional import cross_entropy

from zotune.quant import formats
from zotune.training import TrainConfig, train

TEXT = "The cat sat on the mat, and then it sat on day {k}.\n\n"
PACKAGES = ("torch", "transformers", "gptqmodel", "llmcompressor", "compressed-tensors")


def main() -> None:
    rows = []
    for folder in sorted(p for p in tiny.GOLDEN.iterdir() if p.is_dir()):
        with tempfile.TemporaryDirectory() as scratch:
            row = {"checkpoint": folder.name, **compare(folder, Path(scratch))}
        print(row, flush=True)
        rows.append(row)
    found = {"versions": {p: version(p) for p in PACKAGES}, "rows": rows}
    Path(__file__).with_suffix(".json").write_text(json.dumps(found, indent=2) + "\n")


def compare(folder: Path, scratch: Path) -> dict[str, Any]:
    """Loss before and after, and the same by the library."""
    text = scratch / "text.txt"
    text.write_text("".join(TEXT.format(k=k) for k in range(40)))
    config = TrainConfig(
        model_name_or_path=str(folder), output_dir=str(scratch / "run"), space="scales",
        method=f"qzo(lr={0.3 if 'mxfp4' in folder.name else 0.01})", max_steps=200,
        per_device_train_batch_size=8, task="lm(dev_size=6)", data=str(text), max_length=48,
        dtype="float32", report_to="none", show_progress=False,
    )  # fmt: skip
    train(config)
    out = scratch / "run" / "model"
    return {"before": ours(folder), "after": ours(out), "by_the_library": loss(library(out))}


def loss(model: Any) -> float:
    """Mean loss of one text's characters."""
    ids = torch.tensor([[ord(c) - 32 for c in TEXT.format(k=3).strip()]])
    with torch.no_grad():
        logits = model(ids).logits.float()
    return float(cross_entropy(logits[0, :-1], ids[0, 1:]))


def ours(folder: Path) -> float:
    from transformers import AutoModelForCausalLM

    return loss(formats.read(folder, AutoModelForCausalLM, dtype=torch.float32))


def library(folder: Path) -> Any:
    """The model of a folder, its weights by the library that defines the format."""
    from transformers import AutoModelForCausalLM

    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    if config["quant_method"] != "compressed-tensors":
        from gptqmodel import BACKEND, GPTQModel

        backend = BACKEND.AWQ_TORCH if config["quant_method"] == "awq" else BACKEND.GPTQ_TORCH
        model = GPTQModel.load(str(folder), backend=backend, device="cpu", dtype=torch.float16)
        return gptqmodel_golden.dequantized(model.model)
    if config["config_groups"]["group_0"].get("input_activations"):
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    base = folder.parent / "base"
    tiny.make(base, dtype=torch.bfloat16)
    return llmcompressor_golden.decompressed(base, folder)


if __name__ == "__main__":
    main()
