"""From an attack's record to its budget, method and number of steps."""

from __future__ import annotations

import math
from typing import Any

from zotune import methods
from zotune.attacks.config import AttackConfig, parse_share
from zotune.core.calls import nearest, split_calls
from zotune.core.estimator import PerExample, TwoSided
from zotune.core.image_laws import PerImage, Square, Tiled
from zotune.core.inputs import TOP, Budget
from zotune.core.method import Method
from zotune.core.perturbation import Perturbation
from zotune.errors import BadInput

FIXED = 2  # queries outside the steps: the original, and what the last step has made of it
NAMES = {"zo_sgd": "mezo"}
"""What attacks call a method, where that is not its paper's name."""

Shape = tuple[int, ...]


def open_budget(config: AttackConfig, shape: Shape) -> Budget:
    """The budget in grid levels, for images of this (channels, height, width)."""
    share = parse_share(config.budget)
    most = 1.0 if config.norm == "linf" else math.prod(shape) ** 0.5
    if not share <= most:
        raise BadInput(
            f"budget={config.budget!r} in {config.norm} is beyond what an image of shape {shape} "
            f"with numbers in [0, 1] can change at all, {most:.4g}; want less"
        )
    radius = share * TOP
    return Budget(config.norm, math.floor(radius) if config.norm == "linf" else float(radius))


def open_method(config: AttackConfig, shape: Shape) -> Method:
    """The method over images of this shape, one problem each: its central difference is taken of
    every image's own loss, along a direction of its own.

    >>> open_method(AttackConfig(method="zo-sgd(eps=3.0)"), (1, 8, 8)).estimator
    PerExample(eps=3.0, queries=1)
    """
    calls = split_calls(config.method)
    name, given = calls[0]
    name = NAMES.get(name, name)
    level = open_budget(config, shape).level(math.prod(shape))
    chosen = {**reach(name, level), **given}
    found = methods.get(name, **chosen)
    two_sided = isinstance(found, Method) and isinstance(found.estimator, TwoSided | PerExample)
    if len(calls) != 1 or not two_sided or not {"eps", "lr"} <= set(chosen):
        raise BadInput(
            f"method {config.method!r}: an attack wants a two-sided estimate for each image, and "
            "eps and lr in grid levels; use zoqo, zo-sign, zo-adam or zo-sgd, or give both to "
            "another such method"
        )
    assert isinstance(found, Method)
    return found.but(
        estimator=PerExample(found.estimator.eps, found.estimator.queries),
        perturbation=PerImage(patterned(config.pattern, found.perturbation)),
    )


def reach(name: str, level: float) -> dict[str, float]:
    """Defaults of eps and lr, in grid levels, where the budget lets a number go `level` far.

    zoqo and zo-sign look from one end of the budget to the other and step half as far. A plain
    SGD's lr is in levels^2 per unit of margin.
    """
    known = {
        "zoqo": (2 * level, level), "zo_sign": (2 * level, level),
        "zo_adam": (level, level / 2), "mezo": (level, 16 * level**2),
    }  # fmt: skip
    return dict(zip(("eps", "lr"), known[name], strict=True)) if name in known else {}


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
    if name == "pixels" and not options:
        return law
    try:
        return shapes[name](law, **options)
    except TypeError as error:
        raise BadInput(f"cannot read pattern {text!r}: {error}") from error


def steps_of(config: AttackConfig, method: Method) -> int:
    """How many steps the queries are enough for."""
    least = FIXED + method.forwards
    if config.queries < least:
        raise BadInput(
            f"queries={config.queries} are too few for one step of {config.method}: it asks "
            f"{method.forwards} times, and {FIXED} more are for the original and the last image; "
            f"want at least {least}"
        )
    return (config.queries - FIXED) // method.forwards
