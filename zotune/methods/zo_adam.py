"""ZO-Adam: Adam on zeroth-order estimates, its moments stored or drawn again."""

from typing import Literal

from zotune.core.estimator import estimator
from zotune.core.method import Decay, Method, Schedule, Units
from zotune.core.perturbation import Gaussian
from zotune.core.rule import Adam
from zotune.methods import FLOATS, method


@method(
    paper="Fine-Tuning Language Models with Just Forward Passes (MeZO-Adam, appendix B)",
    year=2023,
    arxiv="2305.17333",
    spaces=("adapter", *FLOATS),
    memory="stored: 8 bytes per tuned element; rebuilt: none, `history` x the noise per step",
)
def zo_adam(
    lr: float = 1e-3,
    eps: float = 1e-3,
    queries: int = 1,
    b1: float = 0.9,
    b2: float = 0.999,
    moments: Literal["stored", "rebuilt"] = "stored",
    history: int = 32,
    weight_decay: float = 0.0,
    schedule: Decay = "constant",
    warmup: int = 0,
    directions: str = "batch",
    units: Units = "relative",
) -> Method:
    """Adam with g = mean_j c_j u_j in the place of the gradient (Malladi et al. 2023).

        m = mean_b1 g,  v = mean_b2 g^2,  theta <- theta - lr m / (sqrt v + 1e-8)

    moments="rebuilt" keeps nothing and draws the last `history` estimates again from their
    coefficients: exact while the run is younger, truncated at b^history after (b2 = 0.999 wants
    thousands; AdaMeZO, arXiv 2605.00650, uses b1 = 0.7, b2 = 0.9 with 10).

    >>> zo_adam(moments="rebuilt").rule.window
    32
    """
    return Method(
        "zo-adam",
        estimator(directions, eps, queries),
        Gaussian(),
        Adam(b1, b2, moments=moments, history=history),
        lr=lr,
        schedule=Schedule(schedule, warmup),
        weight_decay=weight_decay,
        units=units,
    )
