"""What a private run promises, the noise that a promise wants, and what the run may look at.

(epsilon, delta)-differential privacy of the training split, adding or removing one example: of the
tuned model, the journal, the snapshots and the numbers that a run writes. What goes with it:

- An example is what the task calls one: of `lm` a window, not a document, author or person.
- Public are the base model, the number of training examples, the label names, and the dev and
  test rows: they are evaluated on, and spaces that look at examples (`adapter`) look at dev's.
- Withheld are the training losses and the data's digest. Not covered are times and memory, and
  what is printed while the run goes (such as the length of a cut example): keep those.
- Noise and batches come from the system's entropy. A resumed run repeats bit for bit what is
  journalled; the steps behind it draw new secrets. Steps that `repair` cuts off and runs again
  have been paid for twice if anybody saw them. Several runs on the same data add up.
- Sum and noise are exact, and examples run one by one, so the bound on what one of them changes
  has no rounding in it. micro_batch > 1 is faster and gives that up: in a forward with others an
  example's loss depends on them in its last bits (in 16 bit: more), which no clip bounds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from zotune.core.method import Method
from zotune.core.secret import Law
from zotune.errors import BadInput
from zotune.methods import AnyMethod
from zotune.methods.dp_zo import Private
from zotune.tasks.task import Task
from zotune.training.config import TrainConfig

LARGE = 20.0  # an epsilon that protects nobody: from here on the cheap bound will do
_CLOSE = 5e-3  # how near, as a share, calibration comes to what would just do
_MOST = 2.0**20  # clips of noise, beyond which no accountant tells a difference


@dataclass(frozen=True)
class Privacy:
    """The promise after `steps` steps, and the mechanism that keeps it.

    noise counts in clips; rate is the chance of an example to be in a batch; together is how many
    share a forward.
    """

    epsilon: float
    delta: float
    steps: int
    examples: int
    rate: float
    mechanism: Law
    noise: float
    clip: float
    together: int = 1
    neighbours: str = "adding or removing one example"

    def __str__(self) -> str:
        if not math.isfinite(self.epsilon):
            return "none: noise=0 protects nobody"
        epsilon = math.ceil(self.epsilon * 1e4) / 1e4
        but = "; but for rounding in shared forwards" if self.together > 1 else ""
        return (
            f"({epsilon:g}, {self.delta:g})-differential privacy for {self.neighbours} of "
            f"{self.examples:,}, after {self.steps:,} steps ({self.mechanism} noise of "
            f"{self.noise:.4g} x clip {self.clip:g}, sampling rate {self.rate:.4g}{but})"
        )


def private(method: AnyMethod) -> Private | None:
    """The private estimator of a method, None where it has none."""
    found = method.estimator if isinstance(method, Method) else None
    return found if isinstance(found, Private) else None


def check(method: AnyMethod, task: Task, config: TrainConfig) -> None:
    """Refuse what cannot be private, before the model is loaded.

    Raises:
        BadInput: a loss that is one number per batch, no rows to evaluate on but those trained
            on, a check of the gradient, or no accountant.
    """
    mechanism = private(method)
    if mechanism is None:
        return
    if not task.per_example:
        raise BadInput(
            f"task {task.name!r} gives one loss per batch, in which no example can be clipped; a "
            "private method wants a loss per example"
        )
    if config.micro_batch == "auto" or config.micro_batch_tokens or config.group_by_length:
        raise BadInput(
            "a private run says how many examples share a forward, and lets chance alone choose "
            "them: give micro_batch a number, drop micro_batch_tokens and group_by_length"
        )
    if config.check_gradient:
        raise BadInput("check_gradient shows what a private method hides; leave it at 0")
    if config.freeze is not None or config.augment is not None:
        raise BadInput(
            "a private run picks its examples by chance and keeps nothing of them; it can neither "
            "freeze nor augment: drop freeze and augment, or use another method"
        )
    trained = task.split("train")
    others = [name for name in ("dev", "test") if name in task.splits]
    if not others or any(task.split(name) is trained for name in others):
        raise BadInput(
            "a run publishes what it measures, so a private one needs rows that it does not train "
            "on: give test_file or validation_file"
        )
    if mechanism.noise != 0 and mechanism.delta:
        _accounting()


def refuse_looking(*_: Any, **__: Any) -> None:
    """What a space that looks at examples is given where only the test rows are public."""
    raise BadInput(
        "this space looks at examples before training, and a private run may not show it those it "
        "trains on: give validation_file, or tune another space"
    )


def planned(method: AnyMethod, examples: int, steps: int) -> AnyMethod:
    """The method with the noise that its epsilon wants in a run; others as they are.

    Raises:
        BadInput: delta is no less than 1 / examples, or no noise is large enough.
    """
    mechanism = private(method)
    if mechanism is None:
        return method
    if mechanism.delta * examples >= 1:
        raise BadInput(
            f"delta={mechanism.delta:g} with {examples} examples lets whole examples leak; want "
            f"delta < 1/{examples} = {1 / examples:.2g}"
        )
    if mechanism.noise is not None:
        return method
    assert mechanism.epsilon is not None
    rate = min(1.0, mechanism.batch / examples)
    noise = calibrated(mechanism.mechanism, mechanism.epsilon, mechanism.delta, rate, steps)
    return method.but(estimator=replace(mechanism, noise=noise))


def spent(mechanism: Private, examples: int, steps: int, together: int = 1) -> Privacy:
    """What so many steps over so many examples promise."""
    assert mechanism.noise is not None
    rate, law = min(1.0, mechanism.batch / examples), mechanism.mechanism
    epsilon = epsilon_of(law, mechanism.noise, mechanism.delta, rate, steps)
    return Privacy(
        epsilon, mechanism.delta, steps, examples, rate, law, mechanism.noise, mechanism.clip,
        together,
    )  # fmt: skip


@lru_cache(maxsize=64)
def epsilon_of(law: Law, noise: float, delta: float, rate: float, steps: int) -> float:
    """epsilon of `steps` Poisson-sampled steps with noise in clips, adding or removing one example.

    Numerically tight (privacy loss distributions) up to `LARGE`, a cheaper upper bound beyond it.
    Laplace with delta = 0 adds up: steps ln(1 + rate (e^(1 / noise) - 1)).

    >>> round(epsilon_of("laplace", 10.0, 0.0, 0.01, 100), 4)
    0.1051
    """
    if not steps:
        return 0.0
    if not noise:
        return math.inf
    bound = _laplace(noise, delta, rate, steps) if law == "laplace" else math.inf
    if not delta:
        return bound
    accounting = _accounting()
    event = accounting.LaplaceDpEvent(noise)
    if law == "gaussian":
        event = accounting.GaussianDpEvent(noise)
        renyi = accounting.rdp.RdpAccountant([*range(2, 33), 48, 64, 128, 256])
        renyi.compose(accounting.PoissonSampledDpEvent(rate, event), steps)
        bound = float(renyi.get_epsilon(delta))
    if bound > LARGE:  # a finer answer would take memory without limit
        return bound
    tight = accounting.pld.PLDAccountant()
    tight.compose(accounting.PoissonSampledDpEvent(rate, event), steps)
    return min(bound, max(0.0, float(tight.get_epsilon(delta))))


def _laplace(noise: float, delta: float, rate: float, steps: int) -> float:
    """Sum of pure steps; with delta also by concentrated privacy, rho = steps e^2 / 2 (Bun &
    Steinke 2016, arXiv 1605.02065)."""
    each = math.log1p(rate * math.expm1(1 / noise)) if 1 / noise < 700 else math.inf
    if not delta:
        return steps * each
    rho = steps * each**2 / 2
    return min(steps * each, rho + 2 * math.sqrt(rho * math.log(1 / delta)))


def calibrated(law: Law, epsilon: float, delta: float, rate: float, steps: int) -> float:
    """The least noise, in clips, that keeps so many steps within (epsilon, delta).

    >>> noise = calibrated("laplace", 1.0, 0.0, 0.01, 100)
    >>> 0.99 < epsilon_of("laplace", noise, 0.0, 0.01, 100) <= 1.0
    True
    """

    def at(noise: float) -> float:
        return epsilon_of(law, noise, delta, rate, steps)

    low, high = 0.5, 1.0
    while at(high) > epsilon:
        low, high = high, 2 * high
        if high > _MOST:
            raise BadInput(f"no noise keeps {steps} steps within epsilon={epsilon}; raise epsilon")
    while at(low) <= epsilon:
        low, high = low / 2, low
    while at(high) < (1 - _CLOSE) * epsilon and high > (1 + _CLOSE) * low:
        # epsilon falls much like a power of the noise; every guess lies well inside the bracket
        share = math.log(at(low) / epsilon) / math.log(at(low) / max(at(high), 1e-9))
        guess = low * (high / low) ** min(0.9, max(0.1, share + _CLOSE))
        low, high = (low, guess) if at(guess) <= epsilon else (guess, high)
    return high


def _accounting() -> Any:
    try:
        import dp_accounting
    except ImportError as error:
        raise BadInput(
            "accounting for privacy needs dp-accounting: pip install 'zotune[privacy]'"
        ) from error
    return dp_accounting
