"""QuZO: low-bit noise on low-bit weights, with two independent stochastic roundings."""

from zotune.core.estimator import TwoSided
from zotune.core.grid import Rounded
from zotune.core.method import Decay, Method, Schedule
from zotune.methods import method


@method(
    paper="QuZO: Quantized Zeroth-Order Fine-Tuning for Large Language Models",
    year=2025,
    arxiv="2502.12346",
    spaces=("codes", "lora", "adapter", "scales"),
    memory="none",
)
def quzo(
    lr: float = 1e-3,
    eps: float = 0.5,
    bits: int = 4,
    queries: int = 1,
    schedule: Decay = "linear",
    warmup: int = 0,
) -> Method:
    """SPSA with quantized perturbations whose rounding bias cancels (Zhou et al. 2025).

        u ~ N(0, I),  u1 = SR_a(u), u2 = SR_b(u): same u, independent roundings to `bits` bits
        c_j = (L(W + eps u1_j) - L(W - eps u1_j)) / (2 eps)
        W <- W - SR(lr mean_j c_j u2_j), rounded stochastically onto the weight grid

    On codes eps and lr count codes. Changed: the released code draws u1 and u2 from one seed, so
    that they are equal; here they are independent. With several queries the mean is rounded
    once, which is unbiased too and adds less noise than rounding each.

    >>> quzo().perturbation
    Rounded(bits=4)
    """
    return Method(
        "quzo", TwoSided(eps, queries), Rounded(bits), lr=lr, schedule=Schedule(schedule, warmup)
    )
