"""What an attack is: one frozen record."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from zotune.errors import BadInput


@dataclass(frozen=True)
class AttackConfig:
    """Attack a classifier with forward passes only, on the uint8 grid.

    Args:
        method: a method that looks at both sides, with options if any: "zoqo", "zo-sign",
            "zo-adam", "zo-sgd" (MeZO), "zoqo(queries=2)". Its eps and lr count grid levels; their
            defaults follow the budget.
        norm: "linf" or "l2".
        budget: the largest perturbation in that norm, of images in [0, 1]: "8/255" or a number.
        queries: questions about one image at most, the first one about the original included.
        pattern: the shape of directions: "pixels", "tiles(side=2)" or
            "square(share=0.1, halving=64)", a window that shrinks by half in so many steps.
        seed: of all random numbers.
        batch_size: images asked about at once; it changes no result but by the rounding of the
            classifier itself.
        probabilities: the classifier answers with probabilities instead of logits.
    """

    method: str = "zoqo"
    norm: Literal["linf", "l2"] = "linf"
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


def parse_share(text: str | float) -> Fraction:
    """A budget as an exact share of the range.

    >>> parse_share("8/255"), parse_share(8 / 255)
    (Fraction(8, 255), Fraction(8, 255))
    """
    try:
        if isinstance(text, str):
            return Fraction(text.replace(" ", ""))
        return Fraction(text).limit_denominator(10**6)  # 8 / 255 is no float, only nearly one
    except (ValueError, ZeroDivisionError, OverflowError, TypeError) as error:
        raise BadInput(f"budget={text!r} is no number; want '8/255' or 0.03") from error
