"""EGGROLL: antithetic low-rank directions, applied inside the layers' products."""

from dataclasses import dataclass, replace

from zotune.core.estimator import Estimate, Estimator, TwoSided, estimator
from zotune.core.low_rank import LowRank
from zotune.core.method import Decay, Method, Schedule, Units
from zotune.core.noise import Key
from zotune.core.probe import Losses, Probe
from zotune.core.shaping import Standardize
from zotune.methods import method


@dataclass(frozen=True)
class Fitness(Estimator):
    """c_j = (l+_j - l-_j) / (2 s), s the standard deviation of all 2 q losses; 0 if they agree.

    The mean of z-scored losses times noise over antithetic members, in which their mean cancels.

    >>> Fitness(eps=0.5, queries=1).tell(Key(0), Losses.of([3.0, 1.0])).coefficients
    (1.0,)
    """

    @property
    def forwards(self) -> int:
        return 2 * self.queries

    def ask(self, key: Key) -> list[Probe]:
        return TwoSided(self.eps, self.queries).ask(key)

    def tell(self, key: Key, losses: Losses) -> Estimate:
        found = TwoSided(self.eps, self.queries).tell(key, losses)
        spread = float(losses.mean.std(correction=0)) / self.eps
        return replace(
            found, coefficients=tuple(c / spread if spread else 0.0 for c in found.coefficients)
        )


@method(
    paper="Evolution Strategies at the Hyperscale (EGGROLL)",
    year=2025,
    arxiv="2511.16652",
    spaces=("weights", "head", "lora", "latents"),
    memory="none",
)
def eggroll(
    lr: float = 1e-3,
    eps: float = 1e-2,
    rank: int = 1,
    zscore: bool = True,
    queries: int = 8,
    weight_decay: float = 0.0,
    schedule: Decay = "constant",
    warmup: int = 0,
    directions: str = "batch",
    units: Units = "relative",
) -> Method:
    """Evolution strategies whose members have low-rank noise (Sarkar et al. 2025).

        u_j = A_j B_j^T / sqrt(rank),  l+-_j = L(theta +- eps u_j),  s = std of all l
        theta <- theta - lr mean_j (l+_j - l-_j) / (2 s) u_j

    A member's linear layer is y = x W^T + (eps / sqrt(rank)) (x B) A^T: no weight is perturbed,
    and a direction costs `rank` products with a vector, so that directions="example" gives each
    example its own on whole models. Tensors that are no matrices are drawn Gaussian.

    `zscore` divides by s, the losses' spread, which makes a step's length follow lr alone; one
    query then gives a sign. Without it c = (l+ - l-) / (2 eps). With other `directions` the rms
    of the coefficients takes the place of s, because examples differ in loss by themselves.

    Defaults are ours and relative: no values that carry over were found. The released code
    multiplies the step by sqrt(2 q) where `zscore` is as here: lr = its lr sqrt(2 queries).
    Changed: fresh noise at every step (the code's default repeats it each epoch), and embeddings
    are tuned too.

    >>> eggroll(queries=4).forwards
    8
    """
    measure, shaping = estimator(directions, eps, queries), (Standardize(),) if zscore else ()
    if zscore and directions == "batch":
        measure, shaping = Fitness(eps, queries), ()
    return Method(
        "eggroll",
        measure,
        LowRank(rank),
        shaping=shaping,
        lr=lr,
        schedule=Schedule(schedule, warmup),
        weight_decay=weight_decay,
        units=units,
    )
