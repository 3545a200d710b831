"""DP-ZO: directions are public noise, so only one number per direction has to be made private."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from zotune.core import secret
from zotune.core.estimator import Estimate, Estimator, TwoSided
from zotune.core.method import Decay, Method, Schedule, Units
from zotune.core.noise import Key
from zotune.core.probe import Losses, Probe
from zotune.core.secret import Law
from zotune.core.space import Space
from zotune.errors import BadInput
from zotune.methods import FLOATS, method

GRID = 1 << 48  # one `clip`, in the whole numbers that are summed and noised


@dataclass(frozen=True)
class Private(Estimator):
    """c = (sum_x D_x min(1, clip / |D_x|) + noise clip z) / batch, D_x = (l+ - l-)(x) / (2 eps).

    z is standard normal, or Laplace of scale 1. `batch` is the expected size of a batch, never
    the real one. With several queries D_x and z are vectors and |D_x| is the l2 norm, for Laplace
    the l1 norm. noise=None waits for what (`epsilon`, `delta`) asks of a run.
    """

    clip: float = 200.0
    noise: float | None = 1.0
    mechanism: Law = "gaussian"
    batch: int = 16
    epsilon: float | None = None
    delta: float = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mechanism not in ("gaussian", "laplace"):
            raise BadInput(f"mechanism={self.mechanism!r}; want 'gaussian' or 'laplace'")
        if not 0 < self.clip < math.inf or self.batch < 1:
            raise BadInput(f"clip={self.clip}, batch_size={self.batch}; want both finite and > 0")
        if self.noise is not None and not 0 <= self.noise < math.inf:
            raise BadInput(f"noise={self.noise}; want a finite noise >= 0, counted in clips")
        if self.epsilon is not None and not 0 < self.epsilon < math.inf:
            raise BadInput(f"epsilon={self.epsilon}; want a finite epsilon > 0")
        if not (0 < self.delta < 1 or (self.delta == 0 and self.mechanism == "laplace")):
            raise BadInput(f"delta={self.delta}; want 0 < delta < 1, or 0 with mechanism='laplace'")

    @property
    def forwards(self) -> int:
        return 2 * self.queries

    def check(self, space: Space) -> None:
        exact = [b.name for b in space if b.exact]
        if exact:
            raise BadInput(f"the exact gradient of {exact[0]!r} gets no privacy noise; drop exact")
        if self.noise is None:
            raise BadInput(
                f"the noise for epsilon={self.epsilon} follows from a run's steps and examples: "
                "zotune.training.privacy.planned finds it; or give noise instead"
            )

    def ask(self, key: Key) -> list[Probe]:
        return TwoSided(self.eps, self.queries).ask(key)

    def tell(self, key: Key, losses: Losses) -> Estimate:
        """Noised coefficients and nothing else: the loss is withheld (0), there is no signal."""
        assert self.noise is not None
        pairs = losses.per_example.reshape(self.queries, 2, losses.per_example.shape[1])
        total = self.clipped((pairs[:, 0] - pairs[:, 1]) / (2 * self.eps))
        scale = math.ceil(self.noise * GRID)
        noised = [part + secret.noise(self.mechanism, scale) for part in total]
        return self.rebuild(key, [part / GRID * self.clip / self.batch for part in noised], 0.0)

    def clipped(self, slopes: Tensor) -> list[int]:
        """sum_x D_x min(1, clip / |D_x|) in units of clip / GRID, from D (queries, examples).

        One example more or less moves it by at most GRID, exactly: sums are of whole numbers. A
        slope that is no number counts 0, an infinite one is clipped like any other large one.
        """
        units = (slopes / self.clip).nan_to_num(nan=0.0).clamp(-1e6, 1e6) * GRID
        total = [0] * self.queries
        for example in units.T.tolist():
            d = [int(value) for value in example]
            length = max(GRID, self._length(d))
            d = [abs(value) * GRID // length * (1 if value > 0 else -1) for value in d]
            total = [a + b for a, b in zip(total, d, strict=True)]
        return total

    def _length(self, d: list[int]) -> int:
        """The norm that the noise hides, rounded up."""
        if self.mechanism == "laplace":
            return sum(map(abs, d))
        return math.isqrt(max(0, sum(value * value for value in d) - 1)) + 1


@method(
    paper="Private Fine-tuning of Large Language Models with Zeroth-order Optimization",
    year=2024,
    arxiv="2401.04343",
    spaces=(*FLOATS, "codes"),
    memory="none",
)
def dp_zo(
    lr: float = 1e-6,
    eps: float = 1e-3,
    clip: float = 200.0,
    noise: float | None = None,
    epsilon: float | None = None,
    delta: float | None = None,
    mechanism: Law = "gaussian",
    batch_size: int = 16,
    queries: int = 1,
    weight_decay: float = 0.0,
    schedule: Decay = "constant",
    warmup: int = 0,
    units: Units = "absolute",
) -> Method:
    """MeZO under differential privacy: u is public, the number along it is not (Tang et al. 2024).

        D_x = (l_x(theta + eps u) - l_x(theta - eps u)) / (2 eps),  examples x drawn with rate b / n
        theta <- theta - (lr / b) (sum_x D_x min(1, clip / |D_x|) + N(0, noise^2 clip^2)) u

    mechanism="laplace" adds Lap(noise clip) instead, for delta = 0. `batch_size` is b, the expected
    batch; a training run puts its own there. Give `noise` (1), or `epsilon` to have it found from
    the run's steps, b and n; `delta` is 1e-5 (Laplace: 0). A training run guarantees (epsilon,
    delta) for adding or removing one example: see `zotune.training.privacy`.

    Defaults: clip, eps, lr of DPZero (arXiv 2310.09639) on RoBERTa; the paper's were not found.
    Changed: every example counts alike, however many its tokens; sum and noise are whole numbers
    of clip 2^-48; several queries share one clip by their joint norm.

    >>> dp_zo(epsilon=2.0).estimator.noise is None
    True
    """
    if noise is not None and epsilon is not None:
        raise BadInput(f"noise={noise} and epsilon={epsilon} are both given; keep one")
    noise = 1.0 if noise is None and epsilon is None else noise
    delta = {"laplace": 0.0}.get(mechanism, 1e-5) if delta is None else delta
    return Method(
        "dp-zo",
        Private(eps, queries, clip, noise, mechanism, batch_size, epsilon, delta),
        lr=lr,
        schedule=Schedule(schedule, warmup),
        weight_decay=weight_decay,
        units=units,
    )
