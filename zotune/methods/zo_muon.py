"""ZO-Muon: a few queries in a random row space of each matrix, and an orthogonalized step."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from zotune.core.block import Block
from zotune.core.estimator import estimator
from zotune.core.method import Decay, Method, Schedule, Units
from zotune.core.noise import Key
from zotune.core.orthogonal import basis, newton_schulz, room
from zotune.core.rule import Grads, Rule
from zotune.core.subspace import Factored, epoch, sides
from zotune.errors import BadInput
from zotune.methods import method


@dataclass(frozen=True)
class RowSubspace(Factored):
    """u = P R: R (r x n) Gaussian anew, P (m x r) orthonormal and drawn every `refresh` steps.

    r = min(rank, m); E[u u^T] = r / m I over P. Vectors are drawn Gaussian. P is kept.
    """

    rank: int = 64
    refresh: int = 100

    def __post_init__(self) -> None:
        if self.rank < 1 or self.refresh < 1:
            raise BadInput(f"rank={self.rank}, refresh={self.refresh}; want both at least 1")

    def inner(self, block: Block) -> tuple[int, ...] | None:
        rows, columns = sides(block)
        return (min(self.rank, rows), columns) if min(rows, columns) > 1 else None

    def state(self, block: Block) -> dict[str, Tensor]:
        inside = self.inner(block)
        return {} if inside is None else room(block, "left", inside[0])

    def left(self, z: Tensor, key: Key, block: Block, start: int, stop: int) -> Tensor:
        return basis(epoch(key, self.refresh), block, "left", len(z))[start:stop]

    def right(self, z: Tensor, key: Key, block: Block) -> Tensor:
        return z


@dataclass(frozen=True)
class Muon(Rule):
    """step = lr NS5(g): about U V^T of g = U S V^T; of a vector lr g / ||g||, its exact case."""

    whole: ClassVar[bool] = True

    def step(
        self, grads: Grads, state: dict[str, Tensor], t: int, lr: float, block: Block, start: int
    ) -> Tensor:
        return newton_schulz(grads(0)).mul_(lr)


@method(
    paper="Powering Up Zeroth-Order Training via Subspace Gradient Orthogonalization",
    year=2026,
    arxiv="2602.17155",
    spaces=("weights", "lora", "adapter", "head", "latents"),
    memory="r m float32 and 16 bytes per m x n matrix, r = min(rank, m)",
)
def zo_muon(
    lr: float = 1e-2,
    eps: float = 1e-3,
    rank: int = 64,
    refresh: int = 100,
    queries: int = 4,
    weight_decay: float = 0.0,
    schedule: Decay = "constant",
    warmup: int = 0,
    directions: str = "one-sided",
    units: Units = "absolute",
) -> Method:
    """Orthogonalized subspace estimates (Lang et al. 2026).

        c_k = (L(W + eps P R_k) - L(W)) / eps,  P m x r orthonormal, anew every `refresh` steps
        W <- W - lr P NS5(mean_k c_k R_k),  r = `rank`

    NS5 is Muon's: five quintic Newton-Schulz iterations, in float32. Defaults: the released
    command for OPT-13B. One direction for all has a single coefficient, whose size NS5 would
    throw away, so at least two queries are asked for. Changed: on refresh steps all queries and
    the update share one P (the released code keeps the last query's); vectors move by
    lr g / ||g||, a matrix of one row (the released code gives them plain SGD with lr 1e-7).

    >>> zo_muon().forwards
    5
    """
    if queries < 2 and directions != "example":
        raise BadInput(
            f"queries={queries} leaves one direction a step, of which orthogonalization keeps the "
            "sign only; use queries >= 2, or directions='example'"
        )
    return Method(
        "zo-muon",
        estimator(directions, eps, queries),
        RowSubspace(rank, refresh),
        Muon(),
        lr=lr,
        schedule=Schedule(schedule, warmup),
        weight_decay=weight_decay,
        units=units,
    )
