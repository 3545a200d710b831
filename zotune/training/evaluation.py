"""Evaluating a model folder, as it came or as a run left it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from torch import nn

from zotune.errors import BadInput
from zotune.models import Loaded
from zotune.quant.running import forced_kernel, kernels_of, say_kernels
from zotune.tasks.task import Task
from zotune.training.batches import spread
from zotune.training.config import TrainConfig
from zotune.training.folders import from_module, use_threads
from zotune.training.opening import open_model, open_task
from zotune.training.settings import EvalConfig
from zotune.training.streaming import Streaming


def evaluate(
    config: EvalConfig, *, model: nn.Module | Loaded | None = None, task: Task | None = None
) -> dict[str, Any]:
    """The task's numbers on one split, with how many examples and how long it took."""
    use_threads(config.threads)
    with forced_kernel(config.kernel):
        return _evaluate(config, model, task or open_task(config))


def _evaluate(config: EvalConfig, model: nn.Module | Loaded | None, task: Task) -> dict[str, Any]:
    split = config.split or final_split(task)
    if split not in task.splits:
        raise BadInput(f"task {task.name!r} has no split {split!r}, only {', '.join(task.splits)}")
    if model is None and not config.model_name_or_path:
        raise BadInput("no model: give model_name_or_path (--model FOLDER)")
    streaming = Streaming.of(config, model)
    shelf = None if streaming is None else streaming.store
    loaded = open_model(config, None, shelf) if model is None else from_module(model)
    with nullcontext() if streaming is None else streaming.running(loaded.model):
        prepared = task.prepare(loaded)
        running = kernels_of(prepared)
        if config.verbose:
            say_kernels(running)
        examples = spread(task.split(split), config.max_eval_samples)
        began = time.perf_counter()
        numbers = task.evaluate(prepared, examples, config.per_device_eval_batch_size)
        seconds = time.perf_counter() - began
    return {
        "task": config.task or task.name,
        "split": split,
        "metric": task.metric,
        "value": numbers[task.metric],
        "examples": len(examples),
        "seconds": seconds,
        "numbers": numbers,
        "kernels": running,
        "model": config.model_name_or_path,
    }


def measure(config: TrainConfig, task: Task, model: nn.Module, split: str) -> dict[str, float]:
    """The task's numbers on a split, or on `max_eval_samples` of it."""
    chosen = spread(task.split(split), config.max_eval_samples)
    return task.evaluate(model, chosen, config.per_device_eval_batch_size)


def final_split(task: Task) -> str:
    """Where the numbers before and after training are measured."""
    return first_split(task, ("test", "dev", "train"))


def first_split(task: Task, names: Sequence[str]) -> str:
    """The first of `names` that the task has."""
    return next(name for name in names if name in task.splits)
