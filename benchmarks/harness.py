"""What the scripts of this folder share: flags, and the file and table that each leaves.

Rows, interleaved timing and the report itself are those of `zotune.bench`.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zotune.bench import process
from zotune.bench import report as reports
from zotune.bench.rows import Row
from zotune.bench.timing import Rounds, Work, interleave

__all__ = [
    "Rounds", "Row", "Work", "begin", "earlier", "interleave", "measured_apart", "parser", "report",
]  # fmt: skip

RESULTS = Path(__file__).parent / "results"


def parser(description: str, **defaults: int) -> argparse.ArgumentParser:
    """Flags that all benchmarks share, then one integer flag per default."""
    flags = argparse.ArgumentParser(description=description.split("\n")[0])
    flags.add_argument("--out", type=Path, default=RESULTS, help="folder of the result files")
    flags.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads")
    flags.add_argument("--model", default=None, help="folder of an encoder; MiniLM when left out")
    for name, value in defaults.items():
        flags.add_argument(f"--{name}", type=int, default=value, help=f"{value} when left out")
    return flags


def begin(given: argparse.Namespace) -> None:
    """Threads as asked for; of the log only errors, because texts are cut to length on purpose."""
    import torch

    torch.set_num_threads(given.threads)
    logging.getLogger("zotune").setLevel(logging.ERROR)


def earlier(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """What an earlier run with the same settings left of each contender in its file's details, for
    a run of some contenders (`--only`) to keep beside its own."""
    path = given.out / f"{name}.json"
    if not path.exists():
        return {}
    document = json.loads(path.read_text(encoding="utf-8"))
    settings, free = document["settings"], ("only", "threads", "out", "measure")
    if any(str(settings.get(k)) != str(v) for k, v in vars(given).items() if k not in free):
        return {}
    made = {"commit": document["commit"], "command": document["command"]}
    return {k: {**made, **entry} for k, entry in document["details"]["contenders"].items()}


def measured_apart(module: str, words: Sequence[str], timeout: float) -> Any:
    """What a script of this folder prints as JSON in a process of its own."""
    return process.measured_apart(module, words, timeout, Path(__file__).parents[1])


def report(name: str, rows: Sequence[Row], given: argparse.Namespace, **details: Any) -> Path:
    """Write `<given.out>/<name>.json`, print the same as a table, and give back the file's path."""
    settings = {k: v for k, v in vars(given).items() if k not in ("out", "measure")}
    made = reports.document(name, rows, settings, details)
    path = reports.write(made, given.out)
    reports.show(made)
    print(f"written to {path}")
    return path
