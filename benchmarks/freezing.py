"""What do frozen layers with cached features save, and what do they cost in accuracy?

    python benchmarks/freezing.py                # all parts
    python benchmarks/freezing.py --only step    # or: text, images

step: seconds of a training step on MiniLM with two thirds of its layers frozen, with their features
from a cache and without. text: TREC-6 on int4 MiniLM, the same run on features as they are and on
compressed ones: bytes and accuracy. images: ResNet-20 adapted to lossy CIFAR-10 by backprop, with
and without a cache: channels that do not commute cached transformed, none of them, no augmentation.
One result file per part, written after each method or seed.
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
from benchmarks.harness import Row, begin, interleave, parser, report
from zotune.bench.models import MINILM
from zotune.training import TrainConfig, train
from zotune.training.assemble import assemble

SHARE = "0.67"
UPPER = r"layer\.[45]\."
TEXT = {
    "scheme": "int4-g64", "task": "trec", "report_to": "none", "save_steps": 0,
    "show_progress": False,
}  # fmt: skip
BASES = {"whole": "a step with nothing frozen", "frozen": "a step that runs the frozen layers"}
STEPS: dict[str, tuple[bool, str | None]] = {
    "whole": (False, None), "frozen": (True, None), "cached": (True, "lossless"),
    "cached zfp": (True, "zfp(tolerance=2.0)"),
}  # fmt: skip
"""Contenders: whether two thirds of the layers are frozen, and how their features are cached."""
STEP_TARGET, BYTES_TARGET, ACCURACY_TARGET, COMPUTE_TARGET = 0.45, 0.30, 0.5, 0.70


def options(words: Sequence[str] | None = None) -> argparse.Namespace:
    assert __doc__ is not None
    flags = parser(
        __doc__, rounds=7, calls=3, warmup=1, seeds=3, text_steps=500, train_size=1500,
        images=1000, test_images=1500, epochs=10,
    )  # fmt: skip
    flags.add_argument("--methods", nargs="+", default=["mezo", "adamw"], help="of the step part")
    codecs = ["lossless", "zfp(tolerance=0.5)", "zfp(tolerance=3.5)"]
    flags.add_argument("--codecs", nargs="+", default=codecs, help="of the text part")
    flags.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    return flags.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    given = options(words)
    begin(given)
    for name in given.only:
        PARTS[name](given)


def step(given: argparse.Namespace) -> None:
    """Contenders share batch, task and model; `whole` is the run that freezing replaces."""
    made, seconds = list[Row](), dict[str, Any]()
    for method in given.methods:
        with tempfile.TemporaryDirectory() as folder:
            works = {
                name: stepper(given, Path(folder) / name, method, frozen, codec)
                for name, (frozen, codec) in STEPS.items()
            }
            found = interleave(works, rounds=given.rounds, calls=given.calls, warmup=given.warmup)
        made += [Row(f"{method}: {name} step", found.median(name), "s") for name in works]
        for name in ("cached", "cached zfp"):
            for base, words in BASES.items():
                row = f"{method}: {name} over {base}"
                made.append(Row(row, found.ratio(name, base), "x", words, STEP_TARGET))
        seconds[method] = found.seconds
        report("freezing-step", made, given, seconds_per_round=seconds)


def stepper(
    given: argparse.Namespace,
    folder: Path,
    method: str,
    frozen: bool,
    codec: str | None,
) -> Any:
    """One training step after another, on batches of 16 tickets of at most 48 tokens."""
    targets = f"(rank=1, targets='{UPPER}')" if frozen else "(rank=1)"
    config = TrainConfig(
        model_name_or_path=given.model or MINILM, scheme="int4-g64", task="tickets",
        output_dir=str(folder / "run"), method=method, space=f"adapter{targets} + head",
        max_steps=10_000, max_length=48, show_progress=False, max_eval_samples=8,
        task_options={"train_size": 128},
        freeze=f"{SHARE}@0" if frozen else None, cache_codec=codec,
        cache_dir=None if codec is None else str(folder / "cache"),
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


def text(given: argparse.Namespace) -> None:
    """The same seeds with features as they are and compressed; bytes of fp16 as the yardstick."""
    scores: dict[str, list[float]] = {name: [] for name in given.codecs}
    sizes = dict[str, float]()
    for seed in range(given.seeds):
        for codec in given.codecs:
            with tempfile.TemporaryDirectory() as folder:
                score, sizes[codec] = text_run(given, Path(folder), codec, seed)
            scores[codec].append(100 * score)
        fp16 = sizes["lossless"] / 2  # lossless is float32
        made = []
        for codec in given.codecs:
            lost = mean(scores["lossless"]) - mean(scores[codec])
            made += [
                Row(f"{codec}: accuracy", mean(scores[codec]), "%"),
                Row(f"{codec}: spread over seeds", spread(scores[codec]), "%"),
                Row(f"{codec}: accuracy lost", lost, "points", "lossless", ACCURACY_TARGET),
                Row(f"{codec}: bytes", sizes[codec] / fp16, "x", "features in fp16",
                    None if codec == "lossless" else BYTES_TARGET),
            ]  # fmt: skip
        report("freezing-text", made, given, scores=scores, cached_bytes=sizes)


def text_run(given: argparse.Namespace, folder: Path, codec: str, seed: int) -> tuple[float, int]:
    """Adapters above two thirds and the head, by backprop: accuracy on test, bytes of features."""
    config = TrainConfig(
        model_name_or_path=given.model or MINILM, output_dir=str(folder / "run"), seed=seed,
        task_options={"train_size": given.train_size}, method="adamw", learning_rate=3e-3,
        lr_scheduler_type="linear", space=f"adapter(rank=4, targets='{UPPER}') + head",
        max_steps=given.text_steps, freeze=f"{SHARE}@0", cache_dir=str(folder / "cache"),
        cache_codec=codec, **TEXT,
    )  # fmt: skip
    result = train(config)
    return result.after, sum(p.stat().st_size for p in (folder / "cache").rglob("chunk-*"))


def images(given: argparse.Namespace) -> None:
    """Backprop on the upper third of a network whose lower two thirds are frozen."""
    aware = "cached, similarity-aware"
    runs: dict[str, dict[str, Any]] = {
        "uncached": {}, aware: {"cache": 0.6}, "cached, naive": {"cache": -1.0},
        "cached, no augmentation": {"cache": 0.6, "augment": None},
        "uncached, nothing frozen": {"frozen": False},
    }  # fmt: skip
    found: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
    for seed in range(given.seeds):
        for name, changes in runs.items():
            found[name].append(resnet20.adapt(given, seed, **changes))
        made = [row for name in runs for row in image_rows(name, found, name == aware)]
        report("freezing-images", made, given, runs=found)


def image_rows(name: str, found: dict[str, list[dict[str, float]]], targeted: bool) -> list[Row]:
    """Accuracy, and what it cost beside the uncached run."""

    def average(run: str, key: str) -> float:
        return mean(result[key] for result in found[run])

    scores = [100 * result["accuracy"] for result in found[name]]
    lost = 100 * average("uncached", "accuracy") - mean(scores)
    limits = (COMPUTE_TARGET, ACCURACY_TARGET) if targeted else (None, None)
    work = average(name, "compute") / average("uncached", "compute")
    seconds = average(name, "seconds") / average("uncached", "seconds")
    return [
        Row(f"{name}: accuracy", mean(scores), "%"),
        Row(f"{name}: spread over seeds", spread(scores), "%"),
        Row(f"{name}: accuracy lost", lost, "points", "uncached", limits[1]),
        Row(f"{name}: compute", work, "x", "uncached, the same layers frozen", limits[0]),
        Row(f"{name}: seconds", seconds, "x", "uncached, the same layers frozen"),
    ]


def spread(values: Sequence[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


PARTS = {"step": step, "text": text, "images": images}

if __name__ == "__main__":
    main()
