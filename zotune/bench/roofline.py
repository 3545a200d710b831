"""`zotune bench roofline`: how near the machine's peaks a step comes, and where its time goes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zotune.bench import growth, peaks, plot, where
from zotune.bench.contenders import ONE_BY_ONE, Contender, Models, all_contenders, left_out
from zotune.bench.models import shape_of, weights_of
from zotune.bench.products import operations, seconds_at
from zotune.bench.rows import Row, number
from zotune.bench.settings import BenchConfig
from zotune.bench.timing import interleave
from zotune.bench.workload import Prepared, Workload

STRAIGHT = 5.0
"""Per cent: how far, rms, the cost may lie from a line in tokens or layers."""


def measure(config: BenchConfig) -> tuple[list[Row], dict[str, Any]]:
    """Rows and what they were computed from."""
    chosen = {n: c for n, c in all_contenders(config).items()
              if c.role == "ours" and ONE_BY_ONE not in n}  # fmt: skip
    weights = weights_of(config.model_name_or_path)
    missing = {n: why for n, c in chosen.items() if (why := left_out(c, weights)) is not None}
    rates = peaks.measure()
    found: dict[str, dict[str, Any]] = {}
    rows = peaks.rows(rates)
    models = Models(Workload.of(config))
    for name, contender in chosen.items():
        if name not in missing:
            found[name] = one(contender, models.prepared(contender), rates, config)
            rows += rows_of(name, found[name])
    return rows, {
        "peaks": rates,
        "contenders": found,
        "left_out": missing,
        "kernels": models.kernels,
    }


def one(
    contender: Contender, prepared: Prepared, rates: Mapping[str, float], config: BenchConfig
) -> dict[str, Any]:
    """Everything about one contender."""
    shape = shape_of(config.model_name_or_path)
    times: dict[str, int] = {
        "rounds": config.rounds or shape.rounds, "calls": config.calls or shape.calls,
        "warmup": config.warmup,
    }  # fmt: skip
    work = contender.start(prepared)
    rounds = interleave({"forward": prepared.evaluate, "step": work}, **times)
    count = operations(prepared.model, prepared.evaluate)
    # Peaks are the best of several runs, and so are these.
    forward, step = min(rounds.seconds["forward"]), min(rounds.seconds["step"])
    return {
        "operations": count,
        "forward_seconds": forward,
        "step_seconds": step,
        "forward_share": seconds_at(rates, count) / forward,
        "step_share": 2 * seconds_at(rates, count) / step,
        "where": where.shares(work, times["calls"]),
        "growth": growth.curves(contender, prepared, **times),
    }


def rows_of(name: str, found: Mapping[str, Any]) -> list[Row]:
    """Shares of the peaks, shares of the time, and the straightness of the growth."""
    total = sum(found["operations"].values())
    kinds = ", ".join(f"{k} {number(v / 1e9)}" for k, v in found["operations"].items())
    rate = total / found["forward_seconds"] / 1e12
    rows = [
        Row(f"{name}: a forward's products", rate, "TFLOP/s", f"GFLOP: {kinds}"),
        Row(f"{name}: a forward", 100 * found["forward_share"], "%", "its products at the peaks"),
        Row(f"{name}: a step", 100 * found["step_share"], "%", "two forwards' at the peaks"),
    ]
    rows += [Row(f"{name}: time in {part}", 100 * share, "%", "the step")
             for part, share in found["where"].items()]  # fmt: skip
    for axis, curve in found["growth"].items():
        words = f"a line: {number(curve['start'])} s + {number(curve['slope'])} s each"
        rows.append(
            Row(f"{name}: growth with {axis}, off", 100 * curve["residual"], "%", words, STRAIGHT)
        )
    return rows


def draw(made: Mapping[str, Any]) -> Any:
    """Shares of the peaks, where the time goes, and the growth with its lines."""
    return plot.roofline(made)
