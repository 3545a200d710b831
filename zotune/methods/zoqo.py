"""ZOQO: noise, step and weights all stay on the quantization grid."""

from zotune.core.estimator import TwoSided
from zotune.core.grid import Grid
from zotune.core.method import Decay, Method, Schedule
from zotune.core.rule import GridSign
from zotune.core.shaping import Sign
from zotune.methods import method


@method(
    paper="ZOQO: Zero-Order Quantized Optimization",
    year=2025,
    arxiv="2501.06736",
    spaces=("codes",),
    memory="none",
)
def zoqo(
    lr: float = 1.0,
    eps: float = 1.0,
    relative: bool = True,
    density: float = 1.0,
    queries: int = 1,
    schedule: Decay = "constant",
    warmup: int = 0,
) -> Method:
    """Zeroth-order sign descent in integer codes (Bar & Giryes 2025).

        M = max(floor(eps / s), 1),  u_i uniform on {-M, ..., M} codes,  x+- = clamp(x +- u)
        x <- clamp(x - max(floor(lr / s), 1) sign(l+ - l-) sign(u))

    Quantize with activations (`int8-channel-a8`) to have everything on the grid. The sampling
    law on {-M..M} is not stated in what we could read: uniform is our choice. Changed: eps and lr
    count codes unless relative=False; `density` moves only a share of the coordinates per step
    (1: the paper), because at few bits a step of every coordinate is a large one.

    >>> zoqo().rule
    GridSign(relative=True)
    """
    return Method(
        "zoqo",
        # A probe is +-1 times a whole number of codes: eps lives in the perturbation's radius.
        TwoSided(1.0, queries),
        Grid(eps, relative, density),
        GridSign(relative),
        (Sign(),),
        lr=lr,
        schedule=Schedule(schedule, warmup),
    )
