"""transformers.TrainerCallback on our loop: W&B, TensorBoard, early stopping work unchanged."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from torch import nn

from zotune.errors import BadInput
from zotune.training.config import TrainConfig

log = logging.getLogger("zotune")


class Hooks:
    """Calls the callbacks in transformers' order with its own state and control objects.

    Without callbacks nothing of transformers' trainer is imported.
    """

    def __init__(
        self,
        config: TrainConfig,
        callbacks: Sequence[Any],
        *,
        model: nn.Module | None = None,
        tokenizer: Any = None,
        metric: str = "loss",
        higher_is_better: bool = False,
    ) -> None:
        chosen = [*_reporters(config.trackers), *map(_named, config.callbacks), *callbacks]
        self.handler = self.state = self.control = self.args = None
        self.higher_is_better = higher_is_better
        if not chosen:
            return
        from transformers.trainer_callback import (
            CallbackHandler,
            DefaultFlowCallback,
            TrainerControl,
            TrainerState,
        )

        self.args = _arguments(config, metric, higher_is_better)
        handler: Any = CallbackHandler
        self.handler = handler([DefaultFlowCallback, *chosen], model, tokenizer, None, None)
        self.state = TrainerState(
            max_steps=config.max_steps,
            logging_steps=config.logging_steps,
            eval_steps=config.eval_steps or config.max_steps,
            save_steps=config.save_steps or config.max_steps,
            train_batch_size=config.examples,
            is_local_process_zero=True,
            is_world_process_zero=True,
        )
        self.control = TrainerControl()
        self._call("on_init_end")

    def _call(self, event: str, **values: Any) -> None:
        if self.handler is not None:
            call = getattr(self.handler, event)  # resets the flags that the event answers
            self.control = call(self.args, self.state, self.control, **values)

    @property
    def stop(self) -> bool:
        """Whether a callback asked to stop training."""
        return self.control is not None and self.control.should_training_stop

    def wants(self, what: str) -> bool:
        """Whether a callback asked to "evaluate", "save" or "log" now."""
        return self.control is not None and bool(getattr(self.control, f"should_{what}"))

    def begin(self, step: int) -> None:
        if self.state is not None:
            self.state.global_step = step
        self._call("on_train_begin")

    def step_begin(self) -> None:
        self._call("on_step_begin")

    def step_end(self, step: int, epoch: float) -> None:
        if self.state is not None:
            self.state.global_step, self.state.epoch = step, epoch
        self._call("on_step_end")

    def log(self, values: dict[str, float]) -> None:
        if self.state is not None:
            self.state.log_history.append({**values, "step": self.state.global_step})
        self._call("on_log", logs=dict(values))

    def evaluated(self, values: dict[str, float], metric: float, best: bool) -> None:
        """After an evaluation; `best` says that its metric is the best so far."""
        self._call("on_evaluate", metrics=dict(values))
        if self.state is not None and best:
            self.state.best_metric = metric
            self.state.best_global_step = self.state.global_step

    def saved(self) -> None:
        self._call("on_save")

    def end(self) -> None:
        self._call("on_train_end")


def _arguments(config: TrainConfig, metric: str, higher_is_better: bool) -> Any:
    from transformers import TrainingArguments

    args = TrainingArguments(
        output_dir=str(config.out),
        max_steps=config.max_steps,
        per_device_train_batch_size=config.examples,
        per_device_eval_batch_size=config.per_device_eval_batch_size,
        logging_steps=config.logging_steps,
        save_strategy="steps" if config.save_steps else "no",
        save_steps=config.save_steps or config.max_steps,
        eval_strategy="steps" if config.eval_steps else "no",
        eval_steps=config.eval_steps or None,
        seed=config.seed & 0xFFFFFFFF,
        report_to=[],
        use_cpu=not config.device.startswith("cuda"),
        disable_tqdm=True,
    )
    args.load_best_model_at_end = config.load_best_model_at_end
    args.metric_for_best_model = f"eval_{metric}"
    args.greater_is_better = higher_is_better
    if config.learning_rate is not None:
        args.learning_rate = config.learning_rate
    return args


def _reporters(names: list[str]) -> list[Any]:
    if not names:
        return []
    from transformers import integrations

    find: Any = integrations.get_reporting_integration_callbacks  # type: ignore[attr-defined]
    found = []
    for name in names:
        try:
            (kind,) = find([name])
            found.append(kind())
        except ValueError as error:
            raise BadInput(f"report_to={name!r}: {error}") from error
        except (RuntimeError, ImportError) as error:
            if name != "tensorboard":  # asked for by name; TensorBoard is only the default
                raise BadInput(f"report_to={name!r} is not installed: {error}") from error
            log.warning("tensorboard is not installed; metrics go to metrics.jsonl only")
    return found


def _named(path: str) -> Any:
    """A callback class by its dotted path, made without arguments."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name)()
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise BadInput(f"callback {path!r} cannot be made: {error}") from error
