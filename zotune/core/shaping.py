"""Shaping: coefficients in, coefficients out. Frozen records, applied in order."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from zotune.errors import BadInput


@dataclass(frozen=True)
class Shaping(ABC):
    """Acts on the coefficients of one step: float64 (k,) to float64 (k,)."""

    @abstractmethod
    def __call__(self, coefficients: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Clip(Shaping):
    """c' = clip(c, -limit, limit): QZO's directional-derivative clipping (arXiv 2505.13430).

    Not unbiased, whatever the paper's Theorem 1 says: for Gaussian u, E[clip(c) u] =
    erf(limit / (sqrt 2 ||g||)) g, a pure shrink of the step.

    >>> import torch
    >>> Clip(1.0)(torch.tensor([0.5, -3.0])).tolist()
    [0.5, -1.0]
    """

    limit: float = 100.0

    def __post_init__(self) -> None:
        if not self.limit > 0:
            raise BadInput(f"clip limit={self.limit}; want > 0")

    def __call__(self, coefficients: Tensor) -> Tensor:
        return coefficients.clamp(-self.limit, self.limit)


@dataclass(frozen=True)
class Sign(Shaping):
    """c' = sign(c): only the comparison of the two losses counts."""

    def __call__(self, coefficients: Tensor) -> Tensor:
        return coefficients.sign()


@dataclass(frozen=True)
class Standardize(Shaping):
    """c' = c / rms(c): a step of constant length, whatever the loss's scale.

    Equal coefficients, or a single one, become their signs; all zero stay zero.
    """

    def __call__(self, coefficients: Tensor) -> Tensor:
        rms = coefficients.square().mean().sqrt()
        return coefficients / rms if rms > 0 else coefficients
