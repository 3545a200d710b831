"""ZO-AdaMU: the momentum is in the direction that is probed, not in what is made of it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zotune.core import noise
from zotune.core.block import Block
from zotune.core.estimator import Estimate, estimator
from zotune.core.method import Decay, Method, Schedule, Units
from zotune.core.moves import runs
from zotune.core.noise import Key
from zotune.core.perturbation import Gaussian, Perturbation
from zotune.core.space import Space
from zotune.errors import BadInput
from zotune.methods import FLOATS, method


@dataclass(frozen=True)
class MomentumGuided(Perturbation):
    """u = b1 z1 + (1 - b1) z2,  z1 ~ N(0, a),  z2 ~ N(m, 1 - a),  m <- mean_k sign(c_k) u_k.

    What is stepped along is u / sqrt(v + 1e-8), v = b2 z1^2 + (1 - b2) z2^2. a (`alpha`), b1 and b2
    are 1 for `flat` steps (u is Gaussian) and fall to their values in the next `anneal`. E[u u^T]
    is not I: u grows shorter or longer with them.
    """

    alpha: float = 0.01
    b1: float = 0.13
    b2: float = 0.01
    flat: int = 1024
    anneal: int = 15000

    def __post_init__(self) -> None:
        for name in ("alpha", "b1", "b2"):
            if not 0 <= getattr(self, name) <= 1:
                raise BadInput(f"{name}={getattr(self, name)}; want 0 <= {name} <= 1")
        if self.flat < 0 or self.anneal < 1:
            raise BadInput(f"flat={self.flat}, anneal={self.anneal}; want >= 0 and >= 1")

    def state(self, block: Block) -> dict[str, Tensor]:
        return {"m": torch.zeros(block.shape, device=block.device)}

    def at(self, end: float, step: int) -> float:
        """A weight that falls from 1 to `end` along half a cosine."""
        done = min(max(step - self.flat, 0) / self.anneal, 1.0)
        return end + (1 - end) * 0.5 * (1 + math.cos(math.pi * done))

    def _parts(self, key: Key, block: Block, start: int, stop: int | None) -> tuple[Tensor, Tensor]:
        """Rows start:stop of z1 and z2."""
        alpha, m = self.at(self.alpha, key.step), block.memory["m"]
        z1 = Gaussian().draw(key, block, start, stop).mul_(alpha**0.5)
        stop, width = block.rows if stop is None else stop, block.numel // max(block.rows, 1)
        z2 = noise.draw(
            "gaussian", key, f"{block.name}#m", start * width, stop * width, block.device
        ).view_as(z1)
        return z1, z2.mul_((1 - alpha) ** 0.5).add_(m[start:stop] if block.shape else m)

    def draw(self, key: Key, block: Block, start: int = 0, stop: int | None = None) -> Tensor:
        z1, z2 = self._parts(key, block, start, stop)
        b1 = self.at(self.b1, key.step)
        return z1.mul_(b1).add_(z2, alpha=1 - b1)

    def combine(
        self,
        keys: Sequence[Key],
        coefficients: Sequence[float],
        block: Block,
        start: int,
        stop: int,
    ) -> Tensor:
        total: Tensor | float = 0.0
        for key, c in zip(keys, coefficients, strict=True):
            z1, z2 = self._parts(key, block, start, stop)
            b1, b2 = self.at(self.b1, key.step), self.at(self.b2, key.step)
            v = b2 * z1.square() + (1 - b2) * z2.square()
            total = total + c * (b1 * z1 + (1 - b1) * z2) * v.add_(1e-8).rsqrt_()
        assert isinstance(total, Tensor)
        return total

    def learn_(self, space: Space, estimate: Estimate) -> None:
        signs = [math.copysign(1 / len(estimate.keys), c) for c in estimate.coefficients]
        for block in space.probed:
            for start, stop in runs(block):
                new = super().combine(estimate.keys, signs, block, start, stop)
                m = block.memory["m"]
                (m[start:stop] if block.shape else m).copy_(new)


@method(
    paper="ZO-AdaMU Optimizer: Adapting Perturbation by the Momentum and Uncertainty in "
    "Zeroth-order Optimization",
    year=2023,
    arxiv="2312.15184",
    spaces=FLOATS,
    memory="4 bytes per tuned element (the last direction)",
)
def zo_adamu(
    lr: float = 1e-6,
    eps: float = 1e-3,
    alpha: float = 0.01,
    b1: float = 0.13,
    b2: float = 0.01,
    flat: int = 1024,
    anneal: int = 15000,
    queries: int = 1,
    weight_decay: float = 0.0,
    schedule: Decay = "constant",
    warmup: int = 0,
    directions: str = "batch",
    units: Units = "absolute",
) -> Method:
    """SPSA along directions that remember the last ones, and Adam's denominator of them.

        z1 ~ N(0, a),  z2 ~ N(m, 1 - a),  u = b1 z1 + (1 - b1) z2,  v = b2 z1^2 + (1 - b2) z2^2
        c = (L(theta + eps u) - L(theta - eps u)) / (2 eps)
        theta <- theta - lr c u / sqrt(v + 1e-8),  m <- sign(c) u

    After Jiang et al. (AAAI 2024). a = `alpha`, b1 and b2 are 1 for `flat` steps, so that u is
    Gaussian and the step c sign(u); then they fall along half a cosine in `anneal` steps.

    Defaults are for 20,000 steps: the values at which the release's schedules would arrive if each
    kept its own count (they share one, and move it at every call). lr and eps are MeZO's. m is
    signed by c, and v not squared, as in the release. Changed: the release probes 0.1 z1 + 0.9 z2
    whatever b1; here u is what is probed.

    >>> round(zo_adamu().perturbation.at(0.01, 8524), 3)
    0.505
    """
    law = MomentumGuided(alpha, b1, b2, flat, anneal)
    return Method(
        "zo-adamu", estimator(directions, eps, queries), law, lr=lr,
        schedule=Schedule(schedule, warmup), weight_decay=weight_decay, units=units,
    )  # fmt: skip
