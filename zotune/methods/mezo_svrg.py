"""MeZO-SVRG: small batches' estimates, corrected by what they would have been at an anchor."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zotune.core.block import Block, FloatBlock
from zotune.core.estimator import Estimate, Estimator, TwoSided, signal
from zotune.core.method import Decay, Interlude, Method, Schedule, Units
from zotune.core.noise import Key
from zotune.core.perturbation import Gaussian, Perturbation
from zotune.core.probe import Losses, Probe
from zotune.core.space import Space
from zotune.errors import BadInput
from zotune.methods import FLOATS, method


@dataclass(frozen=True)
class Anchored(Perturbation):
    """u = z ~ N(0, I), and at the anchor u = (anchor - theta) / eps +- z.

    Queries q to 2q - 1 are the + sides of the first q there, 2q to 3q - 1 the - sides: a step of
    eps along such a u ends at anchor +- eps z. The anchor is where every `every`th step began. Of
    its g the slopes stay: its directions are drawn again and added to the g of later steps.
    """

    eps: float = 1e-3
    queries: int = 1
    every: int = 2

    def check(self, space: Space) -> None:
        if any(b.exact or not isinstance(b, FloatBlock) for b in space):
            raise BadInput("an anchor wants probed float blocks; drop exact=True, or tune scales")

    def state(self, block: Block) -> dict[str, Tensor]:
        slopes = torch.zeros(self.queries, dtype=torch.float64, device=block.device)
        step = torch.zeros((), dtype=torch.int64, device=block.device)
        return {"anchor": block.state().clone(), "slopes": slopes, "step": step}

    def leave_(self, space: Space, estimate: Estimate) -> None:
        if estimate.key.step % self.every:
            return
        for block in space:
            block.memory["anchor"].copy_(block.state())
            block.memory["slopes"].copy_(torch.tensor(estimate.coefficients, dtype=torch.float64))
            block.memory["step"].fill_(estimate.key.step)

    def draw(self, key: Key, block: Block, start: int = 0, stop: int | None = None) -> Tensor:
        z = Gaussian().draw(key.fold(query=key.query % self.queries), block, start, stop)
        return self._there(z, key, block, slice(start, stop) if block.shape else ...)

    def draw_rows(self, key: Key, block: Block, rows: Sequence[int]) -> Tensor:
        z = Gaussian().draw_rows(key.fold(query=key.query % self.queries), block, rows)
        return self._there(z, key, block, list(rows))

    def _there(self, z: Tensor, key: Key, block: Block, here: Any) -> Tensor:
        if key.query < self.queries:
            return z
        anchor, theta = block.memory["anchor"][here], block.state()[here]
        wide = torch.promote_types(theta.dtype, torch.float32)
        away = (anchor.to(wide) - theta.to(wide)).float() / self.eps
        away /= torch.as_tensor(block.reach).expand(block.shape)[here]
        sign = 1 if key.query < 2 * self.queries else -1
        return away.nan_to_num_(0.0).add_(z, alpha=sign)  # 0 / 0: what has no reach stays

    def combine(
        self, keys: Sequence[Key], coefficients: Sequence[float], block: Block, start: int,
        stop: int,
    ) -> Tensor:  # fmt: skip
        keys, coefficients = list(keys), list(coefficients)
        if keys[0].step % self.every:
            anchor = keys[0].at(int(block.memory["step"]))
            share = 1 / (self.queries * block.eps_ratio)
            coefficients += [share * c for c in block.memory["slopes"].tolist()]
            keys += [anchor.fold(query=j) for j in range(self.queries)]
        return Gaussian().combine(keys, coefficients, block, start, stop)


@dataclass(frozen=True)
class Differences(Estimator):
    """c_j = c_j(theta) - c_j(anchor): two central differences along one z_j, on one batch.

    >>> Differences(eps=0.5).tell(Key(0), Losses.of([3.0, 1.0, 2.0, 1.5])).coefficients
    (1.5,)
    """

    @property
    def forwards(self) -> int:
        return 4 * self.queries

    def ask(self, key: Key) -> list[Probe]:
        q = self.queries
        there = [key.fold(query=side * q + j) for j in range(q) for side in (1, 2)]
        return [*TwoSided(self.eps, q).ask(key), *(Probe(k, self.eps) for k in there)]

    def tell(self, key: Key, losses: Losses) -> Estimate:
        sides = losses.per_example.view(2, self.queries, 2, -1)
        here, there = sides[:, :, 0] - sides[:, :, 1]
        slopes = (here - there) @ losses.weights / (2 * self.eps)
        mean = losses.mean[: 2 * self.queries].mean()
        return self._estimate(key, slopes, mean, signal(here - there, losses.weights))


@method(
    paper="Variance-reduced Zeroth-Order Methods for Fine-Tuning Language Models",
    year=2024,
    arxiv="2404.08080",
    spaces=FLOATS,
    memory="4 bytes per tuned element (the anchor)",
)
def mezo_svrg(
    lr: float = 1e-5,
    eps: float = 1e-3,
    every: int = 2,
    batches: int = 8,
    share: float = 0.1,
    queries: int = 1,
    weight_decay: float = 0.0,
    schedule: Decay = "constant",
    warmup: int = 0,
    units: Units = "absolute",
) -> Method:
    """MeZO without much of the noise between batches (Gautam et al. 2024).

        c(theta; B) = (L(theta + eps u; B) - L(theta - eps u; B)) / (2 eps)
        t = 0, every, 2 every, ...:  a <- theta,  g <- c(a; A) u,  theta <- theta - lr g
        t else:  theta <- theta - share lr ((c(theta; B) - c(a; B)) u + g)

    A is `batches` batches, B one. Defaults: every, eps and both rates of the release's runs, A of
    its 512 examples in batches of 64. Changed: A is drawn in the run's order where the paper takes
    all data (and its release the batch at hand); g is not kept but drawn again.

    >>> mezo_svrg().forwards, mezo_svrg(batches=1, every=4).forwards
    (10, 4)
    """
    if every < 2:
        raise BadInput(f"every={every}; want at least 2, for steps between anchors; or use mezo")
    law, rates = Anchored(eps, queries, every), Schedule(schedule, warmup)
    between = Method(
        "mezo-svrg-between", Differences(eps, queries), law, lr=share * lr, schedule=rates,
        weight_decay=weight_decay, units=units,
    )  # fmt: skip
    return Method(
        "mezo-svrg", TwoSided(eps, queries), law, lr=lr, schedule=rates, units=units,
        weight_decay=weight_decay, interlude=Interlude(1, every - 1, between), batches=batches,
    )  # fmt: skip
