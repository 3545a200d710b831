"""Tune GGUF files here, load the results in llama.cpp, compare logits.

    pip install gguf==0.19.0 llama-cpp-python==0.3.36      # the second builds llama.cpp
    PYTHONPATH=. python benchmarks/interop/gguf_tuned.py [STORIES260K_HF]

200 steps of QZO on one text; then the mean loss of that text's tokens and the logits, as zotune and
as llama.cpp compute them from the same file. llama.cpp rounds activations to 8 bits wherever a
matrix is quantized, so its logits differ for untouched files too: the row says by how much, before
and after. Writes benchmarks/interop/gguf_tuned.json.
"""

from __future__ import annotations

import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf_convert
import llama_cpp
import numpy as np
import tiny
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from zotune.models import load
from zotune.quant import formats
from zotune.training import TrainConfig, train

TEXT = "The cat sat on the mat, and then it sat on day {k}.\n\n"
STORY = "Once upon a time, there was a little girl. She had a red ball. She liked it {k} times.\n\n"
PACKAGES = ("torch", "transformers", "gguf", "llama-cpp-python")


def main(stories: list[str]) -> None:
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        files = [(path, TEXT) for path in sorted(tiny.GOLDEN.glob("gguf*.gguf"))]
        for kind in ("F32", "Q8_0") if stories else ():
            path = Path(scratch, f"stories260K-{kind.lower()}.gguf")
            gguf_convert.convert(Path(stories[0]), path, kind)
            files.append((path, STORY))
        for path, text in files:
            row = {"file": path.name, **compare(path, text, Path(scratch, path.stem))}
            print(row, flush=True)
            rows.append(row)
    found = {"versions": {p: version(p) for p in PACKAGES}, "rows": rows}
    Path(__file__).with_suffix(".json").write_text(json.dumps(found, indent=2) + "\n")


def compare(path: Path, text: str, scratch: Path) -> dict[str, Any]:
    """Losses and the largest difference of logits over their largest, before and after."""
    scratch.mkdir()
    lines = scratch / "text.txt"
    lines.write_text("".join(text.format(k=k) for k in range(40)))
    space = "norms" if "f32" in path.stem else "scales"
    config = TrainConfig(
        model_name_or_path=str(path), output_dir=str(scratch / "run"), space=space,
        method="qzo(lr=0.01)" if space == "scales" else "mezo(lr=0.001)", max_steps=200,
        per_device_train_batch_size=8, task="lm(dev_size=6)", data=str(lines), max_length=48,
        dtype="float32", report_to="none", show_progress=False,
    )  # fmt: skip
    train(config)
    tuned = next((scratch / "run" / "model").glob("*.gguf"))
    ids = load(path).tokenizer(text.format(k=3).strip()).input_ids
    row: dict[str, Any] = {"space": space}
    for name, file in (("before", path), ("after", tuned)):
        own, theirs = ours(file, ids), llama(file, ids)
        row[name] = {
            "loss": loss(own, ids),
            "loss_by_llama.cpp": loss(theirs, ids),
            "logits": float((own - theirs).abs().max() / own.abs().max()),
            "same_most_likely": float((own.argmax(-1) == theirs.argmax(-1)).float().mean()),
        }
    return row


def loss(logits: torch.Tensor, ids: list[int]) -> float:
    return float(cross_entropy(logits[:-1], torch.tensor(ids[1:])))


def ours(path: Path, ids: list[int]) -> torch.Tensor:
    """Logits (tokens, words) in float32."""
    model = formats.read(path, AutoModelForCausalLM)
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([ids])).logits[0]
    return logits


def llama(path: Path, ids: list[int]) -> torch.Tensor:
    """The same by llama.cpp, its cache of keys and values in float32."""
    model = llama_cpp.Llama(
        str(path), n_ctx=128, n_threads=1, logits_all=True, verbose=False,
        type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32,
    )  # fmt: skip
    model.eval(ids)
    logits = torch.from_numpy(np.array(model.scores[: len(ids)]))
    model.close()
    return logits


if __name__ == "__main__":
    main(sys.argv[1:])
