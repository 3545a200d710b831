"""From a configuration to everything a run needs: model, task, space, evaluator, tuner."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zotune.core.backprop import Backprop, BackpropTuner
from zotune.core.evaluator import TorchEvaluator
from zotune.core.method import Method
from zotune.core.space import Observe, Space, SpaceSpec
from zotune.core.step import Tuner
from zotune.methods import AnyMethod
from zotune.models import Loaded, fingerprint
from zotune.quant.running import kernels_of
from zotune.tasks.batch import Batch
from zotune.tasks.task import Task
from zotune.training import privacy, sizing
from zotune.training.augmentation import parse_augment
from zotune.training.batches import Batches, PoissonBatches, spread
from zotune.training.config import TrainConfig
from zotune.training.folders import all_tensors
from zotune.training.freezing.freezing import Freezing
from zotune.training.freezing.plan import Plan, check_early
from zotune.training.header import check_base, read_record, rebuild_space
from zotune.training.journal import Journal
from zotune.training.measuring import measured
from zotune.training.opening import (
    given_options,
    open_method,
    open_model,
    open_space,
    open_task,
    train_split,
)
from zotune.training.streaming import Streaming
from zotune.training.streaming import check as check_streamed

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
    batches: Batches | PoissonBatches
    added: dict[str, Tensor]
    before: dict[str, float]
    freezing: Freezing | None = None
    streaming: Streaming | None = None

    @property
    def space(self) -> Space:
        return self.tuner.space

    @property
    def kernels(self) -> dict[str, str]:
        """What each kind of layer runs on in a step."""
        return kernels_of(self.model, gradient=isinstance(self.method, Backprop))

    @property
    def private(self) -> bool:
        """Whether the training examples are hidden from whoever sees what the run leaves."""
        return privacy.private(self.method) is not None

    def promise(self, steps: int) -> privacy.Privacy | None:
        """What a private run promises after so many steps."""
        mechanism, batches = privacy.private(self.method), self.batches
        if mechanism is None or not isinstance(batches, PoissonBatches):
            return None
        return privacy.spent(mechanism, len(batches.examples), steps, batches.together)

    def count(self, step: int) -> int:
        """How many batches a step is measured on, from its own one on."""
        return 1 if isinstance(self.method, Backprop) else self.method.at(step).batches

    @property
    def coefficients(self) -> int:
        """Numbers per journal record."""
        if isinstance(self.method, Backprop):
            return 0
        examples = self.config.examples
        return max(stage.estimator.count(stage.batches * examples) for stage in self.method.stages)


def assemble(
    config: TrainConfig,
    *,
    model: nn.Module | Loaded | None = None,
    task: Task | None = None,
    journal: Journal | None = None,
) -> Bench:
    """Build all parts; with a journal, rebuild those of the run that wrote it."""
    method = (
        open_method(config)
        if journal is None
        else read_record(journal.header["method"], (Method, Backprop))
    )
    task = task or open_task(config)
    train_split(task)
    privacy.check(method, task, config)
    sizing.check(config, task, method)
    streaming = Streaming.of(config, model)
    if streaming is not None:
        check_streamed(config, method, model)
    loaded = open_model(config, model, None if streaming is None else streaming.store)
    if streaming is not None:
        streaming.begin_(loaded.model)
    base = fingerprint(loaded.model)
    if journal is not None:
        check_base(journal, base)
    known = {id(t) for t in all_tensors(loaded.model).values()}
    prepared = task.prepare(loaded)
    spec = (
        open_space(config, prepared, task)
        if journal is None
        else read_record(journal.header["space"], SpaceSpec)
    )
    plan = Plan.of(config)
    if plan is not None:
        check_early(plan, config, spec, prepared, task)
    method = privacy.planned(method, len(train_split(task)), config.max_steps)
    batches = _batches(config, task, method)
    shown = batches if isinstance(batches, Batches) else _public(config, task)
    if journal is None:
        before = measure(config, task, prepared, final_split(task))
        blind = shown is not batches and "dev" not in task.splits
        observe = privacy.refuse_looking if blind else _observer(task, shown, config)
        space = spec.build(prepared, observe)
        _say_space(space)
    else:
        before = journal.header["before"]
        space = rebuild_space(prepared, spec, journal)
    if streaming is not None:
        streaming.own_(space, method)
    added = {
        name: tensor.detach().clone()
        for name, tensor in all_tensors(prepared).items()
        if id(tensor) not in known and tensor.any()
    }
    stack = journal.header["stack"] if journal is not None else config.stack
    evaluator = make_evaluator(config, task, prepared, space, stack)
    if journal is not None:
        evaluator.room = journal.header.get("room")
    tuner = make_tuner(config, space, method, evaluator)
    if isinstance(tuner, Tuner) and journal is None:
        tuner = _checked(config, task, tuner, shown)
        evaluator = tuner.evaluator  # type: ignore[assignment]
    if config.micro_batch == "auto" and journal is None:
        evaluator.room = sizing.room(config, task, tuner, shown.whole(0))
    if isinstance(tuner, Tuner) and journal is None:
        if tuner.method.name == "auto":
            given = given_options(config)
            method = measured(tuner.method, given, tuner.space, evaluator, shown, config.max_steps)
            tuner = Tuner(
                tuner.space, method, config.seed, evaluator=evaluator, total=config.max_steps
            )
        for note in tuner.notes:
            log.info("%s", note)
    bench = Bench(
        config, loaded, base, task, prepared, method, spec, evaluator, tuner, batches, added, before
    )
    if streaming is not None and isinstance(tuner, Tuner):
        bench.streaming = streaming
        streaming.serve_(tuner)
    if plan is not None and isinstance(batches, Batches):
        bench.freezing = Freezing(plan, config, task, prepared, tuner, batches)
    if bench.private:
        log.info("planned privacy: %s", bench.promise(config.max_steps))
    return bench


def _batches(config: TrainConfig, task: Task, method: AnyMethod) -> Batches | PoissonBatches:
    examples, size = train_split(task), config.examples
    if privacy.private(method) is not None:
        return PoissonBatches(task, examples, size, config.together or 1)
    augmentation = None if config.augment is None else parse_augment(config.augment)
    return Batches(
        task, examples, size, config.seed, augmentation,
        most=config.micro_batch_tokens, grouped=config.group_by_length,
    )  # fmt: skip


def _public(config: TrainConfig, task: Task) -> Batches:
    """What may be looked at before the first step where the training examples may not."""
    shown = task.split(first_split(task, ("dev", "test")))
    return Batches(task, shown, min(len(shown), config.examples), config.seed)


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
        micro_batch=config.together,
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
    apart = privacy.private(method) is not None and (config.together or 1) > 1
    unused = evaluator.check(batches.whole(0), tuner.ask(), method.perturbation, apart)
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
            batch = batches.whole(step).to(config.device)
            task.losses(model, batch)
            if after is not None:
                after(batch)

    return observe


def _say_space(space: Space) -> None:
    log.info("tuning %s numbers in %d blocks", f"{space.numel:,}", len(space.blocks))
