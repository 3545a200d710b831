"""ConMeZO: directions in a cone around a running mean of the estimates."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

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
class Cone(Perturbation):
    """u = cos(a) sqrt(d) m / ||m|| + sin(a) z, z Gaussian, over all blocks together.

    m is a running mean of what was estimated, d its length in numbers; until there is one, u = z.
    The angle a falls from pi/2 to `angle` in `narrow` steps. E[u] = cos(a) sqrt(d) m / ||m||.
    """

    angle: float = 1.35
    b1: float = 0.95
    narrow: int = 1000

    def __post_init__(self) -> None:
        if not 0 < self.angle <= math.pi / 2:
            raise BadInput(f"angle={self.angle}; want 0 < angle <= pi/2 (radians)")
        if not 0 <= self.b1 < 1:
            raise BadInput(f"b1={self.b1}; want 0 <= b1 < 1")
        if self.narrow < 0:
            raise BadInput(f"narrow={self.narrow}; want 0 or more steps")

    def angle_at(self, step: int) -> float:
        """The angle in force.

        >>> Cone(angle=1.0, narrow=10).angle_at(10)
        1.0
        """
        share = min(1.0, step / self.narrow) if self.narrow else 1.0
        return math.pi / 2 + share * (self.angle - math.pi / 2)

    def state(self, block: Block) -> dict[str, Tensor]:
        return {
            "m": torch.zeros(block.shape, device=block.device),
            "gain": torch.zeros((), dtype=torch.float64),  # sqrt(d) / ||m||, 0 while m is
        }

    def draw(self, key: Key, block: Block, start: int = 0, stop: int | None = None) -> Tensor:
        stop = block.rows if stop is None else stop
        return self.combine([key], [1.0], block, start, stop)

    def draw_rows(self, key: Key, block: Block, rows: Sequence[int]) -> Tensor:
        along, across = self._parts(key, block)
        z = Gaussian().draw_rows(key, block, rows).mul_(across)
        return z.add_(block.memory["m"][list(rows)], alpha=along)

    def combine(
        self,
        keys: Sequence[Key],
        coefficients: Sequence[float],
        block: Block,
        start: int,
        stop: int,
    ) -> Tensor:
        along, across = self._parts(keys[0], block)
        g = Gaussian().combine(keys, [c * across for c in coefficients], block, start, stop)
        here = slice(start, stop) if block.shape else ...
        return g.add_(block.memory["m"][here], alpha=along * sum(coefficients))

    def _parts(self, key: Key, block: Block) -> tuple[float, float]:
        """What m and z are multiplied by."""
        gain, angle = float(block.memory["gain"]), self.angle_at(key.step)
        return (math.cos(angle) * gain, math.sin(angle)) if gain else (0.0, 1.0)

    def learn_(self, space: Space, estimate: Estimate) -> None:
        """m <- b1 m + (1 - b1) mean_k c_k u_k, in the coordinates that probes move in."""
        share = (1 - self.b1) / len(estimate.keys)
        weights = [c * share for c in estimate.coefficients]
        squares = 0.0
        for block in space.probed:
            for start, stop in runs(block):
                g = self.combine(estimate.keys, weights, block, start, stop)
                m = block.memory["m"][start:stop] if block.shape else block.memory["m"]
                squares += float(m.mul_(self.b1).add_(g).double().square().sum())
        d = sum(block.numel for block in space.probed)
        for block in space.probed:
            block.memory["gain"].fill_(math.sqrt(d / squares) if squares else 0.0)


@method(
    paper="ConMeZO: Adaptive Descent-Direction Sampling for Gradient-Free Finetuning of Large "
    "Language Models",
    year=2025,
    arxiv="2511.02757",
    spaces=(*FLOATS, "codes"),
    memory="one float32 per tuned number, 8 bytes per block",
)
def conmezo(
    lr: float = 1e-7,
    eps: float = 1e-3,
    angle: float = 1.35,
    b1: float = 0.95,
    narrow: int = 1000,
    queries: int = 1,
    weight_decay: float = 0.0,
    schedule: Decay = "constant",
    warmup: int = 0,
    directions: str = "batch",
    units: Units = "absolute",
) -> Method:
    """SPSA along directions near the momentum (Behric et al. 2025).

        u = cos(a) sqrt(d) m / ||m|| + sin(a) z,  z ~ N(0, I),  over all d numbers together
        c = (L(theta + eps u) - L(theta - eps u)) / (2 eps)
        theta <- theta - lr c u,  m <- b1 m + (1 - b1) c u

    Defaults: the released commands for OPT. a falls from pi/2, where u = z, to `angle` in `narrow`
    steps, linearly, as in the authors' synthetic experiment; their runs on language models keep a
    and let b1 rise from 0.1 in the first 1000 steps instead. Changed: m starts at 0, with u = z
    until it has a direction (theirs starts at random); ||m|| is measured, not estimated; with
    several queries m takes their mean. The cone lies in each block's units, if those are relative.

    >>> conmezo(narrow=0).perturbation
    Cone(angle=1.35, b1=0.95, narrow=0)
    """
    return Method(
        "conmezo",
        estimator(directions, eps, queries),
        Cone(angle, b1, narrow),
        lr=lr,
        schedule=Schedule(schedule, warmup),
        weight_decay=weight_decay,
        units=units,
    )
