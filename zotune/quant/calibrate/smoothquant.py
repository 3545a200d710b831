"""SmoothQuant: part of the activations' range moves into the weights.

Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language
Models", 2022, arXiv 2211.10438. The columns of all layers that share an input are multiplied by

    s = max|x|^alpha / max|w|^(1 - alpha)        max over tokens, and over rows of all the layers

and the input is divided by it, in the norm or linear layer before them.

Changed: besides norms also linear layers absorb (values before an attention's output, a gated
layer's other factor), whose rows' own scales undo it. Channels always zero keep their scale.
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
class SmoothQuant(AbstractSmoother):
    """SmoothQuant with the paper's alpha.

    Args:
        alpha: how much of the difficulty moves into the weights, 0 to 1.

    Raises:
        BadInput: for another alpha.

    >>> SmoothQuant()
    SmoothQuant(alpha=0.5)
    """

    name: ClassVar[str] = "smoothquant"
    gram: ClassVar[bool] = False
    alpha: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise BadInput(f"alpha={self.alpha}; want 0 <= alpha <= 1")

    def scale(self, weights: Sequence[Tensor], grid: Grid, moments: Moments) -> Tensor:
        """As above."""
        del grid
        highest = moments.highest
        largest = torch.stack([w.abs().amax(0).to(highest.dtype) for w in weights]).amax(0)
        scale = highest.pow(self.alpha) / largest.clamp_min(1e-5).pow(1 - self.alpha)
        return torch.where(highest > 0, scale.clamp_min(1e-5), 1.0)


METHOD = SmoothQuant
