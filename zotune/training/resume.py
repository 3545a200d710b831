"""Starting a run folder, and going on with one after any interruption."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from zotune.core.estimator import Estimate
from zotune.core.method import Method
from zotune.core.noise import Key
from zotune.core.step import Tuner
from zotune.errors import BadInput, JournalError
from zotune.models import Loaded
from zotune.tasks.task import Task
from zotune.training import report, snapshots
from zotune.training.assemble import assemble
from zotune.training.assembled import Bench
from zotune.training.config import OWN, TrainConfig
from zotune.training.header import check_noise, digest_of, header_of
from zotune.training.journal import NAME, Journal, JournalWriter, Record
from zotune.training.snapshots import Mark

log = logging.getLogger("zotune")
OURS = (NAME, report.METRICS, report.RESULT, report.PLOT, report.CARD, report.CONFIG,
        snapshots.FOLDER, "model",
        *(report.PICTURE.format(when) for when in ("before", "after")))  # fmt: skip


def check_folder(config: TrainConfig) -> None:
    """A run folder is new or empty, or the user says what to do with it. Changes nothing.

    Raises:
        BadInput: the folder holds something.
    """
    out = config.out
    if out.exists() and not out.is_dir():
        raise BadInput(f"output_dir {out} is a file; give a folder")
    if out.is_dir() and any(out.iterdir()) and not config.overwrite_output_dir:
        raise BadInput(
            f"output_dir {out} is not empty; give another folder, --resume to go on with the run "
            "in it, or --overwrite-output-dir to start anew"
        )


def start(bench: Bench) -> JournalWriter:
    """Make the run folder: configuration first, then the journal."""
    out = bench.config.out
    for name in OURS if out.is_dir() else ():
        path = out / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise snapshots.cannot_write(out, error) from error
    report.save_config(bench.config)
    return JournalWriter.create(
        out / NAME, header_of(bench), bench.added, bench.config.journal_sync
    )


def resumed_config(config: TrainConfig) -> TrainConfig:
    """`resume_from_checkpoint` may name the run folder itself; a run that never began starts.

    Raises:
        BadInput: the folder named is no run, or is not output_dir.
    """
    given = config.resume_from_checkpoint
    if isinstance(given, str):
        if not is_run(Path(given).expanduser()):
            raise BadInput(f"cannot resume {given}: it holds no {NAME}; give the folder of a run")
        if Path(given).expanduser().resolve() != config.out.resolve():
            raise BadInput(
                f"resume_from_checkpoint={given} is not output_dir={config.out}; a run goes on in "
                "its own folder"
            )
    if not given or is_run(config.out):
        return config
    left = {p.name for p in config.out.iterdir()} if config.out.is_dir() else set()
    if left - {report.CONFIG, f".{report.CONFIG}.new", f".{NAME}.new"}:
        raise BadInput(f"cannot resume {config.out}: it holds other files but no {NAME}")
    log.warning("%s holds no journal yet: starting from the beginning", config.out)
    return dataclasses.replace(config, resume_from_checkpoint=None, overwrite_output_dir=True)


def resume(
    config: TrainConfig, model: nn.Module | Loaded | None, task: Task | None, repair: bool = False
) -> tuple[Bench, Journal, float]:
    """The run of `output_dir` as it stood after its last journalled step.

    Last snapshot + the journal's later steps; (bench, journal, seconds trained).

    Raises:
        JournalError: no or a damaged journal, another base, or a configuration that would not
            continue the same run.
    """
    journal = Journal.read(config.out, repair=repair, torn=True)
    _check_same_run(journal, config)
    bench = assemble(config, model=model, task=task, journal=journal)
    data = None if bench.private else digest_of(bench.batches.examples)
    if (journal.header["data"], journal.header["examples"]) != (data, len(bench.batches.examples)):
        raise JournalError(
            f"{journal.path} was written with other training examples "
            f"({journal.header['examples']} of them; there are {len(bench.batches.examples)} "
            "now): give the same data"
        )
    seconds = restore_(bench, journal)
    if bench.tuner.done < len(journal.records):  # not replayable: they run again from the snapshot
        journal = cut(journal, bench.tuner.done)
    log.info("going on after step %d of %d", bench.tuner.done, config.max_steps)
    return bench, journal, seconds


def _check_same_run(journal: Journal, config: TrainConfig) -> None:
    check_noise(journal)
    then, now = journal.header["config"], config.as_dict()
    other = [k for k in now if k not in OWN and k in then and _plain(then[k]) != _plain(now[k])]
    if other:
        told = ", ".join(f"{k}={now[k]!r} (was {then[k]!r})" for k in other)
        raise JournalError(f"this is not the run in {config.out}: {told}; resume with what it was")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def restore_(bench: Bench, journal: Journal, stop: int | None = None) -> float:
    """Bring the tuner to the journal's last step (or to step `stop`); seconds of its snapshot."""
    tuner, records = bench.tuner, journal.records[:stop]
    found = snapshots.load(bench.config.out, "last")
    seconds = 0.0
    if found is not None and found[1].start == head_id(journal) and found[1].done <= len(records):
        tensors, mark = found
        _freeze_until(bench, journal, mark.done)
        tuner.load_(tensors, mark.done, mark.applied)
        if bench.freezing is not None:
            bench.freezing.load_(tensors)
        seconds = mark.seconds
        if isinstance(tuner, Tuner):
            refill_(tuner, records[: mark.done])
    if isinstance(tuner, Tuner) and tuner.replayable:
        replay_(tuner, records[tuner.done :], partial(_replayed, bench, dict(journal.freezes)))
    if bench.freezing is not None and tuner.done in dict(journal.freezes):
        bench.freezing.replayed_(tuner.done, dict(journal.freezes))
    method, steps = bench.method, range(tuner.done)
    bench.evaluator.forwards = (
        sum(map(method.forwards_at, steps))
        if isinstance(method, Method)
        else len(steps) * method.forwards
    )
    return seconds


def estimate(tuner: Tuner, step: int, record: Record) -> Estimate:
    """A record as the estimate it was."""
    estimator = tuner.method.at(step).estimator
    return estimator.rebuild(Key(tuner.seed, step=step), record.coefficients, record.loss)


def _freeze_until(bench: Bench, journal: Journal, step: int) -> None:
    """Layers that were frozen before a snapshot was taken: it may hold no more of them."""
    for first, depth in journal.freezes:
        if bench.freezing is not None and first <= step:
            bench.freezing.freeze_(depth)


def _replayed(bench: Bench, freezes: Mapping[int, int], step: int) -> None:
    if bench.freezing is not None:
        bench.freezing.replayed_(step, freezes)


def replay_(
    tuner: Tuner, records: Sequence[Record], before: Callable[[int], None] | None = None
) -> None:
    """Apply recorded steps from where the tuner stands; bit for bit what training did.

    before(step) is called ahead of each.
    """
    for record in records:
        if before is not None:
            before(tuner.done)
        tuner.apply_(estimate(tuner, tuner.done, record))
    tuner.settle_()


def refill_(tuner: Tuner, records: Sequence[Record]) -> None:
    """Give a rule with a window the estimates before a snapshot."""
    window: list[Estimate] = []
    for step in range(len(records) - 1, -1, -1):
        if len(window) == tuner.recent.maxlen:
            break
        past = estimate(tuner, step, records[step])
        if past.finite:
            window.append(past)
    for past in reversed(window):
        tuner.remember_(past)


def cut(journal: Journal, steps: int) -> Journal:
    """The journal's first `steps` records (the file is cut when a writer goes on behind them)."""
    import zlib

    from zotune.training.journal import record_bytes

    size = record_bytes(int(journal.header["coefficients"]))
    freezes = tuple(freeze for freeze in journal.freezes if freeze[0] <= steps)
    begin = journal.size - (len(journal.records) + len(journal.freezes)) * size
    end = begin + (steps + len(freezes)) * size
    data = journal.path.read_bytes()
    crc = journal.start_crc
    for place in range(begin, end, size):
        crc = zlib.crc32(data[place : place + size - 4], crc)
    return dataclasses.replace(
        journal, records=journal.records[:steps], kept=None, size=end, crc=crc, freezes=freezes
    )


def head_id(journal: Journal) -> str:
    """Names the journal that a snapshot belongs to."""
    return f"{journal.start_crc:08x}"


def save_snapshot(
    bench: Bench, name: str, seconds: float, start: str, metric: float | None = None
) -> None:
    """Write the tuner's state as it stands."""
    tuner = bench.tuner
    mark = Mark(tuner.done, tuner.applied, seconds, metric, start)
    held = {} if bench.freezing is None else bench.freezing.state_tensors()
    snapshots.save(bench.config.out, name, tuner.state_tensors() | held, mark)


def bad_steps_at_end(records: Sequence[Record]) -> int:
    """How many of the last steps in a row were skipped."""
    import math

    count = 0
    for record in reversed(records):
        if math.isfinite(record.loss) and all(map(math.isfinite, record.coefficients)):
            break
        count += 1
    return count


def is_run(folder: Path) -> bool:
    return (folder / NAME).exists()
