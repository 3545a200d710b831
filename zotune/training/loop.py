"""A training run from top to bottom."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from typing import Any

from torch import nn

from zotune.models import Loaded
from zotune.quant.running import forced_kernel, say_kernels
from zotune.tasks.task import Task
from zotune.training.assemble import assemble
from zotune.training.callbacks import Hooks
from zotune.training.config import TrainConfig
from zotune.training.folders import use_threads
from zotune.training.journal import JournalWriter
from zotune.training.report import Result
from zotune.training.resume import (
    bad_steps_at_end,
    check_folder,
    resume,
    resumed_config,
    start,
)
from zotune.training.run import Run


def train(
    config: TrainConfig,
    *,
    model: nn.Module | Loaded | None = None,
    task: Task | None = None,
    callbacks: Sequence[Any] = (),
    repair: bool = False,
) -> Result:
    """Train and leave model, result, journal, plot and card in `config.output_dir`.

    Args:
        config: what to do; `model` and `task` given as objects go before its names.
        model: any module that the task can run.
        task: any `Task`; see `zotune.training.Objective` for a plain loss function.
        callbacks: transformers.TrainerCallback objects or classes.
        repair: with resume_from_checkpoint, go on from the good part of a damaged journal.

    Raises:
        ZotuneError: bad input, a full disk, or losses that stay non-finite; what was done so far
            can be resumed.
    """
    config = resumed_config(config)
    use_threads(config.threads)
    with forced_kernel(config.kernel):
        return _run(config, model, task, callbacks, repair)


def _run(
    config: TrainConfig,
    model: nn.Module | Loaded | None,
    task: Task | None,
    callbacks: Sequence[Any],
    repair: bool,
) -> Result:
    if config.resume_from_checkpoint:
        bench, journal, seconds = resume(config, model, task, repair)
        bad = bad_steps_at_end(journal.records)
        writer = JournalWriter.reopen(journal, config.journal_sync)
    else:
        check_folder(config)
        bench, seconds, bad = assemble(config, model=model, task=task), 0.0, 0
        writer = start(bench)
    if config.verbose:
        say_kernels(bench.kernels)
    with closing(writer), closing(Run(bench, writer, seconds, bad)) as run:
        run.hooks = Hooks(
            config, callbacks, model=bench.model, tokenizer=bench.loaded.tokenizer,
            metric=bench.task.metric, higher_is_better=bench.task.higher_is_better,
        )  # fmt: skip
        return run.go()
