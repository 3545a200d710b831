"""LOZO: low-rank directions whose right factor stays for many steps."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from zotune.core import noise
from zotune.core.block import Block
from zotune.core.estimator import estimator
from zotune.core.method import Decay, Method, Schedule, Units
from zotune.core.noise import Key
from zotune.core.rule import SGD, MomentumSGD
from zotune.core.subspace import Factored, epoch, product, sides
from zotune.errors import BadInput
from zotune.methods import method


@dataclass(frozen=True)
class LazyLowRank(Factored):
    """u = U V^T: U (m x rank) Gaussian anew, V (n x rank) Gaussian anew every `refresh` steps.

    E[u u^T] = rank I, so g = sum_k c_k u_k / rank. Blocks that are not matrices, or not larger
    than the factors, are drawn Gaussian.
    """

    rank: int = 2
    refresh: int = 50

    def __post_init__(self) -> None:
        if self.rank < 1 or self.refresh < 1:
            raise BadInput(f"rank={self.rank}, refresh={self.refresh}; want both at least 1")

    def inner(self, block: Block) -> tuple[int, ...] | None:
        return (block.rows, self.rank) if min(sides(block)) > self.rank else None

    def left(self, z: Tensor, key: Key, block: Block, start: int, stop: int) -> Tensor:
        return z[start:stop]

    def right(self, z: Tensor, key: Key, block: Block) -> Tensor:
        name, count = f"{block.name}#v", self.rank * sides(block)[1]
        v = noise.draw("gaussian", epoch(key, self.refresh), name, 0, count, block.device)
        return v.view(self.rank, -1)

    def combine_inner(
        self, keys: Sequence[Key], coefficients: Sequence[float], block: Block
    ) -> Tensor:
        return super().combine_inner(keys, coefficients, block).div_(self.rank)

    def carry(self, z: Tensor, block: Block, old: Key, new: Key) -> Tensor:
        """N V^T V' / n: the same momentum as well as the new V can say it, since V'^T V' ~ n I."""
        if epoch(old, self.refresh) == epoch(new, self.refresh):
            return z
        change = product(self.right(z, old, block), self.right(z, new, block).mT)
        return product(z, change / sides(block)[1])


@method(
    paper="Enhancing Zeroth-order Fine-tuning for Language Models with Low-rank Structures",
    year=2024,
    arxiv="2410.07698",
    spaces=("weights", "lora", "head", "codes", "latents"),
    memory="none; momentum: m x rank float32 per m x n matrix, one per number of other blocks",
)
def lozo(
    lr: float = 1e-6,
    eps: float = 1e-3,
    rank: int = 2,
    refresh: int = 50,
    momentum: float = 0.0,
    queries: int = 1,
    weight_decay: float = 0.0,
    schedule: Decay = "constant",
    warmup: int = 0,
    directions: str = "batch",
    units: Units = "absolute",
) -> Method:
    """Low-rank SPSA with lazily sampled subspaces (Chen et al. 2024); LOZO-M with `momentum` > 0.

        c = (L(W + eps U V^T) - L(W - eps U V^T)) / (2 eps),  V anew every `refresh` steps
        W <- W - lr c U V^T / rank
        LOZO-M: N <- momentum N + (1 - momentum) c U,  W <- W - lr N V^T / rank
                with N <- N V^T V' / n when V' follows V

    Defaults: among the paper's (lr 1e-7, 1e-6; rank 1, 2; refresh 50, 100; eps 1e-3). The division
    by the rank is the paper's; the released code leaves it out: lr=x there is lr=rank * x here.
    Changed: on refresh steps too the update goes along the direction that was probed (the released
    code draws in another order there and steps along unrelated noise); N starts at 0.

    >>> lozo(rank=4).perturbation
    LazyLowRank(rank=4, refresh=50)
    """
    return Method(
        "lozo",
        estimator(directions, eps, queries),
        LazyLowRank(rank, refresh),
        MomentumSGD(momentum) if momentum else SGD(),
        lr=lr,
        schedule=Schedule(schedule, warmup),
        weight_decay=weight_decay,
        units=units,
    )
