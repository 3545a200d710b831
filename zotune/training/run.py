"""One process's share of a run: steps, evaluations, snapshots, result."""

from __future__ import annotations

import logging
import math
import time
from contextlib import AbstractContextManager, nullcontext

from zotune.core.backprop import cosine
from zotune.core.estimator import Estimate
from zotune.core.step import StepReport, Tuner
from zotune.errors import ZotuneError
from zotune.training import report, snapshots
from zotune.training.ahead import Ahead
from zotune.training.assembled import Bench
from zotune.training.batches import AbstractBatches
from zotune.training.callbacks import Hooks
from zotune.training.diagnostics import Diagnostics
from zotune.training.evaluation import final_split, first_split, measure
from zotune.training.folders import round_to_storage_, write_model
from zotune.training.interrupts import Interrupts
from zotune.training.journal import JournalWriter, record_bytes
from zotune.training.memory import peak_bytes, reset_peak
from zotune.training.progress import Progress
from zotune.training.report import Metrics, Result
from zotune.training.resume import (
    save_snapshot,
)

log = logging.getLogger("zotune")


class Run:
    """One process's share of a run."""

    hooks: Hooks

    def __init__(self, bench: Bench, writer: JournalWriter, seconds: float, bad: int) -> None:
        self.bench, self.config, self.writer = bench, bench.config, writer
        self.tuner, self.out = bench.tuner, bench.config.out
        self.seconds, self.bad = seconds, bad
        self.metrics = Metrics(self.out, self.tuner.done)
        self.best, self.best_step = self._best_so_far()
        self.batches: AbstractBatches = bench.batches
        workers = self.config.dataloader_num_workers if bench.task.stackable else 0
        self.ahead = Ahead(workers, self.config.device, bench.count)
        self.window: list[float] = []
        self.diagnostics = Diagnostics(bench.space)
        self.saved = -1
        if isinstance(self.tuner, Tuner):
            self.tuner.record = self._record

    def _record(self, step: int, estimate: Estimate) -> None:
        self.writer.append(estimate.scalars, estimate.loss)
        every = self.config.check_gradient
        if every and step % every == 0 and estimate.finite:
            assert isinstance(self.tuner, Tuner)
            self.diagnostics.cosine = cosine(self.tuner, estimate, self.batch)

    def go(self) -> Result:
        before = self._before()
        reset_peak(self.config.device)
        self._train()
        peak = peak_bytes(self.config.device)
        with self._whole():
            return self._finish(before, peak)

    def _finish(self, before: dict[str, float], peak: int) -> Result:
        if self.config.load_best_model_at_end:
            self._load_best()
        round_to_storage_(self.bench.model)
        after = self._evaluate(final_split(self.bench.task))
        report.save_picture(self.out, "after", self.bench.task.picture())
        result = self._result(before, after, peak)
        if not result.improved and (advice := self.diagnostics.advice()):
            log.warning("%s", advice)
        write_model(self.bench.model, self.out / "model", self.bench.loaded)
        self.writer.finish(result.kept)
        result.save()
        report.plot(self.out, self.metrics.rows, self.bench.task.metric)
        text = report.card(result, self.config, self.bench.base, self._task_text())
        for folder in (self.out, self.out / "model"):
            snapshots.write_atomic(folder / report.CARD, text.encode())
        self.hooks.end()
        if result.privacy is not None:
            log.info("privacy: %s", result.privacy)
        elif self.bench.task.truncated:  # how many a private run has cut, it keeps to itself
            log.warning("%d sequences were cut to max_length", self.bench.task.truncated)
        return result

    def _train(self) -> None:
        total, config = self.config.max_steps, self.config
        bar = Progress(total, self.tuner.done, config.device, config.show_progress)
        with Interrupts() as interrupts, bar as progress:
            self.hooks.begin(self.tuner.done)
            while True:
                self._look()
                if self.tuner.done >= total or self.hooks.stop or interrupts.seen:
                    break
                self._freeze()
                self.hooks.step_begin()
                step = self._step()
                self.hooks.step_end(self.tuner.done, self._epoch)
                progress.update(self.tuner.done, None if self.bench.private else step.loss)
                self._log(step, progress)
        self._save()
        if interrupts.seen:
            log.warning("stopped after step %d; go on with --resume", self.tuner.done)
            raise KeyboardInterrupt

    def _freeze(self) -> None:
        """Freeze what is due before this step, and start from cached features if there are any."""
        freezing = self.bench.freezing
        if freezing is None:
            return
        began = time.perf_counter()
        depth = freezing.due(self.tuner.done)
        if depth is not None:
            self._save()  # a run by backprop goes on from here if there is no space for features
            self.writer.freeze(depth)
            freezing.freeze_(depth)
            log.info("step %d: %d of %d layers are frozen", self.tuner.done, depth,
                     freezing.trunk.depth)  # fmt: skip
        self.batches = freezing.cache_() or self.bench.batches
        self.seconds += time.perf_counter() - began

    def _step(self) -> StepReport:
        began = time.perf_counter()
        done = self.tuner.done
        self.batch = self.ahead.batch(self.batches, done)
        if done + 1 < self.config.max_steps:
            with self.ahead.reading(self.batches, done + 1):
                step = self.tuner.step(self.batch)
        else:
            step = self.tuner.step(self.batch)
        self.diagnostics.note(step)
        if not isinstance(self.tuner, Tuner):
            self.writer.append((), step.loss)
        self.seconds += time.perf_counter() - began
        self.bad = 0 if step.applied else self.bad + 1
        if self.bad:
            log.warning("step %d: the loss is not finite; the step is skipped", step.step)
        if self.bad >= self.config.max_bad_steps:
            self._save()
            raise ZotuneError(
                f"the last {self.bad} steps gave no finite loss (up to step {self.tuner.done}): "
                f"lower learning_rate (now {self.bench.method.lr:g}) or eps, or look at the data; "
                f"the state before them is kept in {self.out / snapshots.FOLDER}"
            )
        return step

    def _look(self) -> None:
        """Evaluate, note the best, save: what is due after `done` steps."""
        done, config = self.tuner.done, self.config
        due = config.eval_steps and done and done % config.eval_steps == 0
        if (due or self.hooks.wants("evaluate")) and not self.metrics.evaluated(done):
            self._note(self._evaluate(first_split(self.bench.task, ("dev", "test", "train"))))
        due = config.save_steps and done and done % config.save_steps == 0
        if due or self.hooks.wants("save"):
            self._save()

    def _note(self, numbers: dict[str, float]) -> None:
        task, done = self.bench.task, self.tuner.done
        value = numbers[task.metric]
        best = math.isfinite(value) and (
            self.best is None or (value > self.best if task.higher_is_better else value < self.best)
        )
        if best:
            self.best, self.best_step = value, done
            save_snapshot(self.bench, "best", self.seconds, self._head, value)
        row = {f"eval_{k}": v for k, v in numbers.items()}
        self.metrics.add({"step": done, **row})
        log.info("step %d: %s", done, "  ".join(f"{k} {v:.4f}" for k, v in numbers.items()))
        self.hooks.evaluated(row, value, best)
        self.hooks.log(row)

    def _save(self) -> None:
        if self.saved == self.tuner.done:
            return
        self.saved = self.tuner.done
        save_snapshot(self.bench, "last", self.seconds, self._head)
        self.hooks.saved()

    def _log(self, step: StepReport, progress: Progress) -> None:
        if not self.bench.private:
            self.window.append(step.loss)
        done = self.tuner.done
        if (
            done % self.config.logging_steps
            and done != self.config.max_steps
            and not self.hooks.wants("log")
        ):
            return
        finite = [x for x in self.window if math.isfinite(x)]
        row = {
            "loss": sum(finite) / len(finite) if finite else None,
            "learning_rate": step.lr,
            "steps_per_second": progress.rate,
            "memory_bytes": peak_bytes(self.config.device),
            "forwards": self.bench.evaluator.forwards,
            "seconds": self.seconds,
            "epoch": self._epoch,
            **self.diagnostics.row(),
        }
        self.window.clear()
        self.metrics.add({"step": done, **{k: v for k, v in row.items() if v is not None}})
        self.hooks.log({k: v for k, v in row.items() if v is not None})

    @property
    def _head(self) -> str:
        return f"{self.writer.start_crc:08x}"

    @property
    def _epoch(self) -> float:
        return self.tuner.done * self.bench.batches.size / len(self.bench.batches.examples)

    def _evaluate(self, split: str) -> dict[str, float]:
        with self._whole():
            return measure(self.config, self.bench.task, self.bench.model, split)

    def _whole(self) -> AbstractContextManager[None]:
        """The whole model in its place, whatever of it lies on the disk, every step in it."""
        if isinstance(self.tuner, Tuner):
            self.tuner.settle_()
        return nullcontext() if self.bench.freezing is None else self.bench.freezing.whole()

    def _before(self) -> dict[str, float]:
        """What was measured before anything was added to the model; said once."""
        numbers = self.bench.before
        if not any("before" in row for row in self.metrics.rows):
            self.metrics.add({"step": 0, "before": numbers})
            log.info("before: %s", "  ".join(f"{k} {v:.4f}" for k, v in numbers.items()))
            report.save_picture(self.out, "before", self.bench.task.picture())
        return numbers

    def _best_so_far(self) -> tuple[float | None, int | None]:
        found = snapshots.load(self.out, "best")
        if found is None or found[1].start != self._head or found[1].done > self.tuner.done:
            return None, None
        return found[1].metric, found[1].done

    def _load_best(self) -> None:
        found = snapshots.load(self.out, "best")
        if found is None or self.best_step is None:
            log.warning("no evaluation was finite; keeping the last state")
            return
        self.tuner.load_(found[0], found[1].done, found[1].applied)

    def _result(self, before: dict[str, float], after: dict[str, float], peak: int) -> Result:
        bench, metric = self.bench, self.bench.task.metric
        steps = self.saved
        return Result(
            before=before.get(metric),
            after=after[metric],
            metric=metric,
            higher_is_better=bench.task.higher_is_better,
            split=final_split(self.bench.task),
            steps=steps,
            applied=self.tuner.applied,
            kept=self.tuner.done,
            forwards=bench.evaluator.forwards,
            train_seconds=self.seconds,
            steps_per_second=steps / self.seconds if self.seconds else 0.0,
            peak_memory_bytes=peak,
            trainable=bench.space.numel,
            method=repr(bench.method),
            space=repr(bench.spec),
            out=str(self.out),
            best=self.best,
            best_step=self.best_step,
            journal_bytes=self.writer.size + record_bytes(self.writer.n),
            numbers={"before": before, "after": after},
            privacy=bench.promise(steps),
            kernels=bench.kernels,
        )

    def _task_text(self) -> str:
        return self.config.task or self.bench.task.name

    def close(self) -> None:
        self.ahead.close()
        self.metrics.close()
        for part in (self.bench.freezing, self.bench.streaming):
            if part is not None:
                part.close()
