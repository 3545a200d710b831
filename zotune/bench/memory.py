"""`zotune bench memory`: training against evaluating the same batch, and over thousands of steps.

Every contender is measured in a process of its own. The compiled kernels of the noise are in a
training's peak; they are there once per process, however large the model is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import torch

from zotune.bench import plot, process
from zotune.bench.apart import Peaks, found_apart
from zotune.bench.contenders import ONE_BY_ONE, Contender, all_contenders, left_out
from zotune.bench.models import LLAMAS, weights_of
from zotune.bench.rows import Row
from zotune.bench.settings import BenchConfig
from zotune.errors import BadInput

SAME_MICRO_BATCH, STACKED = 1.03, 1.15
"""Peak of training over that of evaluating: one probe at a time runs the very micro-batch that
evaluating does, all probes of a step side by side run a larger one."""
GROWTH = 2.0  # per cent


def measure(config: BenchConfig) -> tuple[list[Row], dict[str, Any]]:
    """Rows and what they were computed from."""
    if config.steps and config.model_name_or_path in LLAMAS:
        raise BadInput("steps follows runs that train an encoder on tickets; give --model minilm")
    chosen = all_contenders(config)
    weights = weights_of(config.model_name_or_path)
    missing = {n: why for n, c in chosen.items() if (why := left_out(c, weights)) is not None}
    peaks, failures = found_apart([n for n in chosen if n not in missing], config)
    rows = [
        *ratio_rows(chosen, peaks, failures),
        Row("compiled kernels of the noise, once per process", kernels() / 1e6, "MB"),
        *peak_rows(peaks),
    ]
    runs: dict[str, list[int]] = {}
    if config.steps:
        followed = [n for n, c in chosen.items() if c.method and ONE_BY_ONE not in n]
        runs, lost = found_apart(followed, config, "long run")
        failures |= {f"{name}, long run": why for name, why in lost.items()}
        rows += [growth_row(name, runs.get(name, ()), config.steps) for name in followed]
    details = {"memory": peaks, "resident": runs, "failures": failures, "left_out": missing,
               "roles": {n: c.role for n, c in chosen.items()}}  # fmt: skip
    return rows, details


def ratio_rows(
    chosen: Mapping[str, Contender], peaks: Peaks, failures: Mapping[str, str]
) -> list[Row]:
    """Peak of training over the peak of evaluating the batch, both of the whole process."""
    measured = {*peaks, *failures}
    rows = []
    for name, contender in chosen.items():
        floor = contender.floor
        if floor is None or not {name, floor} <= measured:
            continue
        base, found = peaks.get(floor), peaks.get(name)
        ratio = found["peak"] / base["peak"] if found and base else None
        words = floor if base is None else f"{floor}: {base['peak'] / 1e6:,.0f} MB"
        most = SAME_MICRO_BATCH if ONE_BY_ONE in name else STACKED
        rows.append(Row(f"{name}: peak memory / evaluating", ratio, "x", words, most))
    return rows


def peak_rows(peaks: Peaks) -> list[Row]:
    """Peak over the loaded model (what training adds), and of the whole process."""
    added = {n: found["peak"] - found["model_loaded"] for n, found in peaks.items()}
    rows = [
        Row(f"{n}, peak over the loaded model", value / 1e6, "MB") for n, value in added.items()
    ]
    return rows + [Row(f"{n}, peak", found["peak"] / 1e6, "MB") for n, found in peaks.items()]


def kernels() -> int:
    """Bytes that importing numba and loading its compiled noise takes, here and now."""
    from zotune.core import noise

    before = process.resident()
    noise.draw("gaussian", noise.Key(0), "block", 0, 1)
    noise.combine_(torch.zeros(1), "gaussian", [noise.Key(0)], [1.0], "block")
    return process.resident() - before


def growth_row(name: str, seen: Sequence[int], steps: int) -> Row:
    """Median of the last tenth over the median of the second: the first tenth fills caches."""
    tenth = len(seen) // 10
    label = f"{name}: growth of resident memory over {steps:,} steps"
    if not tenth:
        return Row(label, None, "%", "its own second tenth", GROWTH)
    early, late = median(seen[tenth : 2 * tenth]), median(seen[-tenth:])
    base = f"its own second tenth: {early / 1e6:,.0f} MB"
    return Row(label, 100 * (late / early - 1), "%", base, GROWTH)


def draw(made: Mapping[str, Any]) -> Any:
    """Bars of peaks: the model as loaded, and what comes on top of it."""
    return plot.memory(made)
