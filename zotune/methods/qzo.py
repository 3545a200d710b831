"""QZO: tune the quantization scales, leave the codes frozen."""

from zotune.core.estimator import estimator
from zotune.core.method import Decay, Method, Schedule, Units
from zotune.core.perturbation import Gaussian
from zotune.core.shaping import Clip
from zotune.methods import method


@method(
    paper="Fine-tuning Quantized Neural Networks with Zeroth-order Optimization",
    year=2025,
    arxiv="2505.13430",
    spaces=("scales", "zeros", "norms", "biases"),
    memory="none",
)
def qzo(
    lr: float = 1e-4,
    eps: float = 1e-2,
    clip: float = 100.0,
    queries: int = 1,
    schedule: Decay = "constant",
    warmup: int = 0,
    directions: str = "batch",
    units: Units = "relative",
) -> Method:
    """SPSA on the scales, with directional-derivative clipping (Shang et al. 2025).

        l+- = L((S +- eps u) * codes),  c = clip((l+ - l-) / (2 eps), -clip, clip)
        S <- max(S - lr c u, floor)

    Changed: eps and lr count in each scale's own size, because the paper's absolute eps 1e-3 is
    a 14 % shock to a usual int4 scale; qzo(lr=1e-7, eps=1e-3, units="absolute") is the paper's.
    Scales stay positive in probes too, and are kept in float32.

    >>> qzo().shaping
    (Clip(limit=100.0),)
    """
    return Method(
        "qzo",
        estimator(directions, eps, queries),
        Gaussian(),
        shaping=(Clip(clip),),
        lr=lr,
        schedule=Schedule(schedule, warmup),
        units=units,
    )
