"""From a configuration to everything a run needs: model, task, space, evaluator, tuner."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from zotune import methods, tasks
from zotune.core import spaces
from zotune.core.backprop import Backprop, BackpropTuner
from zotune.core.calls import split_calls
from zotune.core.evaluator import TorchEvaluator
from zotune.core.space import Space, SpaceSpec
from zotune.core.spaces.lora import sizes
from zotune.core.step import Tuner
from zotune.errors import BadInput, DataError, JournalError
from zotune.methods import AnyMethod
from zotune.models import Loaded, PooledClassifier, fingerprint
from zotune.models.adapter import CHILD, LowRank, adapters, attach
from zotune.quant import quantize_model_
from zotune.tasks.batch import Batch
from zotune.tasks.data import read_table
from zotune.tasks.task import Example, Task
from zotune.training.batches import Batches
from zotune.training.config import TrainConfig
from zotune.training.folders import all_tensors, from_module, load_model
from zotune.training.journal import Journal

log = logging.getLogger("zotune")
OBSERVED = 256  # training examples that a space may look at before it is built


@dataclass
class Bench:
    """A run, assembled. `base` is the fingerprint of the model before anything was added to it."""

    config: TrainConfig
    loaded: Loaded
    base: str
    task: Task
    model: nn.Module
    method: AnyMethod
    spec: SpaceSpec
    evaluator: TorchEvaluator
    tuner: Tuner | BackpropTuner
    batches: Batches
    added: dict[str, Tensor]

    @property
    def space(self) -> Space:
        return self.tuner.space

    @property
    def coefficients(self) -> int:
        """Numbers per journal record."""
        if isinstance(self.method, Backprop):
            return 0
        each = self.tuner.ask()[0].per_example if isinstance(self.tuner, Tuner) else False
        examples = self.config.per_device_train_batch_size if each else 1
        return self.method.estimator.queries * examples


def assemble(
    config: TrainConfig,
    *,
    model: nn.Module | None = None,
    task: Task | None = None,
    journal: Journal | None = None,
) -> Bench:
    """Build all parts; with a journal, rebuild those of the run that wrote it."""
    method = open_method(config)
    spec = open_space(config)
    task = task or open_task(config)
    train = _split(task, ("train",))
    loaded = open_model(config, model)
    base = fingerprint(loaded.model)
    if journal is not None:
        check_base(journal, base)
    known = {id(t) for t in all_tensors(loaded.model).values()}
    prepared = task.prepare(loaded)
    batches = Batches(task, _split(task, ("train",)) or train,
                      config.per_device_train_batch_size, config.seed)  # fmt: skip
    if journal is None:
        space = spec.build(prepared, lambda m: _observe(m, task, batches, config))
        _say_space(space)
    else:
        space = rebuild_space(prepared, spec, journal)
    added = {
        name: tensor.detach().clone()
        for name, tensor in all_tensors(prepared).items()
        if id(tensor) not in known and tensor.any()
    }
    stack = journal.header["stack"] if journal is not None else config.stack
    evaluator = make_evaluator(config, task, prepared, space, stack)
    tuner = make_tuner(config, space, method, evaluator)
    if journal is None and isinstance(tuner, Tuner):
        tuner = _checked(config, task, tuner, batches)
    return Bench(
        config, loaded, base, task, prepared, method, spec, tuner.evaluator, tuner, batches, added
    )  # type: ignore[arg-type]


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
    return methods.parse(config.method, **{k: v for k, v in given.items() if v is not None})


def open_space(config: TrainConfig) -> SpaceSpec:
    """The space asked for, or the method's default."""
    if config.space is not None:
        return spaces.parse(config.space)
    name, _ = split_calls(config.method)[0]
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
    return tasks.get(name, **options)


def _task_call(text: str) -> tuple[str, dict[str, Any]]:
    """Task names may hold dashes or not; nothing of the options is evaluated."""
    if "(" not in text:
        return text.strip(), {}
    name, options = split_calls(text)[0]
    return name, options


def open_model(config: TrainConfig, model: nn.Module | None) -> Loaded:
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
        )
    if config.scheme is not None:
        quantize_model_(model, config.scheme)
    return from_module(model.to(config.device))


def make_evaluator(
    config: TrainConfig, task: Task, model: nn.Module, space: Space, stack: int | None
) -> TorchEvaluator:
    def objective(module: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        return task.losses(module, batch.to(config.device))

    return TorchEvaluator(
        model,
        space,
        objective,
        stack=stack if task.stackable else 1,
        micro_batch=config.micro_batch,
        per_example=task.per_example,
    )


def make_tuner(
    config: TrainConfig, space: Space, method: AnyMethod, evaluator: TorchEvaluator
) -> Tuner | BackpropTuner:
    if isinstance(method, Backprop):
        return BackpropTuner(space, method, evaluator, config.max_steps)
    return Tuner(space, method, config.seed, evaluator=evaluator, total=config.max_steps)


def _checked(config: TrainConfig, task: Task, tuner: Tuner, batches: Batches) -> Tuner:
    """Compare stacked with single evaluation on the first batch, and drop blocks nobody uses."""
    evaluator, method = tuner.evaluator, tuner.method
    assert isinstance(evaluator, TorchEvaluator)
    wanted = evaluator.stack
    unused = evaluator.check(batches[0], tuner.ask(), method.perturbation)
    if evaluator.stack != wanted:
        log.warning("stacked probes give other losses on this model; running one at a time (stack=1)")
    if not unused:
        return tuner
    log.warning("%d blocks are not used by this task and stay as they are: %s", len(unused),
                ", ".join(unused[:5]))  # fmt: skip
    space = tuner.space.without(unused)
    fresh = make_evaluator(config, task, evaluator.model, space, evaluator.stack)
    fresh.stack = evaluator.stack
    return Tuner(space, method, config.seed, evaluator=fresh, total=config.max_steps)


def _observe(model: nn.Module, task: Task, batches: Batches, config: TrainConfig) -> None:
    """Up to 256 training examples through the model, without gradient."""
    steps = range(-(-min(OBSERVED, len(batches.examples)) // batches.size))
    for step in islice(steps, OBSERVED):
        task.losses(model, batches[step].to(config.device))


def _split(task: Task, names: Sequence[str]) -> Sequence[Example]:
    for name in names:
        if name in task.splits:
            return task.split(name)
    raise DataError(
        f"task {task.name!r} has no {' or '.join(names)} split, only {', '.join(task.splits)}; give "
        "train_file, or a data folder with one"
    )


def _say_space(space: Space) -> None:
    log.info("tuning %s numbers in %d blocks", f"{space.numel:,}", len(space.blocks))


def header_of(bench: Bench) -> dict[str, Any]:
    """What a journal must say so that base + journal give the tuned model back."""
    import numpy
    import torch
    import transformers

    import zotune
    from zotune.core import noise

    wrapped = isinstance(bench.model, PooledClassifier) and bench.model is not bench.loaded.model
    units = {b.name: b.unit for b in bench.space if isinstance(b.unit, float)}
    return {
        "config": bench.config.as_dict(),
        "method": repr(bench.method),
        "space": repr(bench.spec),
        "blocks": [b.name for b in bench.space],
        "units": units,
        "seed": bench.config.seed,
        "total": bench.config.max_steps,
        "coefficients": bench.coefficients,
        "base": bench.base,
        "kind": bench.loaded.kind,
        "labels": list(bench.model.labels) if wrapped else None,  # type: ignore[union-attr,arg-type]
        "adapters": {p: a.scaling for p, _, a in adapters(bench.model)
                     if f"{p}.{CHILD}.A" in bench.added},
        "stack": bench.evaluator.stack,
        "examples": len(bench.batches.examples),
        "task": bench.task.name,
        "noise": noise.VERSION,
        "versions": {"zotune": zotune.__version__, "torch": torch.__version__,
                     "transformers": transformers.__version__, "numpy": numpy.__version__},
    }  # fmt: skip


def check_base(journal: Journal, base: str) -> None:
    """Refuse to go on from another model than the journal's."""
    if journal.header["base"] != base:
        raise JournalError(
            f"this is not the base model of {journal.path}: its fingerprint is {base[:12]}..., the "
            f"journal wants {journal.header['base'][:12]}... "
            f"({journal.header['config'].get('model_name_or_path') or 'a model given in Python'}, "
            f"scheme={journal.header['config'].get('scheme')}); give that one"
        )


def rebuild_space(model: nn.Module, spec: SpaceSpec, journal: Journal) -> Space:
    """The run's own space: adapters and head from the attachments, units from the header."""
    place_added_(model, journal.header, journal.attached)
    space = spec.build(model, None)
    wanted = journal.header["blocks"]
    space = space.without({b.name for b in space} - set(wanted))
    if [b.name for b in space] != wanted:
        raise JournalError(f"{journal.path}: the space has other blocks than the journal names")
    units: Mapping[str, float] = journal.header["units"]
    for block in space:
        block.unit = units.get(block.name, block.unit)
    return space


def place_added_(model: nn.Module, header: dict[str, Any], attached: Mapping[str, Tensor]) -> None:
    """Adapters and head as the run started with them."""
    modules = dict(model.named_modules())
    held = dict(attached)
    for path, scaling in header["adapters"].items():
        layer, a = modules.get(path), held.pop(f"{path}.{CHILD}.A")
        if layer is None:
            raise JournalError(f"the journal names an adapter on {path!r}; the model has no such layer")
        b = held.pop(f"{path}.{CHILD}.B", None)
        zeros = a.new_zeros(sizes(layer)[1], a.shape[0])
        device = next((t.device for t in (*layer.parameters(), *layer.buffers())), a.device)
        attach(layer, LowRank(a, zeros if b is None else b, scaling).to(device))
    own = model.state_dict()
    for name, tensor in held.items():
        if name not in own or own[name].shape != tensor.shape:
            raise JournalError(f"the journal holds {name!r}, which this model does not have")
        own[name].copy_(tensor)
