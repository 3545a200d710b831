"""Where the parts of a run come from: chosen anew, or what the journal of a run says."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from zotune.core.backprop import AnyTuner, Backprop, BackpropTuner
from zotune.core.evaluator import TorchEvaluator
from zotune.core.method import Method
from zotune.core.space import Observe, Space, SpaceSpec
from zotune.core.step import Tuner
from zotune.methods import AnyMethod
from zotune.tasks.batch import Batch
from zotune.tasks.task import Task
from zotune.training import privacy, sizing
from zotune.training.batches import Batches
from zotune.training.config import TrainConfig
from zotune.training.evaluation import final_split, measure
from zotune.training.header import check_base, read_record, rebuild_space
from zotune.training.journal import Journal
from zotune.training.measuring import measured
from zotune.training.opening import given_options, open_method, open_space

log = logging.getLogger("zotune")


class Origin(Protocol):
    """Decides what `zotune.training.assemble` puts together."""

    def method(self) -> AnyMethod: ...

    def check(self, base: str) -> None:
        """Refuse a model, of this fingerprint, that the run did not begin with."""

    def spec(self, model: nn.Module, task: Task) -> SpaceSpec: ...

    def before(self, model: nn.Module, task: Task) -> dict[str, float]:
        """What the task measured before the first step."""

    def space(self, spec: SpaceSpec, model: nn.Module, observe: Observe) -> Space:
        """Built on the model, which `observe` shows some examples to."""

    def tuner(
        self, space: Space, model: nn.Module, task: Task, method: AnyMethod, shown: Batches
    ) -> AnyTuner:
        """`shown` are batches that may be looked at."""


@dataclass(frozen=True)
class Fresh:
    """A new run: what the configuration asks for, checked and measured before the first step."""

    config: TrainConfig

    def method(self) -> AnyMethod:
        return open_method(self.config)

    def check(self, base: str) -> None:
        """Any model will do."""

    def spec(self, model: nn.Module, task: Task) -> SpaceSpec:
        return open_space(self.config, model, task)

    def before(self, model: nn.Module, task: Task) -> dict[str, float]:
        return measure(self.config, task, model, final_split(task))

    def space(self, spec: SpaceSpec, model: nn.Module, observe: Observe) -> Space:
        space = spec.build(model, observe)
        log.info("tuning %s numbers in %d blocks", f"{space.numel:,}", len(space.blocks))
        return space

    def tuner(
        self, space: Space, model: nn.Module, task: Task, method: AnyMethod, shown: Batches
    ) -> AnyTuner:
        config = self.config
        tuner = _make_tuner(
            config, method, _make_evaluator(config, task, model, space, config.stack)
        )
        if isinstance(tuner, Tuner):
            tuner = _checked(config, task, tuner, shown)
        evaluator = tuner.evaluator
        assert isinstance(evaluator, TorchEvaluator)
        if config.micro_batch == "auto":
            evaluator.room = sizing.room(config, task, tuner, shown.whole(0))
        if isinstance(tuner, BackpropTuner):
            return tuner
        if tuner.method.name == "auto":
            given, steps = given_options(config), config.max_steps
            method = measured(tuner.method, given, tuner.space, evaluator, shown, steps)
            tuner = Tuner(tuner.space, method, config.seed, evaluator=evaluator, total=steps)
        for note in tuner.notes:
            log.info("%s", note)
        return tuner


@dataclass(frozen=True)
class Recorded:
    """A run that began before: nothing is chosen, measured or looked at again."""

    config: TrainConfig
    journal: Journal

    def method(self) -> AnyMethod:
        return read_record(self.journal.header["method"], (Method, Backprop))

    def check(self, base: str) -> None:
        check_base(self.journal, base)

    def spec(self, model: nn.Module, task: Task) -> SpaceSpec:
        return read_record(self.journal.header["space"], SpaceSpec)

    def before(self, model: nn.Module, task: Task) -> dict[str, float]:
        found: dict[str, float] = self.journal.header["before"]
        return found

    def space(self, spec: SpaceSpec, model: nn.Module, observe: Observe) -> Space:
        return rebuild_space(model, spec, self.journal)

    def tuner(
        self, space: Space, model: nn.Module, task: Task, method: AnyMethod, shown: Batches
    ) -> AnyTuner:
        header = self.journal.header
        evaluator = _make_evaluator(self.config, task, model, space, header["stack"])
        evaluator.room = header.get("room")
        return _make_tuner(self.config, method, evaluator)


def _make_evaluator(
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


def _make_tuner(config: TrainConfig, method: AnyMethod, evaluator: TorchEvaluator) -> AnyTuner:
    space = evaluator.space
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
    fresh = _make_evaluator(config, task, evaluator.model, space, evaluator.stack)
    fresh.stack = evaluator.stack
    return Tuner(space, method, config.seed, evaluator=fresh, total=config.max_steps)
