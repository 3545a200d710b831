"""TeZO: two factors for the whole run, and only their r weights drawn, remembered and stepped."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from zotune.core import noise
from zotune.core.block import Block
from zotune.core.estimator import estimator
from zotune.core.method import Decay, Method, Schedule, Units
from zotune.core.noise import Key
from zotune.core.rule import SGD, Adam, MomentumSGD, Rule
from zotune.core.space import Space
from zotune.core.subspace import Factored, sides
from zotune.errors import BadInput
from zotune.methods import method


@dataclass(frozen=True)
class FixedFactors(Factored):
    """u = U diag(t) V^T / sqrt(rank): t (rank) Gaussian anew, U and V Gaussian, once per run.

    E[u u^T] = I over the factors, but one run moves every matrix in `rank` dimensions only. The
    factors are drawn again, never kept. Vectors are drawn Gaussian.
    """

    rank: int = 32

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise BadInput(f"rank={self.rank}; want rank >= 1")

    def notes(self, space: Space) -> list[str]:
        found = [b for b in space.probed if self.inner(b) is not None]
        numbers = sum(b.numel for b in found)
        return [
            f"the whole run searches {self.rank} fixed dimensions in each of {len(found)} "
            f"matrices, {self.rank * len(found)} for {numbers} weights; it never looks outside"
        ]

    def inner(self, block: Block) -> tuple[int, ...] | None:
        return (self.rank,) if min(sides(block)) > 1 else None

    def left(self, z: Tensor, key: Key, block: Block, start: int, stop: int) -> Tensor:
        return self._factor(key, block, "u", start, stop) * z

    def right(self, z: Tensor, key: Key, block: Block) -> Tensor:
        return self._factor(key, block, "v", 0, sides(block)[1]).mT * self.rank**-0.5

    def _factor(self, key: Key, block: Block, which: str, start: int, stop: int) -> Tensor:
        r, name = self.rank, f"{block.name}#{which}"
        drawn = noise.draw("gaussian", Key(key.seed), name, start * r, stop * r, block.device)
        return drawn.view(-1, r)


@method(
    paper="TeZO: Empowering the Low-Rankness on the Temporal Dimension in the Zeroth-Order "
    "Optimization for Fine-tuning LLMs",
    year=2025,
    arxiv="2501.19057",
    spaces=("weights", "lora", "adapter", "head", "latents"),
    memory="adam 2, momentum 1, sgd 0 float32, each per number of t and of other blocks",
)
def tezo(
    lr: float = 1e-5,
    eps: float = 1e-3,
    rank: int = 32,
    rule: Literal["adam", "momentum", "sgd"] = "adam",
    b1: float = 0.9,
    b2: float = 0.999,
    queries: int = 1,
    weight_decay: float = 0.0,
    schedule: Decay = "constant",
    warmup: int = 0,
    directions: str = "batch",
    units: Units = "absolute",
) -> Method:
    """SPSA along U diag(t) V^T with fixed U and V; the `rule` acts on t alone (Sun et al. 2025).

        u = U diag(t) V^T / sqrt(r),  c = (L(W + eps u) - L(W - eps u)) / (2 eps),  r = `rank`
        adam: m = mean_b1 c t,  v = mean_b2 (c t)^2,  W <- W - lr U diag(m / sqrt v) V^T / sqrt(r)
        momentum: W <- W - lr U diag(m) V^T / sqrt(r);  sgd: W <- W - lr c u

    The search stays in r dimensions per matrix for the whole run, which is reported at its start.
    Changed: 1 / sqrt(r), so that eps and lr are MeZO's (the paper's lr could not be read: 1e-5
    lies among MeZO-Adam's); one rank for all matrices, where the paper chooses it layer by layer
    (31.5 in the mean); Adam's quotient is taken on t, the paper's of the laid out moments.

    >>> tezo(rule="momentum").rule
    MomentumSGD(b1=0.9)
    """
    rules: dict[str, Rule] = {"adam": Adam(b1, b2), "momentum": MomentumSGD(b1), "sgd": SGD()}
    if rule not in rules:
        raise BadInput(f"rule={rule!r}; want one of {', '.join(rules)}")
    return Method(
        "tezo",
        estimator(directions, eps, queries),
        FixedFactors(rank),
        rules[rule],
        lr=lr,
        schedule=Schedule(schedule, warmup),
        weight_decay=weight_decay,
        units=units,
    )
