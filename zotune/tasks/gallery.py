"""What samples look like: a grid to see, and a distance between sets of images."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

POOLED = 8


def grid(images: Tensor, gap: int = 2) -> Any:
    """uint8 images (n, 1 or 3, height, width) in a near-square grid, as a PIL image.

    >>> grid(torch.zeros(5, 1, 8, 8, dtype=torch.uint8)).size
    (30, 20)
    """
    from PIL import Image

    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    missing = rows * columns - len(images)
    tiles = F.pad(images, (0, gap, 0, gap, 0, 0, 0, missing), value=255)
    tiles = tiles.view(rows, columns, *tiles.shape[1:]).permute(2, 0, 3, 1, 4)
    whole = tiles.flatten(3, 4).flatten(1, 2).permute(1, 2, 0)
    return Image.fromarray(whole.squeeze(-1).contiguous().numpy())


def pooled(images: Tensor) -> Tensor:
    """Features of images that need no network: mean colours of 8 x 8 fields, in [0, 1].

    uint8 (n, channels, height, width) to float64 (n, channels * 64).
    """
    return F.adaptive_avg_pool2d(images.double() / 255, POOLED).flatten(1)


def frechet(a: Tensor, b: Tensor) -> float:
    """Fréchet distance of two sets of features, each (n >= 2, d), as Gaussians (FID's formula).

        |mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))

    Heusel et al. 2017, arXiv 1706.08500. Few samples bias it upwards: compare equal counts.

    >>> x = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0], [2.0, 2.0]])
    >>> round(frechet(x, x), 6), round(frechet(x, x + 3), 6)
    (0.0, 18.0)
    """
    a, b = a.double(), b.double()
    covariances = a.T.cov().reshape(a.shape[1], -1), b.T.cov().reshape(b.shape[1], -1)
    values, vectors = torch.linalg.eigh(covariances[0])
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    middle = torch.linalg.eigvalsh(root @ covariances[1] @ root).clamp_min(0).sqrt().sum()
    apart = (a.mean(0) - b.mean(0)).square().sum()
    return max(0.0, float(apart + covariances[0].trace() + covariances[1].trace() - 2 * middle))
