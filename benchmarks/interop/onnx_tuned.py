"""Tune ONNX files here, run the results in plain ONNX Runtime, compare.

    pip install onnx==1.23.2 onnxruntime==1.32.0 onnxscript==0.7.2
    PYTHONPATH=. python benchmarks/interop/onnx_tuned.py [STORIES260K_HF SHAKESPEARE]

200 steps of `auto` on the scales of each golden file, and of MatMulNBits files of stories260K with
three seeds; the model folder that a run leaves is then run without zotune. `outputs_equal`: whether
every number of its output is the one that zotune computes. `step_over_two_runs`: median time of a
training step over that of two plain session runs on its batch, in turn. Writes onnx_tuned.json
after each row.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnx
import onnx_export
import onnxruntime
import tiny
import torch
from onnxruntime.quantization import matmul_nbits_quantizer as nbits

from zotune.models import load
from zotune.training import TrainConfig, train
from zotune.training.assemble import Bench, assemble

TEXT = "The cat sat on the mat, and then it sat on day {k}.\n"
PACKAGES = ("torch", "transformers", "onnx", "onnxruntime", "onnxscript")
RECORD = Path(__file__).with_suffix(".json")
ROUNDS = 15


def main(places: list[str]) -> None:
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for folder in sorted(p for p in tiny.GOLDEN.glob("onnx-*") if p.is_dir()):
            keep(rows, compare(folder, golden_task(folder, Path(scratch)), Path(scratch), 0))
        if places:
            stories, text = map(Path, places)
            sizes = "lm(train_size=4000, dev_size=100, test_size=200)"
            task = {"task": sizes, "data": str(text), "max_length": 64}
            for level in (None, 4):
                folder = Path(scratch, f"stories260K-int4-level{level or 0}")
                convert(stories, folder, level)
                for seed in range(3):
                    keep(rows, compare(folder, task, Path(scratch), seed))


def keep(rows: list[dict[str, Any]], row: dict[str, Any]) -> None:
    print(row, flush=True)
    rows.append(row)
    versions = {package: version(package) for package in PACKAGES}
    RECORD.write_text(json.dumps({"versions": versions, "rows": rows}, indent=2) + "\n")


def golden_task(folder: Path, scratch: Path) -> dict[str, Any]:
    """A text for a language model, two classes for an encoder."""
    causal = json.loads((folder / "config.json").read_text())["model_type"] == "llama"
    path = scratch / ("text.txt" if causal else "rows.jsonl")
    if causal:
        path.write_text("".join(TEXT.format(k=k) for k in range(40)))
        return {"task": "lm(dev_size=6)", "data": str(path), "max_length": 48}
    rows = ({"text": TEXT.format(k=k)[k % 2 * 24 :], "label": "ab"[k % 2]} for k in range(40))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"task": "classification(dev_size=8)", "data": str(path)}


def convert(stories: Path, folder: Path, level: int | None) -> None:
    """stories260K as Optimum would leave it, its matrices in 4 bits with groups of 32 or less."""
    from transformers import AutoModelForCausalLM

    folder.mkdir()
    for path in stories.iterdir():
        if path.suffix in (".json", ".model"):
            shutil.copyfile(path, folder / path.name)
    onnx_export.export(AutoModelForCausalLM.from_pretrained(stories).eval(), folder / "model.onnx")
    quantizer = nbits.MatMulNBitsQuantizer(
        onnx.load(folder / "model.onnx"), block_size=32, is_symmetric=False, accuracy_level=level
    )
    quantizer.process()
    onnx.save(quantizer.model.model, folder / "model.onnx")


def compare(folder: Path, task: dict[str, Any], scratch: Path, seed: int) -> dict[str, Any]:
    """Losses before and after, whether plain ONNX Runtime agrees, and the time of a step."""
    run = scratch / f"{folder.name}-{seed}"
    config = TrainConfig(
        model_name_or_path=str(folder), output_dir=str(run), space="scales", max_steps=200,
        method="auto", seed=seed, per_device_train_batch_size=8, report_to="none",
        show_progress=False, **task,
    )  # fmt: skip
    result = train(config)
    before, after = (result.numbers[key]["loss"] for key in ("before", "after"))
    return {
        "file": folder.name, "seed": seed, "before": before, "after": after,
        "outputs_equal": agrees(run / "model"), **timed(config, scratch),
    }  # fmt: skip


def agrees(folder: Path) -> bool:
    """Whether the written file gives, without zotune, just what zotune computes."""
    loaded = load(folder)
    model = getattr(loaded.model, "encoder", loaded.model)
    ids = loaded.tokenizer(TEXT.format(k=3), return_tensors="pt").input_ids
    with torch.no_grad():
        ours = model(input_ids=ids)[0].numpy()
    feeds = {"input_ids": ids.numpy(), "attention_mask": np.ones(ids.shape, np.int64)}
    (theirs,) = plain(folder).run(None, feeds)
    return bool(np.array_equal(ours, theirs.astype(np.float32)))


def plain(folder: Path) -> Any:
    """A session as anybody makes it, on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(folder / "model.onnx", options)


def timed(config: TrainConfig, scratch: Path) -> dict[str, float]:
    """Medians of a two-sided step, and of its ratio to two plain runs on the same batch."""
    bench: Bench = assemble(
        replace(config, method="qzo(lr=0.0001)", output_dir=str(scratch / "timed"))
    )
    session, batch = plain(Path(config.model_name_or_path or "")), bench.batches[0]
    feeds = {name: batch[name].numpy() for name in ("input_ids", "attention_mask")}
    steps, runs = [], []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        bench.tuner.step(batch)
        between = time.perf_counter()
        for _ in range(2):
            session.run(None, feeds)
        steps.append(between - began)
        runs.append(time.perf_counter() - between)
    ratios = [a / b for a, b in zip(steps, runs, strict=True)]
    return {"step_seconds": median(steps), "step_over_two_runs": median(ratios)}


if __name__ == "__main__":
    main(sys.argv[1:])
