"""Evaluating a model folder, as it came or as a run left it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from zotune.errors import BadInput
from zotune.tasks.task import Task
from zotune.training.assemble import open_task
from zotune.training.batches import spread
from zotune.training.folders import from_module, load_model, use_threads


@dataclass(frozen=True)
class EvalConfig:
    """Evaluate a model on a task.

    Args:
        model_name_or_path: folder or hub id; adapters of a training run are found. Alias: model.
        task: name of the task, with options if any.
        task_options: options of the task.
        data: file, folder or hub data set, where the task does not name its own.
        train_file: rows of the train split.
        validation_file: rows of the dev split.
        test_file: rows of the test split.
        split: "train", "dev" or "test"; the test split, or dev without one, when null.
        max_length: longest sequence in tokens.
        per_device_eval_batch_size: examples per forward.
        max_eval_samples: evaluate at most so many examples.
        scheme: quantize the float model while loading.
        dtype: of float tensors.
        compute_dtype: of quantized layers' products.
        device: where the model runs.
        threads: CPU threads.
        trust_remote_code: let Python files of the checkpoint run.
    """

    model_name_or_path: str = ""
    task: str = ""
    task_options: dict[str, Any] = field(default_factory=dict)
    data: str | None = None
    train_file: str | None = None
    validation_file: str | None = None
    test_file: str | None = None
    split: str | None = None
    max_length: int | None = None
    per_device_eval_batch_size: int = 64
    max_eval_samples: int | None = None
    scheme: str | None = None
    dtype: str = "auto"
    compute_dtype: str = "auto"
    device: str = "cpu"
    threads: int | None = None
    trust_remote_code: bool = False


def evaluate(
    config: EvalConfig, *, model: nn.Module | None = None, task: Task | None = None
) -> dict[str, Any]:
    """The task's numbers on one split, with how many examples and how long it took."""
    use_threads(config.threads)
    task = task or open_task(config)
    split = config.split or next(n for n in ("test", "dev", "train") if n in task.splits)
    if split not in task.splits:
        raise BadInput(f"task {task.name!r} has no split {split!r}, only {', '.join(task.splits)}")
    if model is None and not config.model_name_or_path:
        raise BadInput("no model: give model_name_or_path (--model FOLDER)")
    loaded = from_module(model) if model is not None else load_model(
        config.model_name_or_path, dtype=config.dtype, scheme=config.scheme,
        compute_dtype=config.compute_dtype, device=config.device,
        trust_remote_code=config.trust_remote_code,
    )  # fmt: skip
    prepared = task.prepare(loaded)
    examples = spread(task.split(split), config.max_eval_samples)
    began = time.perf_counter()
    numbers = task.evaluate(prepared, examples, config.per_device_eval_batch_size)
    return {
        "task": config.task or task.name,
        "split": split,
        "metric": task.metric,
        "value": numbers[task.metric],
        "examples": len(examples),
        "seconds": time.perf_counter() - began,
        "numbers": numbers,
        "model": config.model_name_or_path,
    }
