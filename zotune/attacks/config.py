"""What an attack is: one frozen record."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from zotune import methods
from zotune.core.calls import nearest, split_calls
from zotune.core.estimator import PerExample
from zotune.core.image_laws import PerImage, Square, Tiled
from zotune.core.inputs import TOP, Budget, Norm
from zotune.core.method import Method
from zotune.core.perturbation import Perturbation
from zotune.errors import BadInput

FIXED = 2  # queries outside the steps: the original, and what the last step has made of it
NAMES = {"zo_sgd": "mezo"}
"""What attacks call a method, where that is not its paper's name."""


def reach(name: str, level: float) -> dict[str, float]:
    """Defaults of eps and lr, in grid levels, where the budget lets a number go `level` far.

    zoqo's and zo-sign's reach from one end of the budget to the other, so that a step lands where
    the better probe was. A plain SGD's lr is in levels^2 per unit of margin.
    """
    known = {
        "zoqo": (2 * level, 2 * level), "zo_sign": (2 * level, 2 * level),
        "zo_adam": (level, level / 2), "mezo": (level, 16 * level**2),
    }  # fmt: skip
    return dict(zip(("eps", "lr"), known[name], strict=True)) if name in known else {}


@dataclass(frozen=True)
class AttackConfig:
    """Attack a classifier with forward passes only, on the uint8 grid.

    Args:
        method: a method that can give each image a direction of its own, with options if any:
            "zoqo", "zo-sign", "zo-adam", "zo-sgd" (MeZO), "zoqo(queries=2)". Its eps and lr count
            grid levels; their defaults follow the budget.
        norm: "linf" or "l2".
        budget: the largest perturbation in that norm, of images in [0, 1]: "8/255" or a number.
        queries: questions about one image at most, the first one about the original included.
        pattern: the shape of directions: "pixels", "tiles(side=2)" or "square(share=0.05)".
        seed: of all random numbers.
        batch_size: images asked about at once; it changes no result but by the rounding of the
            classifier itself.
        probabilities: the classifier answers with probabilities instead of logits.
    """

    method: str = "zoqo"
    norm: Norm = "linf"
    budget: str | float = "8/255"
    queries: int = 500
    pattern: str = "square"
    seed: int = 0
    batch_size: int = 256
    probabilities: bool = False

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise BadInput(f"batch_size={self.batch_size}; want at least 1")
        parse_share(self.budget)

    def budget_for(self, shape: tuple[int, ...]) -> Budget:
        """The budget in grid levels, for images of this (channels, height, width)."""
        share = parse_share(self.budget)
        most = 1.0 if self.norm == "linf" else math.prod(shape) ** 0.5
        if not share <= most:
            raise BadInput(
                f"budget={self.budget!r} in {self.norm} is beyond what an image of {shape} numbers "
                f"in [0, 1] can change at all, {most:.4g}; want less"
            )
        radius = float(share * TOP)
        return Budget(self.norm, math.floor(radius) if self.norm == "linf" else radius)

    def method_for(self, shape: tuple[int, ...]) -> Method:
        """The method over images of this shape, one problem each.

        >>> AttackConfig(method="zo-sgd(eps=3.0)").method_for((1, 8, 8)).estimator
        PerExample(eps=3.0, queries=1)
        """
        calls = split_calls(self.method)
        if len(calls) != 1:
            raise BadInput(f"cannot read method {self.method!r}: want one name(option=value)")
        name, given = calls[0]
        name = NAMES.get(name, name)
        known = methods.entry(name).options
        if "directions" not in known:
            raise BadInput(
                f"{name!r} measures one direction for all images of a batch, and an attack wants "
                "one for each; use zoqo, zo-sign, zo-adam or zo-sgd"
            )
        level = self.budget_for(shape).level(math.prod(shape))
        chosen = {**reach(name, level), "directions": "example", **given}
        found = methods.get(name, **chosen)
        if not isinstance(found, Method) or not isinstance(found.estimator, PerExample):
            raise BadInput(f"method {self.method!r} has no direction for each image")
        return found.but(perturbation=PerImage(patterned(self.pattern, found.perturbation)))

    def steps(self, method: Method) -> int:
        """How many steps the queries are enough for."""
        if self.queries < FIXED + method.forwards:
            raise BadInput(
                f"queries={self.queries} are too few for one step of {self.method}: it asks "
                f"{method.forwards} times, and {FIXED} more are for the original and the last "
                f"image; want at least {FIXED + method.forwards}"
            )
        return (self.queries - FIXED) // method.forwards


def parse_share(text: str | float) -> Fraction:
    """A budget as an exact share of the range.

    >>> parse_share("8/255") * 255
    Fraction(8, 1)
    """
    try:
        if isinstance(text, str):
            return Fraction(text.replace(" ", ""))
        # 8 / 255 as a float is a little more or less than eight levels.
        return Fraction(text * TOP).limit_denominator(10**6) / TOP
    except (ValueError, ZeroDivisionError, OverflowError, TypeError) as error:
        raise BadInput(f"budget={text!r} is no number; want '8/255' or 0.03") from error


def patterned(text: str, law: Perturbation) -> Perturbation:
    """A law over the shapes that `pattern` names.

    >>> from zotune.core.grid import Grid
    >>> patterned("tiles(side=4)", Grid())
    Tiled(law=Grid(radius=1.0, relative=True, density=1.0), side=4)
    """
    shapes: dict[str, Any] = {"pixels": None, "tiles": Tiled, "square": Square}
    calls = split_calls(text)
    name, options = calls[0]
    if len(calls) != 1 or name not in shapes:
        raise BadInput(f"unknown pattern {text!r}{nearest(name, shapes)}")
    if name == "pixels":
        return law
    try:
        return shapes[name](law, **options)
    except TypeError as error:
        raise BadInput(f"cannot read pattern {text!r}: {error}") from error
