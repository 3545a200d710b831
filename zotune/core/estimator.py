"""Estimators: keys to probes, losses to coefficients. They never see a model or a batch.

ask(key)            -> probes, the points whose losses are wanted
tell(key, losses)   -> Estimate, with g = mean_k coefficients[k] * u(keys[k])
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from zotune.core.block import Block
from zotune.core.noise import Key
from zotune.core.probe import Losses, Probe
from zotune.core.space import Space
from zotune.errors import BadInput


@dataclass(frozen=True)
class Estimate:
    """The currency: g = mean_k coefficients[k] u(keys[k]), never a tensor until a block wants it.

    coefficients: float64, one per key. loss: mean of the losses seen, for display only.
    extras: further numbers that what comes after needs (a curvature). signal: how far the
    coefficients stand out of the noise between the batch's examples, None where that cannot be
    told; for display only. exact: gradients that the forward passes gave exactly, by block.
    """

    key: Key
    keys: tuple[Key, ...]
    coefficients: tuple[float, ...]
    loss: float
    extras: tuple[float, ...] = ()
    signal: float | None = None
    exact: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def scalars(self) -> tuple[float, ...]:
        """What a journal keeps; `Estimator.rebuild` makes the estimate of them again."""
        return (*self.coefficients, *self.extras)

    def weights(self, block: Block) -> list[float]:
        """What each key's direction weighs in g of a block, in the block's own eps."""
        share = 1.0 / (len(self.keys) * block.eps_ratio)
        return [c * share for c in self.coefficients]

    @property
    def finite(self) -> bool:
        """Whether every number is finite in float32, in which steps are taken."""
        values = torch.tensor((*self.scalars, self.loss), dtype=torch.float32)
        exact = (bool(g.isfinite().all()) for g in self.exact.values())
        return bool(values.isfinite().all()) and all(exact)


@dataclass(frozen=True)
class Estimator(ABC):
    """eps is the perturbation scale (MeZO's zo_eps, the literature's mu, ES's sigma)."""

    eps: float = 1e-3
    queries: int = 1

    def __post_init__(self) -> None:
        if not self.eps > 0:
            raise BadInput(f"eps={self.eps}; want eps > 0")
        if self.queries < 1:
            raise BadInput(f"queries={self.queries}; want at least 1")

    def check(self, space: Space) -> None:
        """Refuse what this estimator cannot do for these blocks, before the first forward."""

    @property
    @abstractmethod
    def forwards(self) -> int:
        """Forward passes over the batch per step."""

    @abstractmethod
    def ask(self, key: Key) -> list[Probe]:
        """The points whose losses are wanted."""

    @abstractmethod
    def tell(self, key: Key, losses: Losses) -> Estimate:
        """The estimate from the losses of the probes that `ask(key)` gave, in their order."""

    def count(self, examples: int) -> int:
        """How many scalars a step over so many examples leaves in the journal."""
        return self.queries

    def keys(self, key: Key, count: int) -> tuple[Key, ...]:
        """The keys of `count` coefficients."""
        return tuple(key.fold(query=j) for j in range(count))

    def rebuild(self, key: Key, scalars: Sequence[float], loss: float) -> Estimate:
        """The estimate whose `scalars` these are: what a journal is replayed from."""
        return Estimate(key, self.keys(key, len(scalars)), tuple(scalars), loss)

    def _estimate(
        self, key: Key, coefficients: Tensor, loss: Tensor, signal: float | None = None
    ) -> Estimate:
        flat = coefficients.flatten().tolist()
        return replace(self.rebuild(key, flat, float(loss)), signal=signal)


def signal(differences: Tensor, weights: Tensor) -> float | None:
    """Signal-to-noise of coefficients: (mean / standard error)^2 over the batch's examples, mean
    over queries, less the 1 that pure noise gives; None for a single example.

    differences: (queries, examples), l+ - l- of each; weights: (examples,), summing to 1.

    >>> even = torch.full((4,), 0.25, dtype=torch.float64)
    >>> signal(torch.tensor([[1.0, 1.1, 0.9, 1.0]], dtype=torch.float64), even) > 100
    True
    """
    if len(weights) < 2:
        return None
    mean = differences @ weights
    spread = (differences - mean.unsqueeze(1)).square() @ weights.square()
    error = spread * len(weights) / (len(weights) - 1)
    known = error > 0
    return float((mean[known].square() / error[known]).mean()) - 1 if bool(known.any()) else None


@dataclass(frozen=True)
class TwoSided(Estimator):
    """Central difference (SPSA, Spall 1992): c_j = (L(+eps u_j) - L(-eps u_j)) / (2 eps).

    >>> probes = TwoSided(eps=0.5).ask(Key(0))
    >>> [p.step for p in probes]
    [0.5, -0.5]
    >>> TwoSided(eps=0.5).tell(Key(0), Losses.of([3.0, 1.0])).coefficients
    (2.0,)
    """

    @property
    def forwards(self) -> int:
        return 2 * self.queries

    def ask(self, key: Key) -> list[Probe]:
        keys = self.keys(key, self.queries)
        return [Probe(k, step) for k in keys for step in (self.eps, -self.eps)]

    def tell(self, key: Key, losses: Losses) -> Estimate:
        pairs = losses.mean.view(self.queries, 2)
        each = losses.per_example.view(self.queries, 2, -1)
        return self._estimate(
            key,
            (pairs[:, 0] - pairs[:, 1]) / (2 * self.eps),
            pairs.mean(),
            signal(each[:, 0] - each[:, 1], losses.weights),
        )


@dataclass(frozen=True)
class OneSided(Estimator):
    """Forward difference: c_j = (L(+eps u_j) - L(0)) / eps, with one base point for q queries.

    >>> OneSided(eps=0.5, queries=2).tell(Key(0), Losses.of([1.0, 2.0, 0.5])).coefficients
    (2.0, -1.0)
    """

    @property
    def forwards(self) -> int:
        return 1 + self.queries

    def ask(self, key: Key) -> list[Probe]:
        keys = self.keys(key, self.queries)
        return [Probe(keys[0], 0.0), *(Probe(k, self.eps) for k in keys)]

    def tell(self, key: Key, losses: Losses) -> Estimate:
        values, each = losses.mean, losses.per_example
        return self._estimate(
            key,
            (values[1:] - values[0]) / self.eps,
            values[0],
            signal(each[1:] - each[0], losses.weights),
        )


@dataclass(frozen=True)
class PerExample(Estimator):
    """A direction of its own for each example: B coefficients from one pair of forwards.

    c_jb = B w_b (l_b(+eps u_jb) - l_b(-eps u_jb)) / (2 eps), with w_b the example's share of the
    batch loss, so that g = mean c u estimates the gradient of the batch loss with the variance of
    B queries. After P-RGE's batched queries (Gao et al. 2024, arXiv 2409.15520).

    >>> pair = torch.tensor([[1.0, 4.0], [0.0, 2.0]], dtype=torch.float64)
    >>> even = torch.full((2,), 0.5, dtype=torch.float64)
    >>> PerExample(eps=0.5).tell(Key(0), Losses(pair, even)).coefficients
    (1.0, 2.0)
    """

    @property
    def forwards(self) -> int:
        return 2 * self.queries

    def ask(self, key: Key) -> list[Probe]:
        keys = (key.fold(query=j) for j in range(self.queries))
        return [Probe(k, step, per_example=True) for k in keys for step in (self.eps, -self.eps)]

    def count(self, examples: int) -> int:
        return self.queries * examples

    def keys(self, key: Key, count: int) -> tuple[Key, ...]:
        examples = count // self.queries
        return tuple(
            key.fold(query=j, lane=b) for j in range(self.queries) for b in range(examples)
        )

    def tell(self, key: Key, losses: Losses) -> Estimate:
        examples = losses.per_example.shape[1]
        pairs = losses.per_example.view(self.queries, 2, examples)
        slopes = (pairs[:, 0] - pairs[:, 1]) / (2 * self.eps)
        return self._estimate(key, slopes * losses.weights * examples, losses.mean.mean())


def estimator(directions: str, eps: float, queries: int) -> Estimator:
    """The estimator that a method's `directions` option names: "batch", "one-sided" or "example".

    >>> estimator("example", 1e-3, 1)
    PerExample(eps=0.001, queries=1)
    """
    kinds: dict[str, Any] = {"batch": TwoSided, "one-sided": OneSided, "example": PerExample}
    if directions not in kinds:
        raise BadInput(f"directions={directions!r}; want one of {', '.join(kinds)}")
    return kinds[directions](eps, queries)
