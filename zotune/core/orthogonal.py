"""Orthonormal bases drawn from a key, and matrices with their singular values evened out."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from zotune.core import noise
from zotune.core.block import Block
from zotune.core.noise import Key

Side = Literal["left", "right"]


def orthonormal(
    key: Key, name: str, size: int, rank: int, device: torch.device | str = "cpu"
) -> Tensor:
    """`rank` orthonormal columns of `size` numbers, uniform over all such frames (Haar); float32.

    Q of a Gaussian matrix's QR in float64, with the signs that make R's diagonal positive: so Q is
    one function of the matrix, whatever a LAPACK prefers, and its law is Haar's (Mezzadri 2007,
    arXiv math-ph/0609050).

    >>> q = orthonormal(Key(0), "w", 5, 2)
    >>> torch.allclose(q.T @ q, torch.eye(2), atol=1e-6)
    True
    """
    drawn = noise.draw("gaussian", key, name, 0, size * rank, device).view(size, rank)
    q, r = torch.linalg.qr(drawn.double())
    return torch.where(r.diagonal() < 0, -q, q).float().contiguous()


def room(block: Block, side: Side, rank: int) -> dict[str, Tensor]:
    """Empty memory for one basis of a block: rank float32 per row or column, and 16 bytes."""
    empty = torch.zeros(_size(block, side), rank, device=block.device)
    return {side: empty, f"{side}_of": torch.full((2,), -1)}


def basis(key: Key, block: Block, side: Side, rank: int) -> Tensor:
    """Orthonormal columns over a block's rows ("left") or columns ("right"): (size, rank).

    A function of the key alone. Where the block has `room`, the last one drawn is kept, so that a
    basis in use for many steps is made once; snapshots hold it.
    """
    kept, made_of = block.memory.get(side), torch.tensor([key.seed, key.step])
    if kept is not None and torch.equal(block.memory[f"{side}_of"], made_of):
        return kept
    fresh = orthonormal(key, f"{block.name}#{side}", _size(block, side), rank, block.device)
    if kept is None:
        return fresh
    block.memory[f"{side}_of"].copy_(made_of)
    return kept.copy_(fresh)


def _size(block: Block, side: Side) -> int:
    return block.rows if side == "left" else block.numel // block.rows


def newton_schulz(g: Tensor, steps: int = 5) -> Tensor:
    """U S V^T to about U V^T, in float32: Muon's orthogonalization (Jordan et al. 2024).

        x = g / ||g||, then `steps` times: A = x x^T,  x <- 3.4445 x - 4.7750 A x + 2.0315 A^2 x

    After 5 steps, singular values above 0.2 % of ||g|| lie between 0.68 and 1.21. Dimensions
    beyond the first count as columns. What has a single row or column is divided by its norm,
    which is exact; zeros stay zeros.

    >>> newton_schulz(torch.tensor([[900.0, 0.0], [0.0, -9.0]])).round().tolist()
    [[1.0, 0.0], [0.0, -1.0]]
    """
    x = g.float() / g.float().norm().clamp_min(1e-30)
    wide = x.flatten(1) if x.dim() > 1 else x.view(1, -1)
    if min(wide.shape) < 2:
        return x
    tall = wide.shape[0] > wide.shape[1]
    wide = wide.mT if tall else wide
    for _ in range(steps):
        square = wide @ wide.mT
        wide = 3.4445 * wide + (2.0315 * square @ square - 4.7750 * square) @ wide
    return (wide.mT if tall else wide).reshape(g.shape)
