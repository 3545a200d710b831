"""SubZero: a small Gaussian matrix between two orthonormal bases that stay for many steps."""

from dataclasses import dataclass

from torch import Tensor

from zotune.core.block import Block
from zotune.core.estimator import estimator
from zotune.core.method import Decay, Method, Schedule, Units
from zotune.core.noise import Key
from zotune.core.orthogonal import basis, room
from zotune.core.subspace import Factored, epoch, product, sides
from zotune.errors import BadInput
from zotune.methods import method


@dataclass(frozen=True)
class RandomSubspace(Factored):
    """u = U Z V^T sqrt(m n) / r, Z (r x r) Gaussian anew, U (m x r) and V (n x r) orthonormal and
    drawn every `refresh` steps; E||u||^2 = m n, as if u were Gaussian.

    r = min(rank, m, n). Vectors are drawn Gaussian. The bases in use are kept.
    """

    rank: int = 64
    refresh: int = 1000

    def __post_init__(self) -> None:
        if self.rank < 1 or self.refresh < 1:
            raise BadInput(f"rank={self.rank}, refresh={self.refresh}; want both at least 1")

    def inner(self, block: Block) -> tuple[int, ...] | None:
        r = min(self.rank, *sides(block))
        return (r, r) if min(sides(block)) > 1 else None

    def state(self, block: Block) -> dict[str, Tensor]:
        if self.inner(block) is None:
            return {}
        r = min(self.rank, *sides(block))
        return room(block, "left", r) | room(block, "right", r)

    def left(self, z: Tensor, key: Key, block: Block, start: int, stop: int) -> Tensor:
        return basis(epoch(key, self.refresh), block, "left", len(z))[start:stop]

    def right(self, z: Tensor, key: Key, block: Block) -> Tensor:
        v = basis(epoch(key, self.refresh), block, "right", len(z))
        return product(z, v.mT) * (block.numel**0.5 / len(z))


@method(
    paper="Zeroth-Order Fine-Tuning of LLMs in Random Subspaces",
    year=2024,
    arxiv="2410.08989",
    spaces=("weights", "lora", "adapter", "head", "codes", "latents"),
    memory="r (m + n) float32 and 32 bytes per m x n matrix, r = min(rank, m, n)",
)
def subzero(
    lr: float = 1e-6,
    eps: float = 1e-3,
    rank: int = 64,
    refresh: int = 1000,
    queries: int = 1,
    weight_decay: float = 0.0,
    schedule: Decay = "constant",
    warmup: int = 0,
    directions: str = "batch",
    units: Units = "absolute",
) -> Method:
    """SPSA in random subspaces of each weight matrix (Yu et al. 2024).

        c = (L(W + eps u) - L(W - eps u)) / (2 eps),  u = U Z V^T sqrt(m n / r^2)
        W <- W - lr c u,  r = `rank`, U and V orthonormal, anew every `refresh` steps

    Defaults: within the ranges of the released scripts (rank 24 to 128, refresh 500 to 2000); the
    factor lets MeZO's lr and eps carry over. Changed: a matrix smaller than the rank takes as much
    rank as it has, where the released code reshapes small matrices of adapters to nearly square;
    QR has fixed signs, which makes the bases uniform.

    >>> subzero(rank=24).perturbation
    RandomSubspace(rank=24, refresh=1000)
    """
    return Method(
        "subzero",
        estimator(directions, eps, queries),
        RandomSubspace(rank, refresh),
        lr=lr,
        schedule=Schedule(schedule, warmup),
        weight_decay=weight_decay,
        units=units,
    )
