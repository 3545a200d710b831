"""From a configuration to everything a run needs: model, task, space, evaluator, tuner."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor, nn

from zotune.core.space import Observe
from zotune.core.step import Tuner
from zotune.methods import AnyMethod
from zotune.models import Loaded, fingerprint
from zotune.tasks.batch import Batch
from zotune.tasks.task import Task
from zotune.training import privacy, sizing
from zotune.training.assembled import Bench
from zotune.training.augmentation import parse_augment
from zotune.training.batches import Batches, PoissonBatches
from zotune.training.config import TrainConfig
from zotune.training.evaluation import first_split
from zotune.training.folders import all_tensors
from zotune.training.freezing.freezing import Freezing
from zotune.training.freezing.plan import Plan, check_early
from zotune.training.journal import Journal
from zotune.training.opening import open_model, open_task, train_split
from zotune.training.origin import Fresh, Origin, Recorded
from zotune.training.streaming import Streaming
from zotune.training.streaming import check as check_streamed

log = logging.getLogger("zotune")
OBSERVED = 256  # training examples that a space may look at before it is built


def assemble(
    config: TrainConfig,
    *,
    model: nn.Module | Loaded | None = None,
    task: Task | None = None,
    journal: Journal | None = None,
) -> Bench:
    """Build all parts; with a journal, rebuild those of the run that wrote it."""
    origin: Origin = Fresh(config) if journal is None else Recorded(config, journal)
    method, task = origin.method(), task or open_task(config)
    examples = train_split(task)
    privacy.check(method, task, config)
    sizing.check(config, task, method)
    streaming = _streaming(config, method, model)
    loaded = open_model(config, model, None if streaming is None else streaming.store)
    if streaming is not None:
        streaming.begin_(loaded.model)
    base, known = fingerprint(loaded.model), {id(t) for t in all_tensors(loaded.model).values()}
    origin.check(base)
    prepared = task.prepare(loaded)
    spec, plan = origin.spec(prepared, task), Plan.of(config)
    if plan is not None:
        check_early(plan, config, spec, prepared, task)
    method = privacy.planned(method, len(examples), config.max_steps)
    batches = _batches(config, task, method)
    shown = batches if isinstance(batches, Batches) else _public(config, task)
    before = origin.before(prepared, task)
    blind = shown is not batches and "dev" not in task.splits
    observe = privacy.refuse_looking if blind else _observer(task, shown, config)
    space = origin.space(spec, prepared, observe)
    if streaming is not None:
        streaming.own_(space, method)
    added = _added(prepared, known)
    tuner = origin.tuner(space, prepared, task, method, shown)
    bench = Bench(config, loaded, base, task, prepared, spec, tuner, batches, added, before)
    if streaming is not None and isinstance(tuner, Tuner):
        bench.streaming = streaming
        streaming.serve_(tuner)
    if plan is not None and isinstance(batches, Batches):
        bench.freezing = Freezing(plan, config, task, prepared, tuner, batches)
    if bench.private:
        log.info("planned privacy: %s", bench.promise(config.max_steps))
    return bench


def _streaming(
    config: TrainConfig, method: AnyMethod, model: nn.Module | Loaded | None
) -> Streaming | None:
    streaming = Streaming.of(config, model)
    if streaming is not None:
        check_streamed(config, method, model)
    return streaming


def _added(model: nn.Module, known: set[int]) -> dict[str, Tensor]:
    """Copies of the tensors that came to the model, but for zeros."""
    return {
        name: tensor.detach().clone()
        for name, tensor in all_tensors(model).items()
        if id(tensor) not in known and tensor.any()
    }


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
