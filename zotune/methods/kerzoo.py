"""KerZOO: a random radius and a kernel weight, so that the cubic error of a probe pair cancels."""

from dataclasses import dataclass, replace
from typing import Literal

from zotune.core import noise
from zotune.core.estimator import Estimate, Estimator, TwoSided
from zotune.core.method import Decay, Method, Schedule, Units
from zotune.core.noise import Key
from zotune.core.perturbation import Gaussian
from zotune.core.probe import Losses, Probe
from zotune.errors import BadInput
from zotune.methods import FLOATS, method

Order = Literal["linear", "cubic", "quintic"]

KERNELS: dict[str, tuple[float, ...]] = {  # coefficients of rho, rho^3, rho^5 at C = 1
    "linear": (3.0,),
    "cubic": (75 / 4, -105 / 4),
    "quintic": (3675 / 64, -13230 / 64, 10395 / 64),
}
NARROWEST = 1e-4  # half-width at which the radius stops shrinking


@dataclass(frozen=True)
class Kernel(Estimator):
    """c_j = (L(+eps rho_j u_j) - L(-eps rho_j u_j)) / (2 eps) K(rho_j), one rho_j for all blocks.

        linear   K = 3 C rho                                     E[(rho K / C)^2] =  1.80
        cubic    K = C 15/4 rho (5 - 7 rho^2)                                        6.25
        quintic  K = C 105/64 rho (99 rho^4 - 126 rho^2 + 35)                       13.25

    rho_j ~ U[-a, a] is drawn from u_j's key; `gain` is C. With `shrink` steps, a falls from 1 to
    1e-4 in a straight line; with 0 it stays 1.

    >>> round(Kernel(order="linear").weight(0.5), 12)
    1.5
    """

    order: Order = "cubic"
    gain: float = 1.0
    shrink: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order not in KERNELS:
            raise BadInput(f"order={self.order!r}; want one of {', '.join(KERNELS)}")
        if not self.gain > 0 or self.shrink < 0:
            raise BadInput(f"gain={self.gain}, shrink={self.shrink}; want gain > 0, shrink >= 0")

    @property
    def forwards(self) -> int:
        return 2 * self.queries

    def radius(self, key: Key) -> float:
        """rho of the direction that this key draws."""
        width = max(1 - key.step / self.shrink, NARROWEST) if self.shrink else 1.0
        return width * float(noise.draw("uniform", key, "kerzoo#radius", 0, 1))

    def weight(self, rho: float) -> float:
        """K(rho)."""
        return self.gain * sum(k * rho ** (2 * i + 1) for i, k in enumerate(KERNELS[self.order]))

    def ask(self, key: Key) -> list[Probe]:
        steps = [(k, self.eps * self.radius(k)) for k in self.keys(key, self.queries)]
        return [Probe(k, sign * step) for k, step in steps for sign in (1, -1)]

    def tell(self, key: Key, losses: Losses) -> Estimate:
        plain = TwoSided(self.eps, self.queries).tell(key, losses)
        weights = [self.weight(self.radius(k)) for k in plain.keys]
        scaled = (c * w for c, w in zip(plain.coefficients, weights, strict=True))
        return replace(plain, coefficients=tuple(scaled))


@method(
    paper="KerZOO: Kernel Function Informed Zeroth-Order Optimization for Accurate and Accelerated "
    "LLM Fine-Tuning",
    year=2025,
    arxiv="2505.18886",
    spaces=FLOATS,
    memory="none",
)
def kerzoo(
    lr: float = 1e-6,
    eps: float = 1e-3,
    order: Order = "cubic",
    gain: float = 1.0,
    shrink: int = 0,
    queries: int = 1,
    weight_decay: float = 0.0,
    schedule: Decay = "constant",
    warmup: int = 0,
    units: Units = "absolute",
) -> Method:
    """SPSA without its bias of order eps^2 (KerZOO, 2025).

        rho ~ U[-1, 1],  c = (L(theta + eps rho u) - L(theta - eps rho u)) / (2 eps) K(rho)
        theta <- theta - lr (c u + weight_decay theta),  K = C 15/4 rho (5 - 7 rho^2)

    `order` names how many powers of rho K has; "quintic" cancels eps^4 too. The price is
    variance: 6.25 times the square of the coefficient ("linear" 1.8, "quintic" 13.25), so lower
    lr or raise `queries`. `gain` is C.

    `shrink` steps narrow rho to [-a, a] with a from 1 to 1e-4. That is a schedule of lr in
    disguise: lr acts as C lr (25 a^2 - 21 a^4) / 4, which at C = 4 is 4.0, 7.4, 4.9 and 0.25 times
    lr for a = 1, 0.77, 0.5 and 0.1. Compare with a baseline that follows it.

    Defaults: lr and eps from the released README (OPT-2.7B); C = 1 and shrink = 0 are ours, where
    the estimate is unbiased (a copy of the trainer has C = 4, 3 queries, and shrinks). Changed:
    105/64 where 195/64 is printed, which would not have E[rho K] = 1; one rho for all tensors,
    without which their cross terms do not cancel; no clipping of tensors' norms.

    >>> kerzoo(order="quintic").estimator.order
    'quintic'
    """
    return Method(
        "kerzoo",
        Kernel(eps, queries, order, gain, shrink),
        Gaussian(),
        lr=lr,
        schedule=Schedule(schedule, warmup),
        weight_decay=weight_decay,
        units=units,
    )
