"""ZO-signSGD: the sign of the estimate only."""

from zotune.core.estimator import estimator
from zotune.core.method import Decay, Method, Schedule, Units
from zotune.core.perturbation import Gaussian
from zotune.core.rule import SignSGD
from zotune.methods import FLOATS, method


@method(
    paper="signSGD via Zeroth-Order Oracle",
    year=2019,
    arxiv="",
    spaces=(*FLOATS, "codes"),
    memory="none",
)
def zo_sign(
    lr: float = 1e-5,
    eps: float = 1e-3,
    queries: int = 1,
    weight_decay: float = 0.0,
    schedule: Decay = "linear",
    warmup: int = 0,
    directions: str = "batch",
    units: Units = "absolute",
) -> Method:
    """Every element moves by lr against the sign of its estimate (Liu et al., ICLR 2019).

        theta <- theta - lr sign(mean_j c_j u_j);  with one query: sign(c) sign(u)

    Changed: the schedule decays to 0, because a sign step never shrinks by itself.

    >>> zo_sign().rule
    SignSGD()
    """
    return Method(
        "zo-sign",
        estimator(directions, eps, queries),
        Gaussian(),
        SignSGD(),
        lr=lr,
        schedule=Schedule(schedule, warmup),
        weight_decay=weight_decay,
        units=units,
    )
