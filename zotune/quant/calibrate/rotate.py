"""Rotation before anything is rounded: outliers of single channels spread over all of them.

Ashkboos et al., "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", 2024, arXiv 2404.00456;
Liu et al., "SpinQuant", 2024, arXiv 2405.16406. A random Hadamard matrix with signs (of other sizes
than powers of two, its Kronecker product with a dense orthogonal one) turns the residual stream,
R1, and one of a head's width the values of every head, R2; both go into the weights, exactly.

Changed: only what folds. QuaRot's rotations of keys, queries and of the down projection's input are
computed while the model runs, which serving programs do not do; those layers are listed. SpinQuant
learns its matrices by backprop; these are drawn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

from torch import nn

from zotune.errors import BadInput
from zotune.quant.calibrate.method import AbstractRotation
from zotune.quant.calibrate.rotation import (
    Stream,
    rotate_stream_,
    rotate_values_,
    rotation,
    stream,
)
from zotune.quant.model import float_layers

MIXED: Final = "no rotation that was asked for passes what lies before it"


@dataclass(frozen=True)
class Rotate(AbstractRotation):
    """Turn the residual stream and the heads' values.

    Args:
        residual: whether the residual stream is turned.
        values: whether values are.
        seed: of the matrices; some are better than others.

    Raises:
        BadInput: if neither is turned, or for a seed below 0.

    >>> Rotate(seed=3)
    Rotate(residual=True, values=True, seed=3)
    """

    name: ClassVar[str] = "rotate"
    residual: bool = True
    values: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.residual or self.values):
            raise BadInput("rotate turns nothing without residual and values; leave it out")
        if self.seed < 0:
            raise BadInput(f"seed={self.seed}; want 0 or more")

    def rotate_(self, model: nn.Module) -> dict[str, str]:
        """As above; a layer that reads neither is listed."""
        names = [name for name, _ in float_layers(model)]
        found = stream(model)
        turned: set[str] = set()
        if isinstance(found, Stream) and self.residual:
            size = model.get_submodule(found.tables[0]).get_parameter("weight").shape[1]
            rotate_stream_(model, found, rotation(size, self.seed, found.centred))
            turned |= set(found.readers)
        if self.values:
            turned |= set(rotate_values_(model, self.seed))
        why = MIXED if isinstance(found, Stream) else found
        return {name: why for name in names if name not in turned}


METHOD = Rotate
