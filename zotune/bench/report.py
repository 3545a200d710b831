"""The file and the table that every benchmark leaves."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zotune.bench import machine
from zotune.bench.rows import Row, number

HOME = Path(__file__).parents[2] / "benchmarks" / "results"


def folder_of(out: str | None) -> Path:
    """Where results go: as asked, else a checkout's own folder of results, else ./zotune-bench."""
    if out is not None:
        return Path(out).expanduser()
    return HOME if (HOME / "schema.json").exists() else Path("zotune-bench")


def document(
    name: str, rows: Sequence[Row], settings: Mapping[str, Any], details: Mapping[str, Any]
) -> dict[str, Any]:
    """All that a result file holds: rows, and what they were measured on, with and from."""
    made = {
        "benchmark": name,
        "rows": [row.as_dict() for row in rows],
        "machine": machine.machine(),
        "versions": machine.versions(),
        "commit": machine.commit(),
        "command": machine.command(),
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in settings.items()},
        "details": dict(details),
    }
    # JSON has no NaN: a run that diverged left no number.
    found: dict[str, Any] = json.loads(json.dumps(made), parse_constant=lambda _: None)
    return found


def write(made: Mapping[str, Any], folder: Path) -> Path:
    """Write `<folder>/<benchmark>.json`, whole or not at all; its path."""
    from zotune.training.snapshots import write_atomic

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{made['benchmark']}.json"
    write_atomic(path, (json.dumps(made, indent=2) + "\n").encode())
    return path


def show(made: Mapping[str, Any]) -> None:
    """The rows as a table, with the machine above it; a missed target says so."""
    from rich.console import Console
    from rich.table import Table

    facts = made["machine"]
    title = f"{made['benchmark']}: {facts['cpu']}, {facts['threads']} threads, load {facts['load']}"
    table = Table(title=title, title_justify="left")
    for heading in ("", "value", "compared with", "target", ""):
        table.add_column(heading, justify="right" if heading in ("value", "target") else "left")
    for row in made["rows"]:
        sign = "≥" if row.get("at_least") else "≤"
        target = "" if row["target"] is None else f"{sign} {number(row['target'])} {row['unit']}"
        verdict = {None: "", True: "[green]met[/]", False: "[bold red]MISSED[/]"}[row["met"]]
        value = row["value"]
        text = "not measured" if value is None else f"{number(value)} {row['unit']}"
        table.add_row(row["name"], text, row["baseline"] or "", target, verdict)
    Console(width=max(100, Console().width)).print(table)


def save(figure: Any, path: Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    from zotune.training.snapshots import write_atomic

    data = io.BytesIO()
    figure.savefig(data, dpi=120, format="png")
    write_atomic(path, data.getvalue())
