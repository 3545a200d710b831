"""From a configuration to everything a run needs: model, task, space, evaluator, tuner."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zotune.core.backprop import Backprop, BackpropTuner
from zotune.core.evaluator import TorchEvaluator
from zotune.core.space import Observe, Space, SpaceSpec
from zotune.core.step import Tuner
from zotune.methods import AnyMethod
from zotune.models import Loaded, fingerprint
from zotune.tasks.batch import Batch
from zotune.tasks.task import Task
from zotune.training.batches import Batches, spread
from zotune.training.config import TrainConfig
from zotune.training.folders import all_tensors
from zotune.training.header import check_base, rebuild_space
from zotune.training.journal import Journal
from zotune.training.opening import open_method, open_model, open_space, open_task, train_split

log = logging.getLogger("zotune")
OBSERVED = 256  # training examples that a space may look at before it is built


@dataclass
class Bench:
    """A run, assembled. `base` is the fingerprint of the model before anything was added to it,
    `before` what the task measured then."""

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
    before: dict[str, float]

    @property
    def space(self) -> Space:
        return self.tuner.space

    @property
    def coefficients(self) -> int:
        """Numbers per journal record."""
        if isinstance(self.method, Backprop):
            return 0
        examples = self.config.per_device_train_batch_size
        return max(stage.estimator.count(examples) for stage in self.method.stages)


def assemble(
    config: TrainConfig,
    *,
    model: nn.Module | Loaded | None = None,
    task: Task | None = None,
    journal: Journal | None = None,
) -> Bench:
    """Build all parts; with a journal, rebuild those of the run that wrote it."""
    method = open_method(config)
    spec = open_space(config)
    task = task or open_task(config)
    train_split(task)
    loaded = open_model(config, model)
    base = fingerprint(loaded.model)
    if journal is not None:
        check_base(journal, base)
    known = {id(t) for t in all_tensors(loaded.model).values()}
    prepared = task.prepare(loaded)
    batches = Batches(task, train_split(task), config.per_device_train_batch_size, config.seed)
    if journal is None:
        before = measure(config, task, prepared, final_split(task))
        space = spec.build(prepared, _observer(task, batches, config))
        _say_space(space)
    else:
        before = journal.header["before"]
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
        evaluator = tuner.evaluator  # type: ignore[assignment]
    return Bench(
        config, loaded, base, task, prepared, method, spec, evaluator, tuner, batches, added, before
    )


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
        log.warning(
            "stacked probes give other losses on this model; running one at a time (stack=1)"
        )
    if not unused:
        return tuner
    log.warning("%d blocks are not used by this task and stay as they are: %s", len(unused),
                ", ".join(unused[:5]))  # fmt: skip
    space = tuner.space.without(unused)
    fresh = make_evaluator(config, task, evaluator.model, space, evaluator.stack)
    fresh.stack = evaluator.stack
    return Tuner(space, method, config.seed, evaluator=fresh, total=config.max_steps)


def _observer(task: Task, batches: Batches, config: TrainConfig) -> Observe:
    """Training batches through the model, without gradient: 256 examples unless more are asked."""

    @torch.no_grad()
    def observe(
        model: nn.Module,
        after: Callable[[Batch], None] | None = None,
        examples: int | None = None,
    ) -> None:
        count = min(examples or OBSERVED, len(batches.examples))
        for step in range(-(-count // batches.size)):
            batch = batches[step].to(config.device)
            task.losses(model, batch)
            if after is not None:
                after(batch)

    return observe


def _say_space(space: Space) -> None:
    log.info("tuning %s numbers in %d blocks", f"{space.numel:,}", len(space.blocks))
