"""Peak memory of contenders, each in a process of its own.

python -m zotune.bench.apart '{"model_name_or_path": "minilm"}' 'qzo int4'     # one, as JSON
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from typing import Any

from zotune.bench import process
from zotune.bench.settings import BenchConfig

TIMEOUT = 7200.0  # seconds for one contender
Peaks = dict[str, dict[str, int]]


def found_apart(
    names: Iterable[str], config: BenchConfig, what: str = "peak"
) -> tuple[dict[str, Any], dict[str, str]]:
    """What `WORKS[what]` measures of each contender, and what went wrong with the others."""
    found: dict[str, Any] = {}
    failures: dict[str, str] = {}
    settings = json.dumps({**config.as_dict(), "only": ""})
    for name in names:
        try:
            words = [what, settings, name]
            found[name] = process.measured_apart("zotune.bench.apart", words, TIMEOUT)
        except RuntimeError as error:
            failures[name] = str(error)
    return found, failures


def peak(config: BenchConfig, name: str) -> dict[str, int]:
    """Memory of a few steps in this process, which has done nothing else.

    before_model, model_loaded: resident bytes then; peak: the most while it was run.
    """
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


def long_run(config: BenchConfig, name: str) -> list[int]:
    """Resident bytes after every hundredth part of a run of `config.steps` steps of `zotune train`,
    with its journal, metrics and snapshots, on batches of changing length."""
    import tempfile

    from transformers import TrainerCallback

    from zotune.bench.contenders import all_contenders
    from zotune.bench.models import folder_of
    from zotune.training import TrainConfig, train

    contender = all_contenders(config)[name]
    assert contender.method is not None
    every = max(1, config.steps // 100)
    seen: list[int] = []

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step % every == 0:
                seen.append(process.resident())

    with tempfile.TemporaryDirectory() as folder:
        run = TrainConfig(
            model_name_or_path=folder_of(config.model_name_or_path), task="tickets",
            output_dir=folder, method=contender.method, space=contender.space,
            scheme=contender.scheme, dtype=contender.dtype, max_steps=config.steps,
            per_device_train_batch_size=2, max_length=config.length or 48, max_eval_samples=16,
            threads=config.threads, report_to="none", show_progress=False,
        )  # fmt: skip
        train(run, callbacks=[Watch()])
    return seen


WORKS: dict[str, Callable[[BenchConfig, str], Any]] = {"peak": peak, "long run": long_run}


def main(words: list[str]) -> None:
    from zotune.bench.run import prepare

    what, settings, name = words
    config = BenchConfig(**json.loads(settings))
    with prepare(config):
        print(json.dumps(WORKS[what](config, name)))


if __name__ == "__main__":
    main(sys.argv[1:])
