"""AWQ: channels with large inputs are scaled up before rounding, by the power that does best.

Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration", 2023,
arXiv 2306.00978. The columns of all layers that share an input are multiplied by

    s = mean|x|^a / sqrt(max(mean|x|^a) min(mean|x|^a)),   a of 0, 1/20, ..., 19/20

and the input is divided by it, in the norm or linear layer before them. The a is kept whose rounded
weights change the layers' outputs least:  argmin_a  sum |Q(W diag(s)) diag(s)^-1 X - W X|^2.

Changed: the error is that of the layers' own outputs, which their inputs' second moments X X^T
give without the inputs; the released code measures some of them behind attention. Weights are not
clipped. Channels that were always zero keep their scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from zotune.errors import BadInput
from zotune.quant.calibrate.method import AbstractSmoother, Grid, Moments


@dataclass(frozen=True)
class Awq(AbstractSmoother):
    """AWQ's search with the paper's 20 powers.

    Raises:
        BadInput: for fewer than one power.

    >>> Awq()
    Awq(powers=20)
    """

    name: ClassVar[str] = "awq"
    gram: ClassVar[bool] = True
    powers: int = 20

    def __post_init__(self) -> None:
        if self.powers < 1:
            raise BadInput(f"powers={self.powers}; want 1 or more")

    def scale(self, weights: Sequence[Tensor], grid: Grid, moments: Moments) -> Tensor:
        """The best of the candidates; ones, which are among them, if nothing does better."""
        assert moments.gram is not None
        best, least = torch.ones_like(moments.mean), float("inf")
        for k in range(self.powers):
            scale = _balanced(moments.mean, k / self.powers)
            loss = sum(_loss(w.to(scale.dtype), scale, grid, moments.gram) for w in weights)
            if loss < least:
                best, least = scale, loss
        return best


def _balanced(mean: Tensor, power: float) -> Tensor:
    """mean^power over the geometric mean of its extremes; 1 where the mean is 0."""
    seen = mean > 0
    if not seen.any():
        return torch.ones_like(mean)
    raised = mean[seen].pow(power).clamp_min(1e-4)
    scale = torch.ones_like(mean)
    scale[seen] = raised / (raised.max() * raised.min()).sqrt()
    return scale


def _loss(weight: Tensor, scale: Tensor, grid: Grid, gram: Tensor) -> float:
    """Mean square of the change of a layer's outputs, summed over them: tr(E X X^T E^T)."""
    error = grid.rounded(weight * scale).to(scale.dtype) / scale - weight
    return float(((error @ gram) * error).sum())


METHOD = Awq
