"""Images as blocks: every point that is probed is a valid uint8 image inside its budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from zotune.core import noise
from zotune.core.block import Block
from zotune.core.noise import Key
from zotune.errors import BadInput

Norm = Literal["linf", "l2"]
TOP = 255  # levels run from 0 to this


@dataclass(frozen=True)
class Budget:
    """How far an image x may be moved to x + d: max_i |d_i| <= radius for norm "linf",
    ||d||_2 <= radius for "l2". The radius counts grid levels, 1/255 of the range.

    >>> budget = Budget("linf", 8)
    >>> budget.inside(torch.tensor([[100, 2]]), torch.tensor([[103.4, -9.0]]))
    tensor([[103,   0]], dtype=torch.uint8)
    """

    norm: Norm = "linf"
    radius: float = 8.0

    def __post_init__(self) -> None:
        if self.norm not in ("linf", "l2"):
            raise BadInput(f"norm={self.norm!r}; want 'linf' or 'l2'")
        if not (math.isfinite(self.radius) and self.radius >= 1):
            raise BadInput(
                f"a budget of {self.radius:g}/255 in {self.norm} holds no image but the original: "
                "want at least 1/255"
            )

    def level(self, numel: int) -> float:
        """How far each of `numel` numbers goes when all use up the budget alike, at least 1."""
        share = 1.0 if self.norm == "linf" else numel**-0.5
        return max(1.0, self.radius * share)

    def inside(self, original: Tensor, wanted: Tensor) -> Tensor:
        """The uint8 images near `wanted` (any numbers) inside the budget of `original`: rounded to
        the nearest level, then clamped (linf) or drawn in along the line to the original (l2)."""
        base = original.float()
        d = wanted.round().clamp_(0, TOP).sub_(base)
        if self.norm == "linf":
            d.clamp_(-math.floor(self.radius), math.floor(self.radius))
        else:
            d = _drawn_in(d, self.radius)
        return d.add_(base).to(torch.uint8)

    def sizes(self, original: Tensor, moved: Tensor) -> Tensor:
        """The norm of each image's perturbation, in levels: float64 (images,)."""
        d = (moved.double() - original.double()).flatten(1)
        return d.abs().amax(1) if self.norm == "linf" else d.norm(dim=1)


def _drawn_in(d: Tensor, radius: float) -> Tensor:
    """Whole d, shortened to norm <= radius in whole numbers.

    d is scaled and its magnitudes cut to whole numbers; what this leaves of the radius is given
    back, one level each, to those that lost most. Cutting alone would lose every small d.
    """
    flat = d.flatten(1).double()
    scaled = flat * (radius / flat.norm(dim=1, keepdim=True).clamp_min(radius))
    cut = scaled.abs().floor()
    lost = scaled.abs() - cut
    # Equal losses are the rule (all +-1): a fixed noise, not the place in the image, parts them.
    lost += 1e-6 * noise.draw("uniform", Key(0), "budget#ties", 0, flat.shape[1], d.device)
    order = lost.argsort(dim=1, descending=True, stable=True)
    price = (2 * cut + 1).gather(1, order).cumsum(1)
    left = radius * radius - cut.square().sum(1, keepdim=True)
    given = torch.zeros_like(cut).scatter_(1, order, (price <= left).double())
    short = torch.minimum(cut + given, flat.abs()) * flat.sign()
    return short.float().view_as(d)


@dataclass
class InputBlock(Block):
    """Images under attack: (images, channels, height, width), each row a problem of its own.

    Coordinates are uint8 levels. `first` is the number of row 0 among all images of the run, so
    that an image has the same random numbers in whatever batch it comes.
    """

    original: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))
    budget: Budget = field(default_factory=Budget)
    first: int = 0
    current: Tensor = field(init=False)

    def __post_init__(self) -> None:
        if self.original.dtype != torch.uint8:
            raise BadInput(f"images of dtype {self.original.dtype}; want uint8")
        self.current = self.original.clone()

    @classmethod
    def of(cls, images: Tensor, budget: Budget, first: int = 0) -> InputBlock:
        """
        >>> block = InputBlock.of(torch.zeros(2, 1, 1, 3, dtype=torch.uint8), Budget("linf", 4))
        >>> block.at(torch.tensor([[[[9.0, 1.0, -1.0]]]]).expand(2, 1, 1, 3), 2.0)[0]
        tensor([[[4, 2, 0]]], dtype=torch.uint8)
        """
        shape = tuple(images.shape)
        return cls(
            "images", shape, images.device, (), original=images, budget=budget, first=first
        )  # fmt: skip

    def at(self, u: Tensor, step: float) -> Tensor:
        return self.at_rows(slice(None), u, step)

    def at_rows(self, rows: Tensor | slice, u: Tensor | None, step: float) -> Tensor:
        """Chosen images of `at` (u holds just those rows); u = None gives the base point's."""
        if u is None:
            return self.current[rows]
        moved = self.current[rows].float() + (step * self.reach) * u
        return self.budget.inside(self.original[rows], moved)

    def value(self) -> Tensor:
        return self.current

    def move_(self, start: int, stop: int, step: Tensor, key: Key) -> None:
        """Steps that are not whole are rounded stochastically, to the mean of the step."""
        down = step.floor()
        if bool((down != step).any()):
            width = self.numel // max(self.rows, 1)
            low = (self.first + start) * width
            name = f"{self.name}#round"
            chance = noise.draw("uniform", key, name, low, low + step.numel(), step.device)
            down += chance.view_as(step) * 0.5 + 0.5 < step - down
        moved = self.current[start:stop].float() - down
        self.current[start:stop] = self.budget.inside(self.original[start:stop], moved)

    def decay_(self, factor: float, key: Key) -> None:
        raise BadInput(f"weight_decay={factor} on images, which do not decay; use weight_decay=0")

    def state(self) -> Tensor:
        return self.current

    def load_(self, state: Tensor) -> None:
        self.current.copy_(state)


def on_grid(images: Tensor | Sequence[object]) -> Tensor:
    """Images (n, channels, height, width) as uint8: given so, or as floats k/255.

    Raises:
        BadInput: another shape, no image, or numbers between two levels (the image is named).

    >>> on_grid(torch.full((1, 1, 1, 2), 0.2)).tolist()
    [[[[51, 51]]]]
    """
    given = torch.as_tensor(images).detach().cpu()
    if given.dim() != 4 or not given.numel():
        raise BadInput(
            f"images of shape {tuple(given.shape)}; want (images, channels, height, width), "
            "at least one"
        )
    if given.dtype == torch.uint8:
        return given.contiguous()
    if not given.is_floating_point():
        raise BadInput(f"images of dtype {given.dtype}; want uint8, or floats that are k/255")
    levels = given.double() * TOP
    whole = levels.round()
    wrong = ~((levels - whole).abs().lt(1e-3) & (whole >= 0) & (whole <= TOP)).flatten(1).all(1)
    if bool(wrong.any()):
        number = int(wrong.nonzero()[0])
        raise BadInput(
            f"image {number} is not on the uint8 grid: {int(wrong.sum())} of {len(given)} images "
            "hold numbers that are not k/255 in [0, 1]; want uint8, or (255 * x).round() / 255"
        )
    return whole.to(torch.uint8).contiguous()
