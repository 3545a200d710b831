"""Adapting a quantized ResNet-20 to lossy CIFAR-10, forward-only.

    python benchmarks/vision.py
    python benchmarks/vision.py --scheme int4-channel --only auto adamw

The published ResNet-20 (91.8 % on clean CIFAR-10) meets pictures that went through a lossy JPEG.
The classifier may read every state (`--head-states last` for the last only, as published).
Every contender may spend the same passes of a batch through the network: a probe is one, a forward
with its backward three, what is looked at before the first step counts, and where only the head is
tuned all probes of a step share one. Learning rates of backprop are chosen on dev, which is held
out of train, with a third of the budget and one seed; the other contenders measure theirs, or have
it here. The table shows the whole test split after the last step; nothing was chosen by it.
Reads ZOTUNE_DATA/cifar10_resnet and ZOTUNE_DATA/cifar10_jpeg.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

if not __package__:
    sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.cifar_resnet import convert
from benchmarks.frontier import Contender
from benchmarks.harness import Row, begin, parser, report
from zotune.core.spaces.head import CLASS_EXAMPLES

TARGET = 3.0  # points above the model as it came
GAINS = "norms(pattern='weight')"
CONTENDERS = (
    Contender("auto", "head(basis='classes')", (), 1),
    Contender("mezo(units='relative', schedule='linear')", "head(exact=True)", (6.0, 18.0), 1),
    Contender("adamw", "norms", (3e-3, 1e-2)),
    Contender("adamw", "weights", (3e-4, 1e-3), None, {"scheme": None}),
    Contender("auto", f"{GAINS} + head(basis='classes')", ()),
    Contender("auto", GAINS, ()),
    Contender("qzo(units='relative')", "scales", (0.003,)),
)
STATISTICS = "batch-norm statistics of the new pictures, nothing trained"


@dataclass(frozen=True)
class Outcome:
    """Test accuracy in percent."""

    before: float
    after: float


@dataclass(frozen=True)
class Problem:
    """The model's folder, how it is quantized, and the run's sizes."""

    folder: Path
    scheme: str
    given: argparse.Namespace

    def run(self, contender: Contender, rate: float | None, seed: int) -> Outcome:
        """One run; accuracy on the test split before and after it."""
        result, _ = self._trained(contender, rate, seed, self.given.test, 1)
        return Outcome(100 * result.before, 100 * result.after)

    def rate(self, contender: Contender) -> float | None:
        """Of the learning rates offered the best on dev, after a third of the budget."""
        if len(contender.rates) < 2:
            return next(iter(contender.rates), None)
        return max(contender.rates, key=lambda rate: self._trained(contender, rate, 0, 1, 3)[1])

    def _trained(
        self, contender: Contender, rate: float | None, seed: int, test: int, share: int
    ) -> tuple[Any, float]:
        """The result and the last accuracy on dev of a run in a folder that is thrown away."""
        from zotune.training import TrainConfig, train
        from zotune.training.report import read_metrics

        given, steps = self.given, max(6, steps_of(contender, self.given) // share)
        with tempfile.TemporaryDirectory() as out:
            config = TrainConfig(
                model_name_or_path=str(self.folder), output_dir=out, seed=seed,
                task=f"cifar10(train_size={given.train}, dev_size={given.dev}, test_size={test})",
                augment="flip + shift(pixels=2)",
                method=contender.method, space=contender.space, learning_rate=rate,
                max_steps=steps, eval_steps=steps, save_steps=0, threads=given.threads,
                per_device_train_batch_size=given.batch, per_device_eval_batch_size=250,
                report_to="none", show_progress=False, max_bad_steps=steps + 1,
                **{"scheme": self.scheme, **contender.changes},
            )  # fmt: skip
            result = train(config)
            dev = [r["eval_accuracy"] for r in read_metrics(Path(out)) if "eval_accuracy" in r]
        return result, dev[-1]

    def statistics(self) -> float:
        """Test accuracy with the batch norms' statistics taken from as many passes."""
        import torch
        from torch import nn

        from zotune import tasks
        from zotune.models import load
        from zotune.training.batches import Batches

        loaded = load(self.folder, scheme=self.scheme)
        task = tasks.get("cifar10", test_size=self.given.test, train_size=self.given.train)
        model = task.prepare(loaded)
        batches = Batches(task, task.split("train"), self.given.batch, 0)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None  # a plain mean over batches
                module.reset_running_stats()
                module.train()
        with torch.no_grad():
            for step in range(min(self.given.budget, self.given.train // self.given.batch)):
                task.losses(model, batches[step])
        return 100 * task.evaluate(model.eval(), task.split("test"), 250)["accuracy"]


def options(words: Sequence[str] | None = None) -> argparse.Namespace:
    assert __doc__ is not None
    flags = parser(
        __doc__, seeds=3, budget=400, batch=100, depth=20, train=20_000, dev=1000, test=10_000
    )
    flags.add_argument("--scheme", default="int8-channel")
    flags.add_argument("--head-states", choices=("last", "all"), default="all")
    flags.add_argument("--only", nargs="+", default=None, help="contenders whose name holds these")
    return flags.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    given = options(words)
    begin(given)
    with tempfile.TemporaryDirectory() as folder:
        problem = Problem(
            convert(given.depth, Path(folder) / "model", given.head_states), given.scheme, given
        )
        rows: list[Row] = []
        details: dict[str, Any] = {}
        for contender in CONTENDERS:
            if given.only is None or any(word in contender.name for word in given.only):
                rate = problem.rate(contender)
                found = []
                for seed in range(given.seeds):
                    found.append(problem.run(contender, rate, seed))
                    details[contender.name] = {"rate": rate, "runs": [vars(o) for o in found]}
                    written = [*rows, *rows_of(contender, rate, found, given)]
                    # After each run: what is measured is not lost.
                    report(f"vision-{given.scheme}", written, given, contenders=details)
                rows = written
        if given.only is None or any(word in STATISTICS for word in given.only):
            rows.append(Row(STATISTICS, problem.statistics(), "%", "forward-only"))
            report(f"vision-{given.scheme}", rows, given, contenders=details)


def steps_of(contender: Contender, given: argparse.Namespace) -> int:
    """How many steps the budget buys, behind the pictures that are looked at first."""
    looked = CLASS_EXAMPLES // given.batch if "classes" in contender.space else 0
    if contender.method == "auto":  # nine probes of each of eight batches, in one pass or each
        looked += 8 if contender.passes == 1 else 72
    each = contender.passes or (3 if contender.method == "adamw" else 2)
    return max(6, (given.budget - looked) // each)


def rows_of(
    contender: Contender, rate: float | None, found: list[Outcome], given: argparse.Namespace
) -> list[Row]:
    """Accuracy after the run, with the target for what runs forward only."""
    before, after = found[0].before, [o.after for o in found]
    trained = f"{contender.name}, {steps_of(contender, given)} steps"
    base = f"before: {before:.2f} %; lr {'measured' if rate is None else rate}"
    target = None if contender.method == "adamw" else before + TARGET
    rows = [Row(trained, mean(after), "%", base, target, at_least=True)]
    if len(after) > 1:
        rows.append(
            Row(f"{trained}: standard deviation over {len(after)} seeds", stdev(after), "%")
        )
    return rows


if __name__ == "__main__":
    main()
