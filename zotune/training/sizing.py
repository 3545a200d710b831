"""`--micro-batch auto`: from the memory that is free to what goes into a forward of this run."""

from __future__ import annotations

import logging

import torch

from zotune.core.backprop import AnyTuner, BackpropTuner
from zotune.core.evaluator import TorchEvaluator
from zotune.core.fitting import fitted, trial_of
from zotune.core.method import Method
from zotune.errors import BadInput
from zotune.methods import AnyMethod
from zotune.tasks.batch import Batch
from zotune.tasks.task import Task
from zotune.training.config import TrainConfig
from zotune.training.memory import free_bytes

log = logging.getLogger("zotune")


def check(config: TrainConfig, task: Task, method: AnyMethod) -> None:
    """Refuse pieces of like length where a step is more than the sum of its examples.

    Raises:
        BadInput: one number per batch, directions from padded activations, or cached features.
    """
    if not config.micro_batch_tokens:
        return
    stages = method.stages if isinstance(method, Method) else ()
    if not task.per_example:
        why = f"task {task.name!r} with this objective gives one number per batch"
    elif any(stage.perturbation.observes for stage in stages):
        why = f"{method.name} takes its directions from activations, padding included"
    elif config.cache_dir is not None:
        why = "features are cached for whole batches"
    else:
        return
    raise BadInput(f"{why}, which pieces of like length would change; drop micro_batch_tokens")


def room(config: TrainConfig, task: Task, tuner: AnyTuner, batch: Batch) -> int | None:
    """The most numbers that may go into a forward; None for an objective of whole batches."""
    evaluator = tuner.evaluator
    assert isinstance(evaluator, TorchEvaluator)
    if not task.per_example:
        log.info("micro_batch=auto: this objective takes a batch as a whole, one probe at a time")
        return None
    probes = [] if isinstance(tuner, BackpropTuner) else tuner.ask()
    together = max(1, min(len(probes), evaluator.stack or len(probes)))

    def run(part: Batch, count: int) -> None:
        if isinstance(tuner, BackpropTuner):
            tuner.gradient.backward(part)
            tuner.optimizer.zero_grad()
        elif probes:
            evaluator.losses(probes[:count], part, tuner.now.perturbation)

    each = batch.numbers // batch.size
    found = fitted(
        trial_of(run, batch, together), each, together * each, together * batch.numbers,
        free_bytes(config.device), torch.device(config.device),
    )  # fmt: skip
    evaluator.forwards = 0
    log.info("micro_batch=auto: %s", found)
    return found.numbers
