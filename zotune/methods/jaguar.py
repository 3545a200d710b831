"""JAGUAR: a random patch of each matrix is probed, and its slope remembered in a momentum."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from zotune.core import noise
from zotune.core.block import Block
from zotune.core.estimator import TwoSided
from zotune.core.method import Decay, Method, Schedule, Units
from zotune.core.noise import Key
from zotune.core.orthogonal import newton_schulz
from zotune.core.perturbation import Perturbation
from zotune.core.rule import Grads, MomentumSGD
from zotune.core.subspace import sides
from zotune.errors import BadInput
from zotune.methods import FLOATS, method


@dataclass(frozen=True)
class Patch(Perturbation):
    """u = 1 on a random `share` of the rows x a random `share` of the columns, 0 elsewhere.

    At least one row and one column; of a vector, a share of its entries. All entries have one
    sign, so E[u] is not 0: an estimate c u is no gradient, but the mean slope of a patch.
    """

    share: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise BadInput(f"share={self.share}; want 0 < share <= 1")

    def draw(self, key: Key, block: Block, start: int = 0, stop: int | None = None) -> Tensor:
        rows = self._chosen(key, block, "rows")[start:stop]
        shape = (len(rows), *block.shape[1:]) if block.shape else ()
        return torch.outer(rows, self._chosen(key, block, "columns")).view(shape)

    def draw_rows(self, key: Key, block: Block, rows: Sequence[int]) -> Tensor:
        chosen = self._chosen(key, block, "rows")[list(rows)]
        return torch.outer(chosen, self._chosen(key, block, "columns")).view(-1, *block.shape[1:])

    def _chosen(self, key: Key, block: Block, which: Literal["rows", "columns"]) -> Tensor:
        size = sides(block)[which == "columns"]
        chance = noise.draw("uniform", key, f"{block.name}#{which}", 0, size, block.device)
        first = chance.argsort(stable=True)[: max(1, int(self.share * size))]
        return torch.zeros(size, device=block.device).index_fill_(0, first, 1.0)


@dataclass(frozen=True)
class PatchMomentum(MomentumSGD):
    """m <- b1 m + (1 - b1) g where g is not 0, elsewhere m stays; step = lr sign(m)."""

    def step(
        self, grads: Grads, state: dict[str, Tensor], t: int, lr: float, block: Block, start: int
    ) -> Tensor:
        g, m = grads(0), state["m"]
        m.copy_(torch.where(g != 0, torch.lerp(g, m, self.b1), m))
        return m.sign().mul_(lr)


@dataclass(frozen=True)
class PatchMuon(PatchMomentum):
    """The same momentum, step = lr NS5(m)."""

    whole: ClassVar[bool] = True

    def step(
        self, grads: Grads, state: dict[str, Tensor], t: int, lr: float, block: Block, start: int
    ) -> Tensor:
        super().step(grads, state, t, lr, block, start)
        return newton_schulz(state["m"]).mul_(lr)


@method(
    paper="Leveraging Coordinate Momentum in SignSGD and Muon: Memory-Optimized Zero-Order",
    year=2025,
    arxiv="2506.04430",
    spaces=("lora", *FLOATS, "codes"),
    memory="one float32 per tuned number",
)
def jaguar(
    lr: float = 1e-4,
    eps: float = 1e-3,
    share: float = 0.1,
    update: Literal["sign", "muon"] = "sign",
    b1: float = 0.9,
    queries: int = 1,
    weight_decay: float = 0.0,
    schedule: Decay = "linear",
    warmup: int = 0,
    units: Units = "absolute",
) -> Method:
    """Coordinate momentum with sign or Muon steps (Petrov et al. 2025).

        c = (L(W + eps 1_S) - L(W - eps 1_S)) / (2 eps),  S a random `share` of rows x of columns
        m[S] <- b1 m[S] + (1 - b1) c,  W <- W - lr sign(m),  or W <- W - lr NS5(m)

    All of W moves, along what was last found of each entry. share and b1 are the released code's,
    eps its later versions'; lr is ours, as is the schedule (a step of constant length needs one);
    for update="muon" lr is the spectral norm of a step, so wants to be about 100 times larger.
    Changed: with several queries m sees their mean, on every entry that one of them probed; a
    slope of exactly 0 leaves m as it is; for "muon" a vector moves by lr m / ||m||, a matrix of
    one row (the released code: by its sign).

    >>> jaguar(update="muon").rule
    PatchMuon(b1=0.9)
    """
    rules = {"sign": PatchMomentum, "muon": PatchMuon}
    if update not in rules:
        raise BadInput(f"update={update!r}; want one of {', '.join(rules)}")
    return Method(
        "jaguar",
        TwoSided(eps, queries),
        Patch(share),
        rules[update](b1),
        lr=lr,
        schedule=Schedule(schedule, warmup),
        weight_decay=weight_decay,
        units=units,
    )
