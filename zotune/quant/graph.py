"""Modules that run a whole model in another engine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import nn


class Graph(nn.Module, ABC):
    """A model that another engine runs as a whole, with the values its parameters have just now.

    There are no layers inside, so it says of each of its parameters what it is.
    """

    @property
    @abstractmethod
    def roles(self) -> Mapping[str, str]:
        """By parameter: "scale", "zero", "norm", "bias" or "weight"."""
