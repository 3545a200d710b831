"""What `zotune list` knows, read from the registries."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

Rows = list[dict[str, Any]]


def methods() -> Rows:
    from zotune.methods import entries

    return [
        {
            "name": e.name,
            "year": e.year,
            "paper": f"{e.paper} (arXiv {e.arxiv})" if e.arxiv else e.paper,
            "forwards": e.factory().forwards,
            "memory": e.memory,
            "spaces": list(e.spaces),
        }
        for e in entries().values()
    ]


def spaces() -> Rows:
    from zotune.core.spaces import SPACES

    return [
        {
            "name": name,
            "tunes": (inspect.getdoc(kind) or "").split("\n")[0],
            "options": list(kind.__dataclass_fields__),
        }
        for name, kind in SPACES.items()
    ]


def tasks() -> Rows:
    from zotune.tasks import entry, names

    return [
        {"name": name, "summary": entry(name).summary, "options": list(entry(name).options)}
        for name in names()
    ]


def formats() -> Rows:
    from zotune.quant.export import exporters
    from zotune.quant.formats import formats as known

    written = exporters()
    return [
        {
            "name": name,
            "summary": (inspect.getdoc(format) or "").split("\n")[0],
            "tunable": list(format.tunable),
            "written": written[name].schemes if name in written else "",
        }
        for name, format in known().items()
    ]


LISTS: dict[str, Callable[[], Rows]] = {
    "methods": methods,
    "spaces": spaces,
    "tasks": tasks,
    "formats": formats,
}
