"""FZOO: one-sided sign directions, and a step as long as the losses' spread says."""

from dataclasses import dataclass, replace

from zotune.core.estimator import Estimate, Estimator, OneSided
from zotune.core.method import Decay, Method, Schedule, Units
from zotune.core.noise import Key
from zotune.core.perturbation import Rademacher
from zotune.core.probe import Losses, Probe
from zotune.errors import BadInput
from zotune.methods import FLOATS, method


@dataclass(frozen=True)
class Spread(Estimator):
    """c_j = (L(+eps u_j) - L(0)) / std_j L(+eps u_j), std with N - 1; 0 where all losses agree.

    >>> Spread(eps=0.5, queries=2).tell(Key(0), Losses.of([1.0, 1.0, 3.0])).coefficients
    (0.0, 1.414213562373095)
    """

    queries: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.queries < 2:
            raise BadInput(
                f"queries={self.queries}; FZOO divides by the spread of the losses of several "
                "directions: want at least 2"
            )

    @property
    def forwards(self) -> int:
        return 1 + self.queries

    def ask(self, key: Key) -> list[Probe]:
        return OneSided(self.eps, self.queries).ask(key)

    def tell(self, key: Key, losses: Losses) -> Estimate:
        found = OneSided(self.eps, self.queries).tell(key, losses)
        spread = float(losses.mean[1:].std()) / self.eps
        return replace(
            found, coefficients=tuple(c / spread if spread else 0.0 for c in found.coefficients)
        )


@method(
    paper="FZOO: Fast Zeroth-Order Optimizer for Fine-Tuning Large Language Models towards "
    "Adam-Scale Speed",
    year=2025,
    arxiv="2506.09034",
    spaces=FLOATS,
    memory="none",
)
def fzoo(
    lr: float = 1e-5,
    eps: float = 1e-3,
    queries: int = 8,
    weight_decay: float = 0.0,
    schedule: Decay = "constant",
    warmup: int = 0,
    units: Units = "absolute",
) -> Method:
    """A forward difference over N sign directions, in units of the losses' spread (FZOO, 2025).

        l_j = L(theta + eps u_j), u_j uniform on {-1, +1}^d,  s = std_j l_j
        theta <- theta - lr (mean_j (l_j - L(theta)) / s u_j + weight_decay theta)

    s is about eps ||gradient||, so that a weight moves by about lr / sqrt N whatever the loss's
    scale. lr is the released code's, in which eps cancels; the paper divides by eps once more:
    its lr = eps lr. The code's s has N where the paper's and ours have N - 1: its lr =
    lr sqrt((N - 1) / N).

    Defaults: lr, eps and N from the released script (for OPT-13B lr 5e-5, eps 1e-4). Changed:
    losses that are all equal give no step, where the code has NaN; N = 1 is refused.

    >>> fzoo().forwards
    9
    """
    return Method(
        "fzoo",
        Spread(eps, queries),
        Rademacher(),
        lr=lr,
        schedule=Schedule(schedule, warmup),
        weight_decay=weight_decay,
        units=units,
    )
