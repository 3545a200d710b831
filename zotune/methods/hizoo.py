"""HiZOO: directions shaped by a running estimate of the curvature of every weight."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zotune.core.block import Block
from zotune.core.estimator import Estimate, Estimator, signal
from zotune.core.method import Decay, Method, Schedule, Units
from zotune.core.moves import runs
from zotune.core.noise import Key
from zotune.core.perturbation import Gaussian, Perturbation
from zotune.core.probe import Losses, Probe
from zotune.core.space import Space
from zotune.errors import BadInput
from zotune.methods import FLOATS, method


@dataclass(frozen=True)
class SecondDifference(Estimator):
    """Both sides and the base point: c_j as a central difference, and behind all of them

        h_j = |L(+eps u_j) + L(-eps u_j) - 2 L(0)| / (2 eps^2)

    >>> SecondDifference(eps=0.5).tell(Key(0), Losses.of([1.0, 3.0, 1.5])).scalars
    (1.5, 5.0)
    """

    @property
    def forwards(self) -> int:
        return 1 + 2 * self.queries

    def count(self, examples: int) -> int:
        return 2 * self.queries

    def ask(self, key: Key) -> list[Probe]:
        keys = self.keys(key, self.queries)
        sides = [Probe(k, step) for k in keys for step in (self.eps, -self.eps)]
        return [Probe(keys[0], 0.0), *sides]

    def tell(self, key: Key, losses: Losses) -> Estimate:
        base, pairs = losses.mean[0], losses.mean[1:].view(-1, 2)
        slopes = (pairs[:, 0] - pairs[:, 1]) / (2 * self.eps)
        bends = (pairs.sum(1) - 2 * base).abs() / (2 * self.eps**2)
        each = losses.per_example[1:].view(self.queries, 2, -1)
        told = signal(each[:, 0] - each[:, 1], losses.weights)
        return self._estimate(key, torch.cat([slopes, bends]), base, told)

    def rebuild(self, key: Key, scalars: Sequence[float], loss: float) -> Estimate:
        q, values = self.queries, tuple(scalars)
        return Estimate(key, self.keys(key, q), values[:q], loss, extras=values[q:])


@dataclass(frozen=True)
class Curved(Perturbation):
    """u = z / sqrt(H): short along weights of high curvature H, which each step corrects.

    H <- (1 - smoothing) H + smoothing mean_j h_j H z_j^2, H = 1 at first; h from the estimate. What
    is kept is log H, to which a change far below the rounding of H still adds.
    """

    smoothing: float = 1e-8

    def __post_init__(self) -> None:
        if not 0 <= self.smoothing < 1:
            raise BadInput(f"smoothing={self.smoothing}; want 0 <= smoothing < 1")

    def state(self, block: Block) -> dict[str, Tensor]:
        return {"log_curvature": torch.zeros(block.shape, device=block.device)}

    def draw(self, key: Key, block: Block, start: int = 0, stop: int | None = None) -> Tensor:
        return _shaped(Gaussian().draw(key, block, start, stop), _rows(block, start, stop))

    def draw_rows(self, key: Key, block: Block, rows: Sequence[int]) -> Tensor:
        held = block.memory["log_curvature"][list(rows)]
        return _shaped(Gaussian().draw_rows(key, block, rows), held)

    def combine(
        self,
        keys: Sequence[Key],
        coefficients: Sequence[float],
        block: Block,
        start: int,
        stop: int,
    ) -> Tensor:
        z = Gaussian().combine(keys, coefficients, block, start, stop)
        return _shaped(z, _rows(block, start, stop))

    def learn_(self, space: Space, estimate: Estimate) -> None:
        for block in space.probed:
            share = 1 / (len(estimate.keys) * block.eps_ratio**2)
            for start, stop in runs(block):
                held = _rows(block, start, stop)
                growth = torch.full_like(held, -self.smoothing)
                for key, bend in zip(estimate.keys, estimate.extras, strict=True):
                    z = Gaussian().draw(key, block, start, stop)
                    growth.addcmul_(z, z, value=self.smoothing * share * bend)
                held.add_(growth.log1p_())


def _rows(block: Block, start: int, stop: int | None) -> Tensor:
    held = block.memory["log_curvature"]
    return held[start:stop] if block.shape else held


def _shaped(z: Tensor, held: Tensor) -> Tensor:
    return z.mul_((-0.5 * held).exp_())


@method(
    paper="Second-Order Fine-Tuning without Pain for LLMs: A Hessian Informed Zeroth-Order "
    "Optimizer",
    year=2024,
    arxiv="2402.15173",
    spaces=FLOATS,
    memory="4 bytes per tuned element (its curvature)",
)
def hizoo(
    lr: float = 1e-6,
    eps: float = 1e-3,
    smoothing: float = 1e-8,
    queries: int = 1,
    weight_decay: float = 0.0,
    schedule: Decay = "constant",
    warmup: int = 0,
    units: Units = "absolute",
) -> Method:
    """SPSA along directions scaled by a diagonal Hessian estimate (Zhao et al. 2024).

        u = z / sqrt(H),  z ~ N(0, I),  c = (l+ - l-) / (2 eps);  theta <- theta - lr c u
        H <- (1 - smoothing) H + smoothing |l+ + l- - 2 l0| / (2 eps^2) H z^2

    H moves behind the step, so that one H is probed and stepped with. Three forwards a step.

    Defaults: smoothing is that of the release's example (its script's own is 0, plain MeZO), the
    others are MeZO's. Changed: log H is kept, since 1e-8 is nothing to a float32 near 1; all
    queries share one l0, where the release does four forwards for one query.

    >>> hizoo(queries=2).forwards
    5
    """
    return Method(
        "hizoo", SecondDifference(eps, queries), Curved(smoothing), lr=lr,
        schedule=Schedule(schedule, warmup), weight_decay=weight_decay, units=units,
    )  # fmt: skip
