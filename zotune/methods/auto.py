"""auto: zotune's own choice for the space at hand, eps and lr measured before the first step."""

from typing import Literal

from zotune.core.estimator import estimator
from zotune.core.method import Decay, Method, Schedule, Units
from zotune.core.perturbation import Gaussian
from zotune.methods import FLOATS, method


@method(
    paper="zotune: eps and lr from the curvature and the signal that probes see",
    year=2026,
    arxiv="",
    spaces=("adapter", "head", *FLOATS),
    memory="none",
)
def auto(
    lr: float = 0.03,
    eps: float = 0.03,
    queries: int = 1,
    weight_decay: float = 0.0,
    schedule: Decay = "linear",
    warmup: int = 0,
    directions: Literal["batch", "one-sided", "example"] = "example",
    units: Units = "relative",
) -> Method:
    """Plain steps along SPSA estimates, of the length that the loss itself suggests.

        theta <- theta - lr mean_k c_k u_k
        eps = sqrt(2 * 0.02 L / tr H),  lr <= |g|^2 / (tr(H) E[c^2] / k + |H| |g|^2)

    k coefficients c a step; tr H, |H| and |g|^2 of the loss in the blocks' own units come from a
    few probes before the first step, and so do directions and queries (formulas and bounds:
    `zotune.training.measuring`). What the user gives is not measured, and a `Method` made in
    Python has the defaults here.

    >>> auto().forwards
    2
    """
    return Method(
        "auto",
        estimator(directions, eps, queries),
        Gaussian(),
        lr=lr,
        schedule=Schedule(schedule, warmup),
        weight_decay=weight_decay,
        units=units,
    )
