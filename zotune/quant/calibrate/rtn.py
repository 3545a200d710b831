"""Round to nearest: every weight to the next point of its grid, whatever its inputs are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from zotune.quant.calibrate.method import AbstractRounder, Grid, Rounded


@dataclass(frozen=True)
class RoundToNearest(AbstractRounder):
    """code = round(w / scale + zero); needs no data."""

    name: ClassVar[str] = "rtn"
    gram: ClassVar[bool] = False

    def round(self, weight: Tensor, grid: Grid, gram: Tensor | None, name: str) -> Rounded:
        """The nearest codes."""
        return grid.round(weight, name)


METHOD = RoundToNearest
