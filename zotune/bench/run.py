"""One benchmark from its settings to its table, file and plot."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from zotune.bench import report
from zotune.bench.models import LLAMAS
from zotune.bench.settings import BenchConfig
from zotune.quant.running import forced_kernel
from zotune.training.folders import use_threads

BENCHES = {
    "step": "zotune.bench.step",
    "noise": "zotune.bench.noise",
    "memory": "zotune.bench.memory",
    "roofline": "zotune.bench.roofline",
}
"""Each module has measure(config) -> (rows, details) and draw(document) -> a figure."""


def run(what: str, config: BenchConfig) -> dict[str, Any]:
    """Measure, write `<out>/<what>.json` and `.png`, or `<what>-<model>` of a random Llama; the
    document, and where the two lie."""
    bench: Any = import_module(BENCHES[what])
    with prepare(config):
        rows, details = bench.measure(config)
        model = config.model_name_or_path
        name = f"{what}-{model}" if model in LLAMAS else what
        made = report.document(name, rows, config.as_dict(), details)
    path = report.write(made, report.folder_of(config.output_dir))
    picture = path.with_suffix(".png")
    report.save(bench.draw(made), picture)
    return {**made, "written": str(path), "plot": str(picture)}


@contextmanager
def prepare(config: BenchConfig) -> Iterator[None]:
    """Threads and kernel as asked for; of the log only errors, because texts are cut to length on
    purpose."""
    log = logging.getLogger("zotune")
    level = log.level
    log.setLevel(logging.ERROR)
    use_threads(config.threads)
    try:
        with forced_kernel(config.kernel):
            yield
    finally:
        log.setLevel(level)
