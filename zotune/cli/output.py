"""What a person sees on standard output."""

from __future__ import annotations

from typing import Any


def show(command: str, found: dict[str, Any]) -> None:
    """Print a command's result for people."""
    {"list": _list, "doctor": _doctor, "bench": _bench}.get(command, _pairs)(found)


def _pairs(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    if "examples" in found and isinstance(found["examples"], list):
        print("\n\n".join(found["examples"]))
        return
    table = Table(show_header=False, box=None)
    for key, value in found.items():
        if value is not None and not isinstance(value, dict):
            table.add_row(key, f"{value:.6g}" if isinstance(value, float) else str(value))
    Console().print(table)


def _bench(found: dict[str, Any]) -> None:
    from zotune.bench.report import show as table

    table(found)
    for name, reason in found["details"].get("left_out", {}).items():
        print(f"left out: {name}: {reason}")
    for name, reason in found["details"].get("failures", {}).items():
        print(f"failed: {name}: {reason}")
    for model, kinds in found["details"].get("kernels", {}).items():
        for layer, name in kinds.items() if found["settings"]["verbose"] else ():
            print(f"kernel: {model}: {layer} on {name}")
    print(f"written to {found['written']} and {found['plot']}")


def _list(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    rows = found[found["what"]]
    table = Table(*rows[0], box=None, pad_edge=False)
    for row in rows:
        cells = (", ".join(v) if isinstance(v, list) else str(v) for v in row.values())
        table.add_row(*cells)
    Console().print(table)


def _doctor(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None)
    for group, values in found.items():
        if isinstance(values, dict):
            for key, value in values.items():
                table.add_row(group, key, str(value))
    console = Console()
    console.print(table)
    for problem in found["problems"] or ["no problems found"]:
        console.print(problem)
