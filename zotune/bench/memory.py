"""Peak memory of contenders, each in a process of its own.

python -m zotune.bench.memory '{"model_name_or_path": "minilm"}' 'qzo int4'     # one, as JSON
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from zotune.bench import process
from zotune.bench.rows import Row
from zotune.bench.settings import BenchConfig

TIMEOUT = 1800.0  # seconds for one contender
Peaks = dict[str, dict[str, int]]


def peaks_of(names: Iterable[str], config: BenchConfig) -> tuple[Peaks, dict[str, str]]:
    """Memory of each contender, and what went wrong with the others.

    before_model, model_loaded: resident bytes then; peak: the most while it was run.
    """
    found: Peaks = {}
    failures: dict[str, str] = {}
    settings = json.dumps({**config.as_dict(), "only": ""})
    for name in names:
        try:
            words = [settings, name]
            found[name] = process.measured_apart("zotune.bench.memory", words, TIMEOUT)
        except RuntimeError as error:
            failures[name] = str(error)
    return found, failures


def measure(config: BenchConfig, name: str) -> dict[str, int]:
    """Peak resident memory of a few steps in this process, which has done nothing else."""
    from zotune.bench.contenders import all_contenders
    from zotune.bench.workload import Workload
    from zotune.training.memory import peak_bytes, reset_peak

    contender = all_contenders(config)[name]
    empty = process.resident()
    prepared = Workload.of(config).prepared(contender.scheme, contender.dtype)
    loaded = process.resident()
    reset_peak("cpu")
    work = contender.start(prepared)
    for _ in range(max(1, config.memory_steps)):
        work()
    return {"before_model": empty, "model_loaded": loaded, "peak": peak_bytes()}


def rows(peaks: Mapping[str, Mapping[str, int]]) -> list[Row]:
    """Peak over the loaded model (what training adds), and of the whole process."""
    added = [
        Row(f"{name}, peak over the loaded model",
            (found["peak"] - found["model_loaded"]) / 1e6, "MB")
        for name, found in peaks.items()
    ]  # fmt: skip
    return added + [Row(f"{n}, peak", found["peak"] / 1e6, "MB") for n, found in peaks.items()]


def ratio_row(name: str, floor: str, peaks: Mapping[str, Any], most: float) -> Row:
    """Peak of training over the peak of evaluating the batch, both of the whole process."""
    base, found = peaks.get(floor), peaks.get(name)
    ratio = found["peak"] / base["peak"] if found and base else None
    words = floor if base is None else f"{floor}: {base['peak'] / 1e6:,.0f} MB"
    return Row(f"{name}: peak memory / evaluating", ratio, "x", words, most)


def main(words: list[str]) -> None:
    from zotune.bench.run import prepare

    settings, name = words
    config = BenchConfig(**json.loads(settings))
    with prepare(config):
        print(json.dumps(measure(config, name)))


if __name__ == "__main__":
    logging.getLogger("zotune").setLevel(logging.ERROR)
    main(sys.argv[1:])
