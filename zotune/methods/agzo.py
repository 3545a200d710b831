"""AGZO: probe a linear layer only where its gradient can be, in the span of its inputs."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from zotune.core import noise
from zotune.core.block import Block
from zotune.core.estimator import estimator
from zotune.core.method import Decay, Method, Schedule, Units
from zotune.core.noise import Key
from zotune.core.spaces.lora import sizes
from zotune.core.subspace import Factored
from zotune.errors import BadInput
from zotune.methods import method
from zotune.quant.linear import is_conv1d

Others = Literal["balanced", "gaussian"]


@dataclass(frozen=True)
class ActivationGuided(Factored):
    """u = R A^T on weights of linear layers: R (out, rank) Gaussian, A (in, rank) orthonormal, the
    leading directions of what flows into the layer at the base point of this batch.

    E||u||^2 = out rank, not out in. Other blocks are z, or z sqrt(rank / columns) where
    others="balanced", so that a row of an embedding weighs as much as a row of a linear layer.
    """

    observes: ClassVar[bool] = True

    rank: int = 1
    power: int = 3
    others: Others = "balanced"
    _last: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.rank < 1 or self.power < 1:
            raise BadInput(f"rank={self.rank}, power={self.power}; want both at least 1")
        if self.others not in get_args(Others):
            raise BadInput(f"others={self.others!r}; want one of {', '.join(get_args(Others))}")

    def inner(self, block: Block) -> tuple[int, ...] | None:
        linear = [isinstance(o.module, nn.Linear) or is_conv1d(o.module) for o in block.owners]
        if len(block.shape) != 2 or not linear or not all(linear):
            return None
        inputs, outputs = sizes(block.owners[0].module)
        return (outputs, self.rank) if self.rank <= inputs else None

    def state(self, block: Block) -> dict[str, Tensor]:
        shape = self.inner(block)
        if shape is None:
            return {}
        return {"seen": torch.zeros(block.numel // shape[0], self.rank, device=block.device)}

    def begin_(self, block: Block) -> None:
        self._last.clear()
        if "seen" in block.memory:
            block.memory["seen"].zero_()

    def observe_(self, block: Block, x: Tensor) -> None:
        """Layers that read the same tensor (query, key, value) share one computation."""
        if self.inner(block) is None:
            return
        seen = block.memory["seen"]
        if self._last and self._last["x"]() is x:
            seen.copy_(self._last["seen"])
            return
        # An overflow costs the step by its loss, or is a row that the loss does not see.
        rows = x.detach().float().flatten(0, -2).nan_to_num(0.0, 0.0, 0.0)
        seen.copy_(leading(torch.cat([seen.mT, rows]), self.rank, self.power))
        self._last.update(x=weakref.ref(x), seen=seen)

    def basis(self, block: Block) -> Tensor:
        """A (in, rank), orthonormal."""
        return torch.linalg.qr(block.memory["seen"]).Q

    def left(self, z: Tensor, key: Key, block: Block, start: int, stop: int) -> Tensor:
        return (self.basis(block) if _conv1d(block) else z)[start:stop]

    def right(self, z: Tensor, key: Key, block: Block) -> Tensor:
        return (z if _conv1d(block) else self.basis(block)).mT

    def share(self, block: Block) -> float:
        balanced = min(1.0, self.rank * block.rows / max(block.numel, 1)) ** 0.5
        return balanced if self.others == "balanced" else 1.0


def leading(rows: Tensor, rank: int, power: int) -> Tensor:
    """(columns, rank): what the rows come to in the leading directions of their span, so that it
    stands for them when another piece of the batch joins."""
    start = noise.draw("gaussian", Key(0), "basis", 0, rows.shape[1] * rank, rows.device)
    a = start.view(-1, rank)
    for _ in range(power):
        a = torch.linalg.qr(rows.mT @ (rows @ a)).Q
    return a @ torch.linalg.qr(rows @ a).R.mT


def _conv1d(block: Block) -> bool:
    """A weight that lies (in, out), as GPT-2's do."""
    return is_conv1d(block.owners[0].module)


@method(
    paper="AGZO: Activation-Guided Zeroth-Order Optimization for LLM Fine-Tuning",
    year=2026,
    arxiv="2601.17261",
    spaces=("weights", "head"),
    memory="`rank` float32 per input of each linear layer",
)
def agzo(
    lr: float = 1e-6,
    eps: float = 1e-3,
    rank: int = 1,
    power: int = 3,
    others: Others = "balanced",
    queries: int = 1,
    weight_decay: float = 0.0,
    schedule: Decay = "constant",
    warmup: int = 0,
    directions: str = "one-sided",
    units: Units = "absolute",
) -> Method:
    """One-sided probes along u = R A^T, A from the pass that gives L(theta) (Lin et al. 2026).

        A <- the `rank` leading directions of a linear layer's inputs, by `power` iterations and QR
        c = (L(theta + eps u) - L(theta)) / eps,  u = R A^T, R ~ N(0, I);  theta <- theta - lr c u

    Rows of a linear layer's gradient G lie in the span of its inputs: cos^2(u, G) is that of dense
    noise times (||G A||^2 / ||G||^2) (in / rank). Micro-batches refine A piece by piece.

    rank and power are the paper's; its lr could not be found and its eps (1e-7, 1e-4 in bfloat16)
    is lost in rounding, so both are MeZO's. Changed: the paper's N(0, I) on all other blocks,
    others="gaussian", lets an embedding dominate u.

    >>> agzo().forwards
    2
    """
    return Method(
        "agzo", estimator(directions, eps, queries), ActivationGuided(rank, power, others), lr=lr,
        schedule=Schedule(schedule, warmup), weight_decay=weight_decay, units=units,
    )  # fmt: skip
