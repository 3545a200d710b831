"""What a calibration method is: a rotation, which turns hidden states before all else, a smoother,
which moves scales between layers, or a rounder, which chooses codes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from zotune.quant.affine import dequantize, fit, nearest
from zotune.quant.scheme import Scheme


class Rounded(NamedTuple):
    """A quantized weight: codes int8 (out, in), scale and zero float32, column order or None."""

    codes: Tensor
    scale: Tensor
    zero: Tensor | None = None
    order: Tensor | None = None


@dataclass(frozen=True)
class Grid:
    """Where weights are rounded to. stored: the dtype in which the file will hold the scales.

    >>> Grid(Scheme.parse("int4-g2"))
    Grid(scheme=Scheme(bits=4, symmetric=True, group_size=2, ...), stored=torch.float32)
    """

    scheme: Scheme
    stored: torch.dtype = torch.float32

    def fit(self, weight: Tensor, name: str = "weight") -> tuple[Tensor, Tensor | None]:
        """Scale and zero that cover a weight (out, in)."""
        return fit(weight, self.scheme, name, self.stored)

    def round(self, weight: Tensor, name: str = "weight") -> Rounded:
        """To nearest."""
        scale, zero = self.fit(weight, name)
        return Rounded(nearest(weight, scale, zero, self.scheme), scale, zero)

    def rounded(self, weight: Tensor, name: str = "weight") -> Tensor:
        """The weight as it comes back from its nearest codes, float32."""
        codes, scale, zero, _ = self.round(weight, name)
        return dequantize(codes, scale, zero, self.scheme.group_size)


class Moments:
    """What is kept of the inputs of a layer: extremes and means per channel, products of channels.

    highest, mean: largest and mean absolute value, (in,). gram: mean of x x^T over tokens, (in,
    in), or None if it is not wanted.

    >>> moments = Moments(gram=True)
    >>> moments.add(torch.tensor([[1.0, -2.0], [3.0, 0.0]]))
    >>> moments.highest.tolist(), moments.mean.tolist(), moments.gram.tolist()
    ([3.0, 2.0], [2.0, 1.0], [[5.0, -1.0], [-1.0, 2.0]])
    """

    highest: Tensor
    mean: Tensor
    gram: Tensor | None

    def __init__(self, gram: bool) -> None:
        self._wants_gram, self.gram, self.tokens = gram, None, 0

    def add(self, x: Tensor) -> None:
        """Take in (..., in)."""
        x = x.detach().reshape(-1, x.shape[-1])
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if not self.tokens:
            self.highest, self.mean = x.new_zeros(x.shape[1]), x.new_zeros(x.shape[1])
            self.gram = x.new_zeros(x.shape[1], x.shape[1]) if self._wants_gram else None
        self.tokens += len(x)
        size = x.abs()
        self.highest = torch.maximum(self.highest, size.amax(0))
        self.mean += (size.sum(0) - len(x) * self.mean) / self.tokens
        if self.gram is not None:
            kept = 1 - len(x) / self.tokens
            self.gram.mul_(kept).addmm_(x.t(), x, alpha=1 / self.tokens)

    @property
    def silent(self) -> int:
        """Channels that were zero for every token."""
        return int((self.highest == 0).sum())


class AbstractRounder(ABC):
    """Chooses the codes of one layer. Frozen records."""

    name: ClassVar[str]
    gram: ClassVar[bool]  # whether it looks at the layer's inputs

    @abstractmethod
    def round(self, weight: Tensor, grid: Grid, gram: Tensor | None, name: str) -> Rounded:
        """The quantized weight (out, in).

        Args:
            gram: mean of x x^T over the layer's inputs, (in, in); None if `gram` is False.
            name: the layer's, for messages.

        Raises:
            BadInput: if the weight or its inputs cannot be quantized.
        """


class AbstractSmoother(ABC):
    """Chooses a scale per input channel, to be folded into what is before. Frozen records."""

    name: ClassVar[str]
    gram: ClassVar[bool]

    @abstractmethod
    def scale(self, weights: Sequence[Tensor], grid: Grid, moments: Moments) -> Tensor:
        """A positive factor (in,) of the columns of all weights; their input is divided by it.

        Args:
            weights: (out, in) of the layers that share the input and will be quantized.
            moments: of that input.
        """


class AbstractRotation(ABC):
    """Turns a float model's hidden states, exactly and within its weights. Frozen records."""

    name: ClassVar[str]

    @abstractmethod
    def rotate_(self, model: nn.Module) -> dict[str, str]:
        """In place.

        Returns:
            the linear layers whose inputs stay as they are, with the reason.
        """
