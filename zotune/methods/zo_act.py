"""ZO-Act: coefficients on activation bases that are measured once, before the first step."""

from typing import Literal

from zotune.core.estimator import estimator
from zotune.core.method import Decay, Method, Schedule, Units
from zotune.core.perturbation import Gaussian
from zotune.core.rule import SGD, Adam
from zotune.errors import BadInput
from zotune.methods import method


@method(
    paper="ZO-Act: Efficient Zeroth-Order Fine-Tuning via One-Shot Activation-Informed Low-Rank "
    "Subspaces",
    year=2026,
    arxiv="2607.01125",
    spaces=("adapter",),
    memory="sgd: none; adam: 8 bytes per coefficient",
)
def zo_act(
    lr: float = 1e-3,
    eps: float = 1e-2,
    rule: Literal["sgd", "adam"] = "adam",
    b1: float = 0.9,
    b2: float = 0.999,
    queries: int = 1,
    schedule: Decay = "linear",
    warmup: int = 0,
    directions: str = "batch",
    units: Units = "relative",
) -> Method:
    """SPSA on the coefficients C of y = W x + C A x, A frozen on the inputs (Dong et al. 2026).

        A <- leading right singular vectors of each layer's inputs at step 0,  C <- 0
        g = mean_j c_j u_j,  c_j = (L(C + eps u_j) - L(C - eps u_j)) / (2 eps)
        C <- C - lr g (rule="sgd"), or lr m / (sqrt v + 1e-8), m = mean_b1 g, v = mean_b2 g^2

    The bases are the `adapter` space's, with its `rank`; W may be in low bits and stays. What
    lies outside of the first activations' span cannot be learned.

    A reconstruction: of the paper only the idea and the optimizer could be read. lr, eps and
    units are ours, relative to each layer's output, which suits layers of all sizes. Ours as well:
    directions="example", B coefficients from one pair of forwards.

    >>> zo_act(rule="sgd").rule
    SGD()
    """
    if rule not in ("sgd", "adam"):
        raise BadInput(f"rule={rule!r}; want 'sgd' or 'adam'")
    return Method(
        "zo-act",
        estimator(directions, eps, queries),
        Gaussian(),
        SGD() if rule == "sgd" else Adam(b1, b2),
        lr=lr,
        schedule=Schedule(schedule, warmup),
        units=units,
    )
