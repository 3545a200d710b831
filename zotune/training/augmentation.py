"""Images moved or mirrored anew each time they are seen; feature maps likewise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from zotune.core.calls import nearest, split_calls
from zotune.errors import BadInput
from zotune.tasks.batch import Batch

_LANE = 1 << 40  # Philox keys that no order of examples uses


@dataclass(frozen=True)
class Flip:
    """Left and right exchanged.

    >>> Flip()(torch.tensor([[[[1.0, 2.0]]]]), 8).tolist()
    [[[[2.0, 1.0]]]]
    """

    def __call__(self, maps: Tensor, width: int) -> Tensor:
        """Maps (..., height, width of the map) of images `width` pixels wide."""
        return maps.flip(-1)


@dataclass(frozen=True)
class Shift:
    """Moved right and down by so many pixels of the image, the border repeated behind; between the
    cells of a smaller map linearly.

    >>> Shift(2, 0)(torch.tensor([[[[1.0, 2.0, 3.0, 4.0]]]]), 8).tolist()
    [[[[1.0, 1.0, 2.0, 3.0]]]]
    """

    right: int = 0
    down: int = 0

    def __call__(self, maps: Tensor, width: int) -> Tensor:
        cells = maps.shape[-1] / width
        return _moved(_moved(maps, self.right * cells, -1), self.down * cells, -2)


Transform = Flip | Shift


def _moved(maps: Tensor, cells: float, dim: int) -> Tensor:
    whole = int(np.floor(cells))
    share = cells - whole
    near = _rolled(maps, whole, dim)
    return near if not share else (1 - share) * near + share * _rolled(maps, whole + 1, dim)


def _rolled(maps: Tensor, cells: int, dim: int) -> Tensor:
    """Moved by whole cells; the border is repeated behind."""
    length = maps.shape[dim]
    places = torch.arange(length, device=maps.device) - cells
    return maps.index_select(dim, places.clamp(0, length - 1))


@dataclass(frozen=True)
class Augmentation:
    """Each time an example is seen, it is left alone or one transform is drawn, equally likely."""

    transforms: tuple[Transform, ...]

    def drawn(self, seed: int, place: int) -> int:
        """The transform of the `place`-th example seen, from 1; 0 for none."""
        key = np.array([seed, _LANE + place], np.uint64)
        word = int(np.random.Philox(key=key).random_raw(1)[0])
        return word % (len(self.transforms) + 1)

    def image(self, batch: Batch) -> str:
        """The name of the batch's images, its only tensor of four dimensions."""
        found = [n for n, t in batch.tensors.items() if t.dim() == 4]
        if len(found) != 1:
            raise BadInput(
                f"augment wants batches with one tensor (examples, channels, height, width); "
                f"this task's have {len(found)}: drop augment"
            )
        return found[0]

    def of(self, batch: Batch, chosen: Sequence[int]) -> Batch:
        """The batch with the chosen transform (0: none) on each image."""
        name = self.image(batch)
        images = batch[name]
        rows = [
            image if not c else self.transforms[c - 1](image, images.shape[-1])
            for image, c in zip(images, chosen, strict=True)
        ]
        return Batch({**batch.tensors, name: torch.stack(rows)}, batch.size, batch.copies)


def parse_augment(text: str) -> Augmentation:
    """From short names: shift(pixels=4) moves in each of the four directions.

    >>> [type(t).__name__ for t in parse_augment("flip + shift(pixels=4)").transforms]
    ['Flip', 'Shift', 'Shift', 'Shift', 'Shift']
    """
    transforms = list[Transform]()
    for name, options in split_calls(text):
        if name == "flip" and not options:
            transforms.append(Flip())
        elif name == "shift" and set(options) <= {"pixels"}:
            by = options.get("pixels", 4)
            if not isinstance(by, int) or by < 1:
                raise BadInput(f"shift(pixels={by!r}); want a whole number of at least 1")
            transforms += [Shift(by), Shift(-by), Shift(0, by), Shift(0, -by)]
        else:
            raise BadInput(
                f"cannot read augment={text!r}: {name}{nearest(name, ('flip', 'shift(pixels=4)'))}"
            )
    return Augmentation(tuple(transforms))
