"""When lower layers are frozen: at fixed steps, or when they stop changing.

    0.5@200, 0.67@500                                  a share of the layers, from a step on
    cka(threshold=0.99, every=50, most=0.67)           features stay the same, by CKA
    svcca(threshold=0.99, every=50, most=0.67)         the same, by SVCCA
    rate(threshold=0.001, every=50, most=0.67)         numbers stay the same

Layer freezing with cached features is arXiv 2508.15033, which publishes neither its rule nor its
thresholds: these rules are our reconstruction from the literature on freezing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from zotune.core.calls import nearest, split_calls
from zotune.errors import BadInput


@dataclass(frozen=True)
class Fixed:
    """Shares of the layers and the steps from which on they are frozen, both rising.

    >>> Fixed(points=((0.5, 200), (0.67, 500))).depth(300, 6)
    3
    """

    points: tuple[tuple[float, int], ...]

    def __post_init__(self) -> None:
        for share, step in self.points:
            if not 0 < share <= 1 or step < 0:
                raise BadInput(
                    f"freeze={share:g}@{step}; want share@step, 0 < share <= 1 and step >= 0"
                )
        rising = zip(self.points, self.points[1:], strict=False)
        if any(a[0] >= b[0] or a[1] >= b[1] for a, b in rising):
            raise BadInput(
                f"freeze={self}: shares and steps must rise from point to point, such as "
                "0.5@200,0.67@500"
            )

    def depth(self, step: int, layers: int) -> int:
        """How many layers are frozen at a step."""
        shares = [share for share, first in self.points if first <= step]
        return depth_of(shares[-1], layers) if shares else 0

    def __str__(self) -> str:
        return ",".join(f"{share:g}@{step}" for share, step in self.points)


@dataclass(frozen=True)
class Similar:
    """Every `every` steps, freeze layers from below while their features on a fixed probe batch
    are as they were `every` steps ago: similarity at least `threshold`; at most a share `most`.

    measure: "cka" (linear, Kornblith et al. 2019, arXiv 1905.00414) or "svcca" (Raghu et al. 2017,
    arXiv 1706.05806, which proposes freezing from below by it).
    """

    measure: Literal["cka", "svcca"]
    threshold: float = 0.99
    every: int = 50
    most: float = 0.67

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise BadInput(f"threshold={self.threshold}; want a similarity, above 0 and up to 1")
        _check(self.every, self.most)


@dataclass(frozen=True)
class Rate:
    """Every `every` steps, freeze layers from below while |theta - theta before| / |theta| over
    the last `every` steps, of their tuned numbers together, is at most `threshold`."""

    threshold: float = 1e-3
    every: int = 50
    most: float = 0.67

    def __post_init__(self) -> None:
        if not self.threshold > 0:
            raise BadInput(f"threshold={self.threshold}; want a relative change above 0")
        _check(self.every, self.most)


Schedule = Fixed | Similar | Rate


def _check(every: int, most: float) -> None:
    if every < 1:
        raise BadInput(f"every={every}; want at least 1 step between looks")
    if not 0 < most <= 1:
        raise BadInput(f"most={most}; want a share of the layers, above 0 and up to 1")


def depth_of(share: float, layers: int) -> int:
    """A share of the layers as a number of them, to the nearest.

    >>> depth_of(0.67, 6), depth_of(0.5, 9)
    (4, 4)
    """
    return round(share * layers)


def parse_freeze(text: str) -> Schedule:
    """A schedule as users write it.

    >>> parse_freeze("0.5@200, 0.67@500")
    Fixed(points=((0.5, 200), (0.67, 500)))
    >>> parse_freeze("cka(every=20)")
    Similar(measure='cka', threshold=0.99, every=20, most=0.67)
    """
    if "@" in text:
        pieces = [re.fullmatch(r"\s*(\d*\.?\d+)\s*@\s*(\d+)\s*", p) for p in text.split(",")]
        points = tuple((float(p[1]), int(p[2])) for p in pieces if p)
        if len(points) < len(pieces):
            raise BadInput(
                f"cannot read freeze={text!r}; want share@step, such as '0.5@200,0.67@500'"
            )
        return Fixed(points)
    calls = split_calls(text)
    name, options = calls[0]
    kinds = {"cka": Similar, "svcca": Similar, "rate": Rate}
    if len(calls) > 1 or name not in kinds:
        raise BadInput(f"cannot read freeze={text!r}; want share@step{nearest(name, kinds)}")
    measure = {"measure": name} if name != "rate" else {}
    try:
        return kinds[name](**measure, **options)  # type: ignore[no-any-return]
    except TypeError as error:
        raise BadInput(f"freeze={text!r}: options are threshold, every and most") from error
