"""From the names in a configuration to method, space, task and model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from zotune import methods, tasks
from zotune.core import spaces
from zotune.core.calls import split_calls
from zotune.core.noise import Key
from zotune.core.space import SpaceSpec
from zotune.core.spaces import Head, Norms, Scales
from zotune.core.spaces.parameters import heads
from zotune.errors import BadInput, DataError
from zotune.methods import AnyMethod
from zotune.models import Loaded, PooledClassifier, set_compute_dtype_
from zotune.quant import formats, quantize_model_
from zotune.quant.graph import Graph
from zotune.quant.model import default_exclude
from zotune.tasks.data import read_table
from zotune.tasks.task import Example, Task
from zotune.tasks.vision import ImageClassification
from zotune.training.batches import drawing
from zotune.training.config import TrainConfig
from zotune.training.folders import from_module, load_model
from zotune.training.settings import EvalConfig

EVALUATED = Key(0)  # of what evaluations draw: the same in every run


def open_method(config: TrainConfig) -> AnyMethod:
    """The method with the configuration's overrides; an option it lacks is an error."""
    given = {
        "lr": config.learning_rate,
        "eps": config.eps,
        "queries": config.queries,
        "directions": config.directions,
        "units": config.units,
        "schedule": config.lr_scheduler_type,
        "warmup": config.warmup_steps,
        "weight_decay": config.weight_decay,
    }
    name, options = split_calls(config.method)[0]
    if "batch_size" in methods.entry(name).options:
        given["batch_size"] = config.examples
        if options.get("batch_size", given["batch_size"]) != given["batch_size"]:
            raise BadInput(
                f"batch_size={options['batch_size']} in {config.method!r}, but the run's is "
                f"{given['batch_size']}; give --batch-size only"
            )
    return methods.parse(config.method, **{k: v for k, v in given.items() if v is not None})


def given_options(config: TrainConfig) -> set[str]:
    """Names of the method's options that the user chose, by key or in the call."""
    given = {
        "lr": config.learning_rate, "eps": config.eps, "queries": config.queries,
        "directions": config.directions,
    }  # fmt: skip
    return {k for k, v in given.items() if v is not None} | set(split_calls(config.method)[0][1])


def open_space(
    config: TrainConfig, model: nn.Module | None = None, task: Task | None = None
) -> SpaceSpec:
    """The space asked for, or the method's default; `auto` goes by model and task.

    A classifier's head that a task put on an encoder is tuned on the directions between classes,
    read from every layer; that of an image classifier likewise, from the last layer; anything else
    by adapters on its activations. Another engine's graph shows neither its layers nor their
    activations: its last layer is read, or its scales are tuned.
    """
    if config.space is not None:
        return spaces.parse(config.space)
    name, _ = split_calls(config.method)[0]
    graphs = [] if model is None else [m for m in model.modules() if isinstance(m, Graph)]
    if name == "auto" and isinstance(model, PooledClassifier):
        return Head(basis="classes", project=True, layers="last" if graphs else "all")
    pictures = isinstance(task, ImageClassification)
    if name == "auto" and pictures and model is not None and heads(model):
        return Head(basis="classes")
    if name == "auto" and graphs:
        return Scales() if "scale" in graphs[0].roles.values() else Norms()
    return spaces.parse(methods.entry(name).default_space)


def open_task(config: Any) -> Task:
    """The task of a configuration with its data, options and length."""
    if not config.task:
        raise BadInput(f"no task: give --task; there are: {', '.join(tasks.names())}")
    name, options = _task_call(config.task)
    options.update(config.task_options)
    files = {"train": config.train_file, "dev": config.validation_file, "test": config.test_file}
    named = {split: Path(path).expanduser() for split, path in files.items() if path is not None}
    if named and config.data is not None:
        raise BadInput("data and train_file (validation_file, test_file) are both given; keep one")
    if named:
        encoding = str(options.get("encoding", "utf-8"))
        options["data"] = {split: read_table(path, encoding) for split, path in named.items()}
    elif config.data is not None:
        options["data"] = config.data
    if config.max_length is not None:
        options["max_length"] = config.max_length
    if "draw" in tasks.entry(name).options:
        options["draw"] = drawing(EVALUATED)
    return tasks.get(name, **options)


def _task_call(text: str) -> tuple[str, dict[str, Any]]:
    """Task names may hold dashes or not; nothing of the options is evaluated."""
    if "(" not in text:
        return text.strip(), {}
    name, options = split_calls(text)[0]
    return name, options


def open_model(
    config: TrainConfig | EvalConfig,
    model: nn.Module | Loaded | None,
    shelf: formats.Shelf | None = None,
) -> Loaded:
    """The model by its name, or the one given, quantized if the configuration says so."""
    if model is None:
        if not config.model_name_or_path:
            raise BadInput("no model: give model_name_or_path (--model FOLDER)")
        return load_model(
            config.model_name_or_path,
            dtype=config.dtype,
            scheme=config.scheme,
            compute_dtype=config.compute_dtype,
            trust_remote_code=config.trust_remote_code,
            device=config.device,
            shelf=shelf,
        )
    loaded = from_module(model)
    if shelf is None:
        loaded.model.to(config.device)
    if config.scheme is not None:
        quantize_model_(loaded.model, config.scheme, default_exclude(loaded.kind))
        set_compute_dtype_(loaded.model, config.compute_dtype)
    return loaded


def train_split(task: Task) -> Sequence[Example]:
    """The examples to train on. Raises DataError where the task has none."""
    if "train" in task.splits:
        return task.split("train")
    raise DataError(
        f"task {task.name!r} has no train split, only {', '.join(task.splits)}; give train_file, "
        "or a data folder with one"
    )
