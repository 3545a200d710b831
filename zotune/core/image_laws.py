"""Directions for images: one per image, and shapes that a picture's neighbourhoods suggest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from zotune.core import noise
from zotune.core.block import Block, FloatBlock
from zotune.core.inputs import InputBlock
from zotune.core.noise import Key
from zotune.core.perturbation import Gaussian, Perturbation, part_shape
from zotune.core.space import Space
from zotune.core.subspace import Subspace
from zotune.errors import BadInput


def shaped(block: Block, *shape: int) -> Block:
    """A block of this one's name and another shape, for a law to draw."""
    return FloatBlock.of(block.name, torch.empty(shape, device=block.device))


@dataclass(frozen=True)
class Tiled(Perturbation):
    """`law` on tiles of side x side pixels, each of one colour: a direction in fewer dimensions,
    which neighbouring pixels share. Its covariance is the law's between tiles, all ones within.

    >>> block = shaped(FloatBlock.of("x", torch.empty(0)), 1, 2, 4)
    >>> u = Tiled(side=2).draw(Key(0), block)
    >>> bool((u[:, :, :2] == u[0, 0, 0]).all())
    True
    """

    law: Perturbation = field(default_factory=Gaussian)
    side: int = 2

    def __post_init__(self) -> None:
        if self.side < 1:
            raise BadInput(f"tiles of side={self.side}; want at least 1")

    def draw(self, key: Key, block: Block, start: int = 0, stop: int | None = None) -> Tensor:
        return self.draw_lanes([key], block)[0][start:stop]

    def draw_lanes(self, keys: Sequence[Key], block: Block) -> Tensor:
        channels, height, width = block.shape
        small = shaped(block, channels, -(-height // self.side), -(-width // self.side))
        u = self.law.draw_lanes(keys, small)
        u = u.repeat_interleave(self.side, 2).repeat_interleave(self.side, 3)
        return u[:, :, :height, :width]


@dataclass(frozen=True)
class Square(Perturbation):
    """One square window of one colour, `share` of the image's area, anywhere in it; 0 outside.

    The window is Square Attack's (Andriushchenko et al. 2020, arXiv 1912.00049), the colour
    `law`'s. Its covariance is not the identity: few pixels move, and those together.

    >>> block = shaped(FloatBlock.of("x", torch.empty(0)), 1, 8, 8)
    >>> int((Square(share=0.25).draw(Key(0), block) != 0).sum())
    16
    """

    law: Perturbation = field(default_factory=Gaussian)
    share: float = 0.1
    halving: int = 64

    def __post_init__(self) -> None:
        if not (0 < self.share <= 1 and self.halving >= 1):
            raise BadInput(
                f"a window of share={self.share}, halving={self.halving}; want 0 < share <= 1, "
                "halving >= 1"
            )

    def draw(self, key: Key, block: Block, start: int = 0, stop: int | None = None) -> Tensor:
        return self.draw_lanes([key], block)[0][start:stop]

    def draw_lanes(self, keys: Sequence[Key], block: Block) -> Tensor:
        channels, height, width = block.shape
        area = height * width * self.share * 0.5 ** (keys[0].step / self.halving)
        side = max(1, min(height, width, round(area**0.5)))
        zeros = [0] * len(keys)
        name = f"{block.name}#window"
        chance = noise.draw_rows("uniform", keys, name, zeros, 2, block.device) * 0.5 + 0.5
        places = torch.tensor([height - side + 1, width - side + 1], device=block.device)
        corner = (chance * places).floor()
        inside = [
            (line >= at) & (line < at + side)
            for line, at in (
                (torch.arange(size, device=block.device), corner[:, k, None])
                for k, size in enumerate((height, width))
            )
        ]
        window = inside[0][:, None, :, None] & inside[1][:, None, None, :]
        return self.law.draw_lanes(keys, shaped(block, channels, 1, 1)) * window


@dataclass(frozen=True)
class PerImage(Perturbation):
    """u(key) moves image `key.lane` of an `InputBlock` alone, as `law` would a tensor of one
    image's shape. With `PerExample` estimates every image so descends its own loss: row b of
    g = sum_k c_k u_k comes from the keys of lane b only.
    """

    law: Perturbation = field(default_factory=Gaussian)

    def check(self, space: Space) -> None:
        for block in space.probed:
            if isinstance(self.law, Subspace) or _learns(self.law):
                raise BadInput(
                    f"directions {self.law!r} come from activations or from past steps, which an "
                    "image by itself does not have; use zoqo, zo-sign, zo-adam or zo-sgd (mezo)"
                )
            self.law.check(Space([shaped(block, *block.shape[1:])]))

    def draw(self, key: Key, block: Block, start: int = 0, stop: int | None = None) -> Tensor:
        return self.combine([key], [1.0], block, start, block.rows if stop is None else stop)

    def directions(self, keys: Sequence[Key], block: Block) -> Tensor:
        """u of each key in its own image: (len(keys), channels, height, width)."""
        assert isinstance(block, InputBlock)
        numbered = [key.fold(lane=block.first + key.lane) for key in keys]
        return self.law.draw_lanes(numbered, shaped(block, *block.shape[1:]))

    def combine(
        self,
        keys: Sequence[Key],
        coefficients: Sequence[float],
        block: Block,
        start: int,
        stop: int,
    ) -> Tensor:
        total = torch.zeros(part_shape(block, start, stop), device=block.device)
        live = [
            (key, c) for key, c in zip(keys, coefficients, strict=True)
            if c and start <= key.lane < stop
        ]  # fmt: skip
        if live:
            u = self.directions([key for key, _ in live], block)
            weights = torch.tensor([c for _, c in live], device=block.device)
            rows = torch.tensor([key.lane - start for key, _ in live], device=block.device)
            total.index_add_(0, rows, u * weights.view(-1, 1, 1, 1))
        return total


def _learns(law: Perturbation) -> bool:
    """Whether a law, or the one whose numbers it takes, is more than a function of the key."""
    own = type(law)
    hooks = ("state", "states", "learn_", "observe_")
    inner = getattr(law, "law", None)
    return any(getattr(own, hook) is not getattr(Perturbation, hook) for hook in hooks) or (
        isinstance(inner, Perturbation) and _learns(inner)
    )
