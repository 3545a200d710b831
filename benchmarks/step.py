"""Seconds and memory of a training step on MiniLM, 16 x 48 tokens.

    python benchmarks/step.py

Contenders: zotune's mezo (fp32), qzo (int4 scales) and zoqo (int8 codes and activations); MeZO's
step as released, restated in plain torch; AdamW and LoRA by backprop; twice the plain forward.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if not __package__:
    sys.path.insert(0, str(Path(__file__).parents[1]))


from benchmarks import process
from benchmarks.contenders import CONTENDERS, FORWARDS, STEPS, Setup, minilm
from benchmarks.harness import Rounds, Row, begin, interleave, parser, report

MEZO = "MeZO restated"
FORWARDS_OF = {"mezo fp32": "fp32", "qzo int4": "int4", "zoqo int8": "int8"}
OVER_MEZO = {"mezo fp32": 0.6, "qzo int4": 0.25, "zoqo int8": 0.25}
OVER_FORWARDS = 1.3


def options(words: Sequence[str] | None = None) -> argparse.Namespace:
    assert __doc__ is not None
    flags = parser(__doc__, batch=16, length=48, rounds=7, calls=3, warmup=2, memory_steps=8)
    flags.add_argument("--only", nargs="+", choices=[*STEPS, *FORWARDS], help="these alone")
    flags.add_argument("--measure", choices=list(CONTENDERS), help="memory of one, as JSON")
    return flags.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    given = options(words)
    begin(given)
    setup = Setup(given.model or minilm(), given.batch, given.length)
    if given.measure:
        print(json.dumps(memory(given.measure, setup, given.memory_steps)))
        return
    names = [n for n in {**STEPS, **FORWARDS} if given.only is None or n in given.only]
    peaks, failures = peaks_of(names if given.memory_steps else (), given)
    works = {name: CONTENDERS[name].work(setup) for name in names}
    rounds = interleave(works, rounds=given.rounds, calls=given.calls, warmup=given.warmup)
    rows = [*seconds_rows(names, rounds), *ratio_rows(names, rounds), *memory_rows(peaks)]
    report(
        "step", rows, given,
        seconds_per_round=rounds.seconds, memory=peaks, failures=failures,
    )  # fmt: skip


def memory(name: str, setup: Setup, steps: int) -> dict[str, int]:
    """Peak resident memory of a few steps in this process, which has done nothing else."""
    empty = process.resident()
    prepared = setup.prepared(CONTENDERS[name].scheme)
    loaded = process.resident()
    process.reset_peak()
    work = CONTENDERS[name].start(prepared)
    for _ in range(steps):
        work()
    return {"before_model": empty, "model_loaded": loaded, "peak": process.peak()}


def peaks_of(
    names: Sequence[str], given: argparse.Namespace
) -> tuple[dict[str, dict[str, int]], dict[str, str]]:
    """Memory of each contender from a process of its own, and what went wrong with the others."""
    shared: list[str] = []
    for key in ("threads", "batch", "length", "memory_steps", "model"):
        value: Any = getattr(given, key)
        shared += [] if value is None else [f"--{key}", str(value)]
    found, failures = {}, {}
    for name in names:
        try:
            words = ["--measure", name, *shared]
            found[name] = process.measured_apart("benchmarks.step", words, timeout=1800)
        except RuntimeError as error:
            failures[name] = str(error)
    return found, failures


def seconds_rows(names: Sequence[str], rounds: Rounds) -> list[Row]:
    return [Row(f"{name}, seconds", rounds.median(name), "s") for name in names]


def ratio_rows(names: Sequence[str], rounds: Rounds) -> list[Row]:
    """zotune's steps over the restated MeZO step and over two forwards of the same model."""
    rows = []
    for name, most in OVER_MEZO.items():
        if {name, MEZO} <= set(names):
            rows.append(Row(f"{name} / MeZO", rounds.ratio(name, MEZO), "x", MEZO, most))
    for name, kind in FORWARDS_OF.items():
        base = f"two forwards {kind}"
        if {name, base} <= set(names):
            rows.append(
                Row(f"{name} / forwards", rounds.ratio(name, base), "x", base, OVER_FORWARDS)
            )
    return rows


def memory_rows(peaks: Mapping[str, Mapping[str, int]]) -> list[Row]:
    """Peak over the loaded model (what training adds), and of the whole process."""
    rows = []
    for name, found in peaks.items():
        added = (found["peak"] - found["model_loaded"]) / 1e6
        rows.append(Row(f"{name}, peak over the loaded model", added, "MB"))
    return rows + [Row(f"{name}, peak", found["peak"] / 1e6, "MB") for name, found in peaks.items()]


if __name__ == "__main__":
    main()
