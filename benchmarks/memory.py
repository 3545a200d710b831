"""Memory of training: against evaluating the same batches, and over thousands of steps.

    python benchmarks/memory.py

Peaks are those of `benchmarks.step --measure`, each in a process of its own; they hold compiled
kernels, which are loaded once. Beside them stands what lives of tensors alone. The long runs go
through `zotune train` with its journal, metrics and snapshots, on batches of changing length.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

if not __package__:
    sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from benchmarks import process
from benchmarks.contenders import INT4, INT8, Prepared, Setup, minilm
from benchmarks.harness import Row, begin, parser, report
from benchmarks.step import peaks_of
from zotune.core.meter import peak_of

EVALUATION = {"mezo fp32": "two forwards fp32", "qzo int4": "two forwards int4",
              "zoqo int8": "two forwards int8"}  # fmt: skip
OVER_EVALUATION = 1.15
TENSORS = 1.03
GROWTH = 2.0  # per cent
RUNS: dict[str, dict[str, Any]] = {
    "qzo int4": {"method": "qzo", "space": "scales", "scheme": INT4},
    "zoqo int8": {"method": "zoqo", "space": "codes", "scheme": INT8},
    "mezo fp32": {"method": "mezo", "space": "weights"},
}


def options(words: Sequence[str] | None = None) -> argparse.Namespace:
    assert __doc__ is not None
    defaults = {"batch": 16, "length": 48, "memory_steps": 8, "steps": 5000, "train_batch": 2}
    flags = parser(__doc__, **defaults)
    flags.add_argument("--only", nargs="+", choices=list(RUNS), default=list(RUNS))
    flags.add_argument("--measure", choices=list(RUNS), help="memory of one long run, as JSON")
    return flags.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    given = options(words)
    begin(given)
    if given.measure:
        print(json.dumps(long_run(given.measure, given)))
        return
    names = [
        n for name in given.only for n in (name, f"{name}, one probe at a time", EVALUATION[name])
    ]
    peaks, failures = peaks_of(names, given)
    rows = [row for name in given.only for row in peak_rows(name, peaks)]
    rows += [row for name in given.only for row in tensor_rows(name, given)]
    rows.append(Row("compiled kernels of the noise, once per process", kernels() / 1e6, "MB"))
    runs: dict[str, list[int]] = {}
    for name in given.only:
        try:
            runs[name] = apart(name, given)
        except RuntimeError as error:
            failures[f"{name}, long run"] = str(error)
        rows += growth_rows(name, runs.get(name, []), given.steps)
    report("memory", rows, given, peaks=peaks, resident=runs, failures=failures)


def peak_rows(name: str, peaks: dict[str, dict[str, int]]) -> list[Row]:
    """Peak of training over the peak of evaluating, both of the whole process."""
    base = peaks.get(EVALUATION[name])
    rows = []
    for contender in (name, f"{name}, one probe at a time"):
        found = peaks.get(contender)
        ratio = found["peak"] / base["peak"] if found and base else None
        words = None if base is None else f"evaluating the batch: {base['peak'] / 1e6:,.0f} MB"
        rows.append(Row(f"{contender}: peak / evaluation", ratio, "x", words, OVER_EVALUATION))
    return rows


def tensor_rows(name: str, given: argparse.Namespace) -> list[Row]:
    """The model and what lives beside it in a step, over the same in an evaluation."""
    how = RUNS[name]
    prepared = Setup(given.model or minilm(), given.batch, given.length).prepared(how.get("scheme"))
    held = [*prepared.model.parameters(), *prepared.model.buffers()]
    model = sum(t.untyped_storage().nbytes() for t in {t.data_ptr(): t for t in held}.values())
    plain = model + peak_of(prepared.evaluate, torch.device("cpu"))
    base = f"evaluating the batch: {plain / 1e6:,.1f} MB of tensors"
    rows = []
    for words, stack, target in ((", one probe at a time", 1, TENSORS), ("", None, None)):
        peak = model + step_peak(prepared, how, stack)
        label = f"{name}{words}: tensors of a step / evaluation"
        rows.append(Row(label, peak / plain, "x", base, target))
    return rows


def step_peak(prepared: Prepared, how: dict[str, Any], stack: int | None) -> int:
    """Most bytes of tensors in a step, from the building of the space on."""
    return peak_of(
        lambda: prepared.tuner(how["method"], how["space"], stack).step(prepared.batch),
        torch.device("cpu"),
    )


def kernels() -> int:
    """What importing numba and loading its compiled noise takes, here and now."""
    from zotune.core import noise

    before = process.resident()
    noise.draw("gaussian", noise.Key(0), "block", 0, 1)
    noise.combine_(torch.zeros(1), "gaussian", [noise.Key(0)], [1.0], "block")
    return process.resident() - before


def long_run(name: str, given: argparse.Namespace) -> list[int]:
    """Resident bytes after every hundredth part of a run of `given.steps` steps."""
    from transformers import TrainerCallback

    from zotune.training import TrainConfig, train

    every = max(1, given.steps // 100)
    seen: list[int] = []

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step % every == 0:
                seen.append(process.resident())

    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            model_name_or_path=given.model or minilm(), task="tickets", output_dir=folder,
            max_steps=given.steps, per_device_train_batch_size=given.train_batch,
            max_length=given.length, max_eval_samples=16, threads=given.threads,
            report_to="none", show_progress=False, **RUNS[name],
        )  # fmt: skip
        train(config, callbacks=[Watch()])
    return seen


def apart(name: str, given: argparse.Namespace) -> list[int]:
    words = ["--measure", name]
    for key in ("threads", "length", "steps", "train_batch", "model"):
        value = getattr(given, key)
        words += [] if value is None else [f"--{key}", str(value)]
    found: list[int] = process.measured_apart("benchmarks.memory", words, timeout=7200)
    return found


def growth_rows(name: str, seen: Sequence[int], steps: int) -> list[Row]:
    """Median of the last tenth over the median of the second: the first tenth fills caches."""
    tenth = len(seen) // 10
    label = f"{name}: growth of resident memory over {steps:,} steps"
    if not tenth:
        return [Row(label, None, "%", "its own second tenth", GROWTH)]
    early, late = median(seen[tenth : 2 * tenth]), median(seen[-tenth:])
    base = f"its own second tenth: {early / 1e6:,.0f} MB"
    return [Row(label, 100 * (late / early - 1), "%", base, GROWTH)]


if __name__ == "__main__":
    main()
