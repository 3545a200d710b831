"""Where a model's tensors go while a checkpoint is read: into memory, or wherever they are put."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from zotune.quant.formats.shards import Entry


class Shelf(Protocol):
    """Holds the tensors of a model that is read."""

    def take(self, entry: Entry) -> Tensor:
        """A tensor as the checkpoint stores it."""

    def put(self, tensor: Tensor) -> Tensor:
        """A tensor that was made from stored ones, at the place where it stays."""


class Memory:
    """The usual shelf: everything is in memory."""

    def take(self, entry: Entry) -> Tensor:
        return entry.read()

    def put(self, tensor: Tensor) -> Tensor:
        return tensor


def taken(shelf: Shelf, entry: Entry, dtype: torch.dtype | None = None) -> Tensor:
    """A stored tensor, in `dtype` where it is a float; None leaves it as it is."""
    keep = dtype is None or dtype == entry.dtype or not entry.dtype.is_floating_point
    return shelf.take(entry) if keep else shelf.put(entry.read().to(dtype))


def shelve_(module: nn.Module, shelf: Shelf) -> None:
    """Move a module's own tensors to their place; those on the meta device come later."""
    for tensor in module.state_dict(keep_vars=True).values():
        if not tensor.is_meta:
            tensor.data = shelf.put(tensor.detach())
