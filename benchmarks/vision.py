"""Adapting a quantized ResNet-20 to lossy CIFAR-10, forward-only.

    python benchmarks/vision.py
    python benchmarks/vision.py --only shift --seeds 1

The published ResNet-20 (91.8 % on clean CIFAR-10) meets pictures that went through a lossy JPEG.
The classifier reads every state in quarters, and gives what it gave before (`--head-states last
--head-cells 1` for the published one). Every contender may spend the same passes of a batch through
the network: a probe is one, a forward with its backward three, what is looked at before the first
step counts, and where nothing but the head and norms that stay is tuned all probes of a step share
one. Learning rates are chosen on dev, which is held out of train, with a third of the budget and
one seed; where one rate is given it was found so before. The table shows the whole test split
after the last step; nothing was chosen by it. Reads ZOTUNE_DATA/cifar10_resnet and
ZOTUNE_DATA/cifar10_jpeg.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

if not __package__:
    sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.cifar_resnet import convert
from benchmarks.frontier import Contender
from benchmarks.harness import Row, begin, earlier, parser, report
from zotune.core.spaces.head import CLASS_EXAMPLES
from zotune.core.spaces.norms import SHIFT_EXAMPLES

TARGET = 3.0  # points above the model as it came
PROBED = "mezo(units='absolute', eps=0.1, directions='example', schedule='linear')"
EXACT = "mezo(units='absolute', schedule='linear')"
SHIFT = "norms(basis='shift')"
STILL = "norms(basis='shift', lr=0.0)"
CONTENDERS = (
    Contender(PROBED, f"{SHIFT} + head(basis='white', exact=True, lr=0.1)", (1.0,)),
    Contender(EXACT, f"{STILL} + head(basis='white', exact=True)", (0.1,), 1),
    Contender(PROBED, f"{SHIFT} + head(exact=True, lr=0.3)", (1.0,)),
    Contender(EXACT, "norms(basis='shift', share=1.0, lr=0.0)", (1.0,), 1),
    Contender(EXACT, STILL, (1.0,), 1),
    Contender(EXACT, f"{STILL} + head(exact=True)", (0.3,), 1),
    Contender("adamw", "norms", (1e-2,)),
    Contender("adamw", "weights", (1e-3,), None, {"scheme": None}),
    Contender(EXACT, "head(exact=True)", (0.3,), 1),
    Contender(PROBED, SHIFT, (1.0,)),
    Contender("auto", "head(basis='classes')", (), 1),
    Contender("auto", f"{SHIFT} + head(basis='classes')", ()),
)


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

        given, steps = self.given, max(1, steps_of(contender, self.given) // share)
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


def options(words: Sequence[str] | None = None) -> argparse.Namespace:
    assert __doc__ is not None
    flags = parser(
        __doc__, seeds=3, budget=1000, batch=100, depth=20, train=49_000, dev=1000, test=10_000,
        head_cells=2,
    )  # fmt: skip
    flags.add_argument("--scheme", default="int8-channel")
    flags.add_argument("--head-states", choices=("last", "all"), default="all")
    flags.add_argument("--only", nargs="+", default=None, help="contenders whose name holds these")
    return flags.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    given = options(words)
    begin(given)
    name = f"vision-{given.scheme}"
    details = earlier(name, given)
    with tempfile.TemporaryDirectory() as folder:
        model = convert(given.depth, Path(folder) / "model", given.head_states, given.head_cells)
        problem = Problem(model, given.scheme, given)
        for contender in CONTENDERS:
            if given.only is None or any(word in contender.name for word in given.only):
                rate = problem.rate(contender)
                found = list[dict[str, float]]()
                for seed in range(seeds_of(contender, given)):
                    found.append(vars(problem.run(contender, rate, seed)))
                    details[contender.name] = {"rate": rate, "runs": found}
                    # After each run: what is measured is not lost.
                    report(name, table(details, given), given, contenders=details)


def table(details: Mapping[str, Any], given: argparse.Namespace) -> list[Row]:
    """Rows of the contenders that have been run, in their order."""
    return [
        row
        for contender in CONTENDERS
        if contender.name in details
        for row in rows_of(
            contender,
            details[contender.name]["rate"],
            [Outcome(**run) for run in details[contender.name]["runs"]],
            given,
        )
    ]


def still(contender: Contender) -> bool:
    """Whether nothing is tuned: the norms' statistics are measured, and that is all."""
    return contender.space.endswith("lr=0.0)")


def seeds_of(contender: Contender, given: argparse.Namespace) -> int:
    """One for what draws nothing at random but which pictures are looked at."""
    return 1 if still(contender) else int(given.seeds)


def steps_of(contender: Contender, given: argparse.Namespace) -> int:
    """How many steps the budget buys, behind the pictures that are looked at first."""
    if still(contender):
        return 1
    looked = CLASS_EXAMPLES // given.batch if "head(basis=" in contender.space else 0
    if "shift" in contender.space:
        looked += SHIFT_EXAMPLES // given.batch
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
