"""What do frozen layers with cached features save, and what do they cost in accuracy?

    python benchmarks/freezing.py                # all parts
    python benchmarks/freezing.py --only step    # or: text, images

step: seconds of a training step on MiniLM with two thirds of its layers frozen, with their features
from a cache and without. text: TREC-6 on int4 MiniLM, the same run on features as they are and on
compressed ones: bytes and accuracy. images: ResNet-20 adapted to lossy CIFAR-10 by backprop, with
and without a cache, with augmented channels cached where they must be, nowhere, and not augmented.
Rows are written as they come.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

if not __package__:
    sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import resnet20
from benchmarks.contenders import minilm
from benchmarks.harness import Row, begin, interleave, parser, report
from zotune.training import TrainConfig, train
from zotune.training.assemble import assemble

SHARE = "0.67"
UPPER = r"layer\.[45]\."
TEXT = {
    "scheme": "int4-g64", "task": "trec", "report_to": "none", "save_steps": 0,
    "show_progress": False,
}  # fmt: skip
BASES = {"whole": "a step with nothing frozen", "frozen": "a step that runs the frozen layers"}
STEP_TARGET, BYTES_TARGET, ACCURACY_TARGET, COMPUTE_TARGET = 0.45, 0.30, 0.5, 0.70


def options(words: Sequence[str] | None = None) -> argparse.Namespace:
    assert __doc__ is not None
    flags = parser(
        __doc__, rounds=7, calls=3, warmup=1, seeds=3, text_steps=500, train_size=1500,
        images=1000, test_images=1500, epochs=10,
    )  # fmt: skip
    flags.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    return flags.parse_args(words)


class Rows:
    """The rows so far, written after each."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given, self.rows, self.details = given, list[Row](), dict[str, Any]()

    def add(self, *rows: Row, **details: Any) -> None:
        self.rows += rows
        self.details.update(details)
        report("freezing", self.rows, self.given, **self.details)


def main(words: Sequence[str] | None = None) -> None:
    given = options(words)
    begin(given)
    rows = Rows(given)
    for name in given.only:
        PARTS[name](given, rows)


def step(given: argparse.Namespace, rows: Rows) -> None:
    """Contenders share batch, task and model; `whole` is the run that freezing replaces."""
    with tempfile.TemporaryDirectory() as folder:
        for method, space in (("mezo", "adapter"), ("adamw", "adapter")):
            works = {
                name: stepper(given, Path(folder) / method / name, method, space, frozen, cache)
                for name, frozen, cache in (
                    ("whole", False, None), ("frozen", True, None), ("cached", True, "lossless"),
                    ("cached zfp", True, "zfp(tolerance=2.0)"),
                )
            }  # fmt: skip
            found = interleave(works, rounds=given.rounds, calls=given.calls, warmup=given.warmup)
            made = [Row(f"{method}: {n} step", found.median(n), "s") for n in works]
            for name in ("cached", "cached zfp"):
                for base, words in (("whole", "the same step with nothing frozen"),
                                    ("frozen", "the same frozen layers run each step")):  # fmt: skip
                    ratio = found.ratio(name, base)
                    made.append(
                        Row(f"{method}: {name} over {base}", ratio, "x", words, STEP_TARGET)
                    )
            rows.add(*made, **{f"seconds {method}": found.seconds})


def stepper(
    given: argparse.Namespace,
    folder: Path,
    method: str,
    space: str,
    frozen: bool,
    cache: str | None,
) -> Any:
    """One training step after another, on batches of 16 x up to 48 tokens of tickets."""
    targets = f"(rank=1, targets='{UPPER}')" if frozen else "(rank=1)"
    config = TrainConfig(
        model_name_or_path=given.model or minilm(), scheme="int4-g64", task="tickets",
        output_dir=str(folder / "run"), method=method, space=f"{space}{targets} + head",
        max_steps=10_000, max_length=48, show_progress=False,
        freeze=f"{SHARE}@0" if frozen else None, cache_codec=cache,
        cache_dir=None if cache is None else str(folder / "cache"),
    )  # fmt: skip
    bench = assemble(config)
    batches: Any = bench.batches
    if bench.freezing is not None:
        depth = bench.freezing.due(0)
        assert depth is not None
        bench.freezing.freeze_(depth)
        batches = bench.freezing.cache_() or batches

    def work() -> None:
        bench.tuner.step(batches[bench.tuner.done % 8])

    return work


def text(given: argparse.Namespace, rows: Rows) -> None:
    """The same seeds with features as they are and compressed; bytes of fp16 as the yardstick."""
    codecs = {"lossless": "lossless", "zfp(tolerance=0.5)": "zfp(tolerance=0.5)",
              "zfp(tolerance=2)": "zfp(tolerance=2.0)"}  # fmt: skip
    scores: dict[str, list[float]] = {name: [] for name in codecs}
    sizes = dict[str, float]()
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(given.seeds):
            for name, codec in codecs.items():
                place = Path(folder) / f"{seed}-{name}"
                score, size = text_run(given, place, codec, seed)
                scores[name].append(100 * score)
                sizes[name] = size
                rows.add(scores=scores, cached_bytes=sizes)
    fp16 = sizes["lossless"] / 2  # float32 as it is: features of the same tokens in half the bytes
    made = []
    for name in codecs:
        made.append(Row(f"TREC, {name}: accuracy", mean(scores[name]), "%"))
        made.append(Row(f"TREC, {name}: spread", spread(scores[name]), "%"))
        if name != "lossless":
            lost = mean(scores["lossless"]) - mean(scores[name])
            made.append(Row(f"TREC, {name}: accuracy lost", lost, "points", "lossless features",
                            ACCURACY_TARGET))  # fmt: skip
            made.append(Row(f"TREC, {name}: bytes", sizes[name] / fp16, "x", "features in fp16",
                            BYTES_TARGET))  # fmt: skip
    rows.add(*made)


def text_run(given: argparse.Namespace, folder: Path, codec: str, seed: int) -> tuple[float, int]:
    """Adapters above two thirds and the head, by backprop: accuracy on test, bytes of features."""
    config = TrainConfig(
        model_name_or_path=given.model or minilm(), output_dir=str(folder / "run"), seed=seed,
        task_options={"train_size": given.train_size}, method="adamw", learning_rate=3e-3,
        lr_scheduler_type="linear", space=f"adapter(rank=4, targets='{UPPER}') + head",
        max_steps=given.text_steps, freeze=f"{SHARE}@0", cache_dir=str(folder / "cache"),
        cache_codec=codec, **TEXT,
    )  # fmt: skip
    result = train(config)
    return result.after, sum(p.stat().st_size for p in (folder / "cache").rglob("chunk-*"))


def images(given: argparse.Namespace, rows: Rows) -> None:
    """Backprop on the upper third of a network whose lower two thirds are frozen."""
    aware = "cached, similarity-aware"
    runs: dict[str, dict[str, Any]] = {
        "uncached": {}, aware: {"cache": 0.9}, "cached, naive": {"cache": -1.0},
        "cached, no augmentation": {"cache": 0.9, "augment": None},
        "uncached, nothing frozen": {"frozen": False},
    }  # fmt: skip
    found: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
    for seed in range(given.seeds):
        for name, changes in runs.items():
            found[name].append(resnet20.adapt(given, seed, **changes))
            rows.add(images=found)
    base = found["uncached"]
    made = []
    for name, results in found.items():
        scores = [100 * r["accuracy"] for r in results]
        made.append(Row(f"ResNet-20, {name}: accuracy", mean(scores), "%"))
        made.append(Row(f"ResNet-20, {name}: spread", spread(scores), "%"))
        for key, target in (("compute", COMPUTE_TARGET), ("seconds", None)):
            ratio = mean(r[key] for r in results) / mean(r[key] for r in base)
            made.append(Row(f"ResNet-20, {name}: {key}", ratio, "x", "uncached, frozen alike",
                            target if name == aware else None))  # fmt: skip
        lost = 100 * mean(r["accuracy"] for r in base) - mean(scores)
        made.append(Row(f"ResNet-20, {name}: accuracy lost", lost, "points", "uncached",
                        ACCURACY_TARGET if name == aware else None))  # fmt: skip
    rows.add(*made)


def spread(values: Sequence[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


PARTS = {"step": step, "text": text, "images": images}

if __name__ == "__main__":
    main()
