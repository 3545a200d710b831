"""A measured number with what it is compared with and what it should be."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    """One number.

    baseline: what the value is compared with, in words. target: the most (with `at_least`, the
    least) that the value may be, in the same unit. met: None without a target; a value that could
    not be measured is None and misses its target.

    >>> Row("a step over its two forwards", 1.2, "x", "two forwards", target=1.3).met
    True
    """

    name: str
    value: float | None
    unit: str
    baseline: str | None = None
    target: float | None = None
    met: bool | None = field(default=None, init=False)
    at_least: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        if self.target is None:
            return
        value = math.nan if self.value is None else self.value
        met = value >= self.target if self.at_least else value <= self.target
        object.__setattr__(self, "met", met)

    def as_dict(self) -> dict[str, Any]:
        """As a result file holds it; `at_least` only where it is true."""
        finite = self.value is not None and math.isfinite(self.value)
        row = {k: v for k, v in asdict(self).items() if k != "at_least" or v}
        return {**row, "value": self.value if finite else None}


def number(value: float) -> str:
    """Three significant digits, without an exponent where that reads better.

    >>> number(0.12345), number(1234.5), number(1.5e-7)
    ('0.123', '1,234', '1.5e-07')
    """
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
