"""Augmented images from cached feature maps: similarity-aware channel augmentation.

A frozen part F does not commute with every transform T of its input, and not every channel does
alike. Over a few examples, channel by channel,

    s_c(T) = mean_x cos(F_c(T x), T F_c(x))

and channels with s_c below a threshold are cached as F_c(T x) too, while the others are
transformed on the fly. The idea is that of arXiv 2508.15033; its measure and threshold are not
published, so both are our reconstruction. Shifts by a whole number of the feature map's cells
commute but for the border; a flip commutes with symmetric filters only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from zotune.errors import BadInput
from zotune.tasks.batch import Batch
from zotune.training.augmentation import Augmentation


@dataclass(frozen=True)
class Channels:
    """How each transform is made from cached maps: `copied` channels of it are cached, the rest is
    transformed from the base maps. A record is the base maps, then the copies, along dim 0.

    >>> from zotune.training.augmentation import Flip
    >>> channels = Channels(Augmentation((Flip(),)), 2, 4, ((1,),))
    >>> record = torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]], [[7.0, 8.0]]])
    >>> channels.made(record, 1).tolist(), channels.made(record, 0).tolist()
    ([[[2.0, 1.0]], [[7.0, 8.0]]], [[[1.0, 2.0]], [[3.0, 4.0]]])
    """

    augmentation: Augmentation
    count: int
    width: int
    copied: tuple[tuple[int, ...], ...]

    @classmethod
    def measured(
        cls,
        augmentation: Augmentation,
        batch: Batch,
        state: Callable[[Batch], Tensor],
        threshold: float,
    ) -> Channels:
        """Channels whose mean similarity on `batch` is below `threshold` are copied."""
        base, width = state(batch), batch[augmentation.image(batch)].shape[-1]
        if base.dim() != 4:
            raise BadInput(
                f"augment wants feature maps at the freeze point; this one gives shape "
                f"{tuple(base.shape)}: freeze less deep, or drop augment"
            )
        copied = []
        for number, transform in enumerate(augmentation.transforms, start=1):
            truth = state(augmentation.of(batch, [number] * batch.size))
            alike = commuting(truth, transform(base, width))
            copied.append(tuple(torch.nonzero(alike < threshold).flatten().tolist()))
        return cls(augmentation, base.shape[1], width, tuple(copied))

    def records(self, batch: Batch, state: Callable[[Batch], Tensor]) -> list[Tensor]:
        """The record of each example; the frozen part runs once, and once more for each transform
        of which channels are copied."""
        parts = [state(batch).cpu()]
        for number, channels in enumerate(self.copied, start=1):
            if channels:
                moved = self.augmentation.of(batch, [number] * batch.size)
                parts.append(state(moved)[:, list(channels)].cpu())
        return list(torch.cat(parts, dim=1))

    def made(self, record: Tensor, chosen: int) -> Tensor:
        """The maps of one example under a transform (0: none)."""
        base = record[: self.count]
        if not chosen:
            return base
        maps = self.augmentation.transforms[chosen - 1](base, self.width)
        start = self.count + sum(map(len, self.copied[: chosen - 1]))
        channels = list(self.copied[chosen - 1])
        if channels:
            maps = maps.index_copy(0, torch.tensor(channels), record[start : start + len(channels)])
        return maps

    @property
    def passes(self) -> int:
        """How often the frozen part runs for a record."""
        return 1 + sum(bool(channels) for channels in self.copied)


def commuting(truth: Tensor, made: Tensor) -> Tensor:
    """s_c = mean_x cos(truth_c, made_c) of maps (examples, channels, height, width): (channels,).

    Maps that are zero on both sides are alike.
    """
    a, b = truth.double().flatten(2), made.double().flatten(2)
    both, sizes = (a * b).sum(-1), a.norm(dim=-1) * b.norm(dim=-1)
    silent = ((a == 0) & (b == 0)).all(-1)
    return torch.where(silent, 1.0, both / sizes.clamp_min(1e-300)).mean(0)
