"""MeZO: zeroth-order SGD with directions drawn again instead of stored."""

from zotune.core.estimator import estimator
from zotune.core.method import Decay, Method, Schedule, Units
from zotune.core.perturbation import Gaussian
from zotune.methods import FLOATS, method


@method(
    paper="Fine-Tuning Language Models with Just Forward Passes",
    year=2023,
    arxiv="2305.17333",
    spaces=(*FLOATS, "codes"),
    memory="none",
)
def mezo(
    lr: float = 1e-6,
    eps: float = 1e-3,
    queries: int = 1,
    weight_decay: float = 0.0,
    schedule: Decay = "constant",
    warmup: int = 0,
    directions: str = "batch",
    units: Units = "absolute",
) -> Method:
    """SPSA gradient estimate and a plain SGD step (Malladi et al. 2023).

        c = (L(theta + eps u) - L(theta - eps u)) / (2 eps),  u ~ N(0, I)
        theta <- theta - lr (c u + weight_decay theta)

    Defaults: the paper's for full tuning of OPT (lr 1e-6, eps 1e-3, constant). Changed: no
    in-place +eps, -2 eps, +eps (nothing to restore), weight decay by module type. Ours:
    directions="example" gives each example of the batch its own direction.

    >>> mezo().forwards
    2
    """
    return Method(
        "mezo",
        estimator(directions, eps, queries),
        Gaussian(),
        lr=lr,
        schedule=Schedule(schedule, warmup),
        weight_decay=weight_decay,
        units=units,
    )
