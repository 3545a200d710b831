"""How alike two sets of features of the same examples are, whatever rotation lies between them."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

KEPT = 0.99  # share of the variance whose directions SVCCA compares (as in its paper)


def similarity(measure: Literal["cka", "svcca"], x: Tensor, y: Tensor) -> float:
    """Similarity in [0, 1] of x and y, (rows, features) each."""
    return linear_cka(x, y) if measure == "cka" else svcca(x, y)


def linear_cka(x: Tensor, y: Tensor) -> float:
    """|Y^T X|^2 / (|X^T X| |Y^T Y|) for centred X, Y (Kornblith et al. 2019, arXiv 1905.00414).

    Computed as <K, L> / (|K| |L|) over the rows' Gram matrices, in float64. Features that do not
    vary are alike.

    >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 1.0]])
    >>> turned = x @ torch.tensor([[0.0, 3.0], [-3.0, 0.0]])
    >>> round(linear_cka(x, turned), 6)
    1.0
    """
    k, m = _gram(x), _gram(y)
    whole = float(k.norm() * m.norm())
    return float((k * m).sum()) / whole if whole else float(k.norm() == m.norm())


def svcca(x: Tensor, y: Tensor) -> float:
    """Mean canonical correlation of the singular directions that hold 99 % of each variance (Raghu
    et al. 2017, arXiv 1706.05806), over the smaller number of them.

    >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 1.0]])
    >>> round(svcca(x, 2 * x + 1), 6)
    1.0
    """
    u, v = _directions(x), _directions(y)
    count = min(u.shape[1], v.shape[1])
    if not count:
        return float(u.shape[1] == v.shape[1])
    return float(torch.linalg.svdvals(u.mT @ v).clamp(max=1.0).sum() / count)


def _centred(x: Tensor) -> Tensor:
    x = x.double()
    return x - x.mean(0)


def _gram(x: Tensor) -> Tensor:
    x = _centred(x)
    return x @ x.mT


def _directions(x: Tensor) -> Tensor:
    u, s, _ = torch.linalg.svd(_centred(x), full_matrices=False)
    share = s.square().cumsum(0) / s.square().sum().clamp_min(1e-300)
    count = int((share < KEPT).sum()) + 1 if s.any() else 0
    return u[:, :count]
