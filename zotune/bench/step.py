"""`zotune bench step`: seconds and memory of a training step, ours beside its floor and its peers.

A ratio is taken within a round of one run. Each target says what it is a target of.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zotune.bench import contenders as names
from zotune.bench import memory, peaks, plot
from zotune.bench.apart import found_apart
from zotune.bench.contenders import ONE_BY_ONE, Contender, Models, all_contenders, left_out
from zotune.bench.models import shape_of, weights_of
from zotune.bench.rows import Row
from zotune.bench.settings import BenchConfig
from zotune.bench.timing import Rounds, Work, interleave
from zotune.bench.workload import Workload
from zotune.errors import BadInput

OVER_FORWARDS, OVER_FORWARDS_DENSE = 1.05, 1.3
PEERS: dict[str, dict[str, float | None]] = {
    names.MEZO: {"mezo fp32": 2.0, "mezo bf16": None, "int4": 6.0, "int4a8": 6.0, "int8": 10.0},
    names.LORA: {"int4": None, "int4a8": None, "int8": 6.0},
    names.QZO_PEER: {"int4": None},
    names.QLORA: {"int4": None},
    names.ADAMW: {"mezo fp32": None, "mezo bf16": None},
}
"""Which of ours a peer is compared with, by name or by arithmetic, and how much longer it shall
take at least."""


def measure(config: BenchConfig) -> tuple[list[Row], dict[str, Any]]:
    """Rows and what they were computed from."""
    chosen = all_contenders(config)
    rates = peaks.measure()
    timed = {n: c for n, c in chosen.items() if ONE_BY_ONE not in n}
    models = Models(Workload.of(config))
    works, missing = started(timed, models)
    shape = shape_of(config.model_name_or_path)
    rounds = interleave(
        works, rounds=config.rounds or shape.rounds, calls=config.calls or shape.calls,
        warmup=config.warmup,
    )  # fmt: skip
    running = models.kernels
    models.held.clear()
    works.clear()  # their models would count among what the processes below may take
    measured = [n for n in chosen if n.removesuffix(ONE_BY_ONE) not in missing]
    found, failures = found_apart(measured if config.memory_steps else (), config)
    rows = [
        *peaks.rows(rates), *seconds_rows(rounds), *ratio_rows(timed, rounds),
        *memory.ratio_rows(chosen, found, failures), *memory.peak_rows(found),
    ]  # fmt: skip
    details = {
        "seconds_per_round": rounds.seconds, "peaks": rates, "memory": found,
        "failures": failures, "left_out": missing, "kernels": running,
        "roles": {n: c.role for n, c in timed.items()}, "floors": floors(timed),
    }  # fmt: skip
    return rows, details


def started(
    chosen: Mapping[str, Contender], models: Models
) -> tuple[dict[str, Work], dict[str, str]]:
    """Contenders ready to be stepped, and why the others are not among them."""
    weights = weights_of(models.workload.model)
    works: dict[str, Work] = {}
    missing: dict[str, str] = {}
    for name, contender in chosen.items():
        reason = left_out(contender, weights)
        if reason is None:
            try:
                works[name] = models.work(contender)
            except BadInput as error:
                reason = str(error)
        if reason is not None:
            missing[name] = reason
    if not works:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in missing.items())
        raise BadInput(f"no contender can be run: {reasons}")
    return works, missing


def floors(chosen: Mapping[str, Contender]) -> dict[str, str]:
    return {n: c.floor for n, c in chosen.items() if c.floor is not None}


def seconds_rows(rounds: Rounds) -> list[Row]:
    return [Row(f"{name}, seconds", rounds.median(name), "s") for name in rounds.seconds]


def ratio_rows(chosen: Mapping[str, Contender], rounds: Rounds) -> list[Row]:
    """Ours over its own two forwards, then peers over ours, as far as both were timed."""
    here = {n: c for n, c in chosen.items() if n in rounds.seconds}
    ours = [c for c in here.values() if c.role == "ours"]
    rows = []
    for c in ours:
        if c.floor in here:
            most = OVER_FORWARDS if c.scheme else OVER_FORWARDS_DENSE
            ratio = rounds.ratio(c.name, c.floor)
            rows.append(Row(f"{c.name} / two forwards", ratio, "x", c.floor, most))
    for peer, targets in PEERS.items():
        for c in ours if peer in here else ():
            kind = next((k for k in (c.name, c.name.split()[1]) if k in targets), None)
            if kind is not None:
                ratio = rounds.ratio(peer, c.name)
                rows.append(
                    Row(f"{peer} / {c.name}", ratio, "x", c.name, targets[kind], at_least=True)
                )
    return rows


def draw(made: Mapping[str, Any]) -> Any:
    """Bars of seconds, ours, floor and peers in colours of their own."""
    return plot.seconds(made)
