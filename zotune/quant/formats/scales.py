"""How scales are stored: as floats, as 8-bit floats over one number, as powers of two."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class FloatScales:
    """Scales as floats."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def load(self, stored: Tensor) -> Tensor:
        """float32."""
        return stored.float()

    def store(self, scale: Tensor) -> Tensor:
        """The nearest that can be stored."""
        return scale.to(self.dtype)


@dataclass(frozen=True)
class DividedScales:
    """NVFP4: E4M3 scales, all over one number."""

    shape: tuple[int, ...]
    divisor: float = 1.0

    def load(self, stored: Tensor) -> Tensor:
        """float32."""
        return stored.float() / self.divisor

    def store(self, scale: Tensor) -> Tensor:
        """The nearest that can be stored."""
        return (scale * self.divisor).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)


@dataclass(frozen=True)
class PowerScales:
    """MXFP4: powers of two, E8M0."""

    shape: tuple[int, ...]

    def load(self, stored: Tensor) -> Tensor:
        """float32."""
        return torch.ldexp(torch.ones_like(stored, dtype=torch.float32), stored.int() - 127)

    def store(self, scale: Tensor) -> Tensor:
        """The nearest that can be stored."""
        return (scale.log2().round() + 127).clamp(0, 254).to(torch.uint8)


Scales = FloatScales | DividedScales | PowerScales
