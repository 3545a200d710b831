"""What the demo learns, over several seeds, beside backprop on the same batches.

    python benchmarks/learning.py

Each run goes through `zotune.training.train` with the demo's configuration (examples/demo.yaml);
the baselines replace its method and space, and see the same examples in the same order for as many
steps. Nothing is chosen by the dev split: the last state is the one that counts.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from statistics import mean, stdev
from typing import Any

if not __package__:
    sys.path.insert(0, str(Path(__file__).parents[1]))

import yaml

from benchmarks.harness import Row, begin, parser, report
from zotune.errors import BadInput
from zotune.training import Result, TrainConfig, train
from zotune.training.config import normalised

DEMO = Path(__file__).parents[1] / "examples" / "demo.yaml"
ZOTUNE = "zotune"
OF_THE_METHOD = ("learning_rate", "eps", "queries", "directions", "units", "lr_scheduler_type",
                 "warmup_steps", "weight_decay")  # fmt: skip
"""Keys of the demo that belong to its method; a baseline has its own."""

BASELINES: dict[str, dict[str, Any]] = {
    "AdamW, all weights, fp32": {"method": "adamw(lr=1e-4)", "space": "weights", "scheme": None},
    "LoRA and head, int4 base": {"method": "lora(lr=1e-3)", "space": "lora+head"},
    "AdamW, the demo's own space": {"method": "adamw(lr=1e-3)"},
}


def options(words: Sequence[str] | None = None) -> argparse.Namespace:
    assert __doc__ is not None
    flags = parser(__doc__, seeds=3, steps=0)
    flags.add_argument("--config", type=Path, default=DEMO, help="the demo, or another run")
    flags.add_argument("--only", nargs="+", choices=[ZOTUNE, *BASELINES])
    return flags.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    given = options(words)
    begin(given)
    demo = read(given.config)
    results: dict[str, list[Result]] = {}
    for name, changes in {ZOTUNE: {}, **BASELINES}.items():
        if given.only is None or name in given.only:
            results[name] = [run(demo, changes, seed, given) for seed in range(given.seeds)]
    rows = [row for name, found in results.items() for row in rows_of(name, found)]
    runs = {name: [r.as_dict() for r in found] for name, found in results.items()}
    report("learning", rows, given, demo=demo, baselines=BASELINES, runs=runs)


def read(path: Path) -> dict[str, Any]:
    """The demo's configuration under its full names."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"cannot read the configuration {path}: {error.strerror}") from error
    return normalised(values, [f.name for f in fields(TrainConfig)])


def run(
    demo: Mapping[str, Any], changes: Mapping[str, Any], seed: int, given: argparse.Namespace
) -> Result:
    """One run in a folder that is thrown away."""
    ours = {k: v for k, v in demo.items() if not (changes and k in OF_THE_METHOD)}
    fixed = {
        "seed": seed, "threads": given.threads, "eval_steps": 0, "load_best_model_at_end": False,
        "report_to": "none", "show_progress": False, "overwrite_output_dir": False,
        "callbacks": [], "resume_from_checkpoint": None,
    }  # fmt: skip
    if given.steps:
        fixed["max_steps"] = given.steps
    if given.model is not None:
        fixed["model_name_or_path"] = given.model
    with tempfile.TemporaryDirectory() as folder:
        return train(TrainConfig(**{**ours, **changes, **fixed, "output_dir": folder}))


def rows_of(name: str, results: Sequence[Result]) -> list[Row]:
    """Mean and spread over seeds, and what it took."""
    metric, split = results[0].metric, results[0].split
    after = [r.after for r in results]
    before = [r.before for r in results if r.before is not None]
    base = f"before: {mean(before):.3f}" if before else None
    count = f"{len(results)} seeds"
    rows = [Row(f"{name}: {split} {metric}, mean of {count}", mean(after), metric, base)]
    if len(after) > 1:
        rows.append(Row(f"{name}: standard deviation over {count}", stdev(after), metric))
    rows += [
        Row(f"{name}: forward passes", mean(r.forwards for r in results), "batches"),
        Row(f"{name}: training", mean(r.train_seconds for r in results), "s"),
    ]
    return rows


if __name__ == "__main__":
    main()
