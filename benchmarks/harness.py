"""Rows, interleaved timing, and the file and table that every benchmark leaves.

Contenders are timed in turn, round after round, and a ratio is taken inside each round before the
median over rounds: whatever slows the machine for a minute slows both sides of the ratio.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import machine

Work = Callable[[], object]
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Row:
    """One number.

    baseline: what the value is compared with, in words. target: the most (with `at_least`, the
    least) that the value may be, in the same unit. met: None without a target; a value that could
    not be measured is None and misses its target.

    >>> Row("a step over its two forwards", 1.2, "x", "two forwards", target=1.3).met
    True
    """

    name: str
    value: float | None
    unit: str
    baseline: str | None = None
    target: float | None = None
    met: bool | None = field(default=None, init=False)
    at_least: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        if self.target is None:
            return
        value = math.nan if self.value is None else self.value
        met = value >= self.target if self.at_least else value <= self.target
        object.__setattr__(self, "met", met)

    def as_dict(self) -> dict[str, Any]:
        """The six keys of a result file."""
        finite = self.value is not None and math.isfinite(self.value)
        row = {k: v for k, v in asdict(self).items() if k != "at_least"}
        return {**row, "value": self.value if finite else None}


@dataclass
class Rounds:
    """Seconds per call of every contender: `seconds[name][k]` was measured in round k.

    >>> rounds = Rounds({"a": [1.0, 2.0, 9.0], "b": [2.0, 4.0, 4.0]})
    >>> rounds.median("a"), rounds.ratio("a", "b")
    (2.0, 0.5)
    """

    seconds: dict[str, list[float]]

    def median(self, name: str) -> float | None:
        return median(self.seconds[name]) if self.seconds.get(name) else None

    def ratio(self, name: str, base: str) -> float | None:
        """Median over rounds of the two contenders' ratio within a round."""
        pairs = zip(self.seconds.get(name, ()), self.seconds.get(base, ()), strict=False)
        ratios = [a / b for a, b in pairs]
        return median(ratios) if ratios else None


def interleave(
    contenders: Mapping[str, Work], *, rounds: int, calls: int, warmup: int = 2
) -> Rounds:
    """Time every contender once per round, `calls` calls each; each round starts with another one.

    >>> found = interleave({"a": lambda: None, "b": lambda: None}, rounds=3, calls=2)
    >>> {name: len(values) for name, values in found.seconds.items()}
    {'a': 3, 'b': 3}
    """
    names = list(contenders)
    for name in names:
        for _ in range(warmup):
            contenders[name]()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for k in range(rounds):
        first = k % len(names)
        for name in names[first:] + names[:first]:
            work = contenders[name]
            began = time.perf_counter()
            for _ in range(calls):
                work()
            seconds[name].append((time.perf_counter() - began) / calls)
    return Rounds(seconds)


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


def report(name: str, rows: Sequence[Row], given: argparse.Namespace, **details: Any) -> Path:
    """Write `<given.out>/<name>.json`, print the same as a table, and give back the file's path."""
    settings = {k: v for k, v in vars(given).items() if k not in ("out", "measure")}
    document = {
        "benchmark": name,
        "rows": [row.as_dict() for row in rows],
        "machine": machine.machine(),
        "versions": machine.versions(),
        "commit": machine.commit(),
        "command": machine.command(),
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in settings.items()},
        "details": details,
    }
    given.out.mkdir(parents=True, exist_ok=True)
    path: Path = given.out / f"{name}.json"
    # JSON has no NaN: a run that diverged left no number.
    document = json.loads(json.dumps(document), parse_constant=lambda _: None)
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    show(name, rows, document)
    print(f"written to {path}")
    return path


def show(name: str, rows: Sequence[Row], document: Mapping[str, Any]) -> None:
    """The rows as a table, with the machine above it; a missed target says so."""
    from rich.console import Console
    from rich.table import Table

    facts = document["machine"]
    table = Table(title=f"{name}: {facts['cpu']}, {facts['threads']} threads, "
                        f"load {facts['load']}", title_justify="left")  # fmt: skip
    for heading in ("", "value", "compared with", "target", ""):
        table.add_column(heading, justify="right" if heading in ("value", "target") else "left")
    for row in rows:
        sign = "≥" if row.at_least else "≤"
        target = "" if row.target is None else f"{sign} {number(row.target)} {row.unit}"
        verdict = {None: "", True: "[green]met[/]", False: "[bold red]MISSED[/]"}[row.met]
        value = "not measured" if row.value is None else f"{number(row.value)} {row.unit}"
        table.add_row(row.name, value, row.baseline or "", target, verdict)
    Console(width=max(100, Console().width)).print(table)


def number(value: float) -> str:
    """Three significant digits, without an exponent where that reads better.

    >>> number(0.12345), number(1234.5), number(1.5e-7)
    ('0.123', '1,234', '1.5e-07')
    """
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
