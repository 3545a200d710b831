"""A batch of tensors that can be stacked, so that one forward serves several probes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from zotune.errors import BadInput


@dataclass(frozen=True)
class Narrow:
    """Leave to run forwards of fewer rows than a stacked batch has, before the one of all rows.

    held(rows): while it is held, a forward has so many rows per copy of the batch. least: the
    fewest rows that may stand for all of a copy (as many as it has examples where each sees
    parameters of its own).
    """

    held: Callable[[int], AbstractContextManager[None]]
    least: int = 1


@dataclass(frozen=True, eq=False)
class Batch:
    """Tensors of `size` examples, example-major, possibly several stacked copies of one batch.

    Dim 0 of every tensor is size * k with its own whole k >= 1 (k = candidates per example; 1 for
    labels). In a stacked batch, row = copy * (size / copies) * k + example * k + candidate.
    `places` are the numbers that the examples of a piece have in the whole batch (0, 1, ... when
    None). `narrow` allows an objective to run what rows share by itself.

    Raises:
        BadInput: size < 1, copies does not divide size, or a tensor's dim 0 is no multiple of size.

    >>> batch = Batch({"input_ids": torch.arange(6).view(6, 1), "label": torch.tensor([0, 1])}, 2)
    >>> batch.width("input_ids"), batch.width("label")
    (3, 1)
    >>> twice = batch.repeat(2)
    >>> twice.size, twice.copies, twice["label"].tolist()
    (4, 2, [0, 1, 0, 1])
    >>> twice.select(1, 2)["input_ids"].flatten().tolist()
    [3, 4, 5]
    """

    tensors: dict[str, Tensor]
    size: int
    copies: int = 1
    places: tuple[int, ...] | None = None
    narrow: Narrow | None = None

    def __post_init__(self) -> None:
        if self.size < 1:
            raise BadInput(f"a batch needs at least one example, got size={self.size}")
        if self.copies < 1 or self.size % self.copies:
            raise BadInput(f"copies={self.copies} does not divide size={self.size}")
        for name, tensor in self.tensors.items():
            if tensor.dim() == 0 or tensor.shape[0] == 0 or tensor.shape[0] % self.size:
                raise BadInput(
                    f"tensor {name!r} of shape {tuple(tensor.shape)} has no whole number of rows "
                    f"for each of the {self.size} examples"
                )

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def width(self, name: str) -> int:
        """Rows per example, k, of one tensor."""
        return self.tensors[name].shape[0] // self.size

    def repeat(self, p: int) -> Batch:
        """`p` copies stacked probe-major along dim 0."""
        if p < 1:
            raise BadInput(f"cannot repeat a batch {p} times; p must be at least 1")
        if p == 1:
            return self
        stacked = {name: torch.cat([tensor] * p) for name, tensor in self.tensors.items()}
        return replace(self, tensors=stacked, size=self.size * p, copies=self.copies * p)

    @property
    def numbers(self) -> int:
        """How many numbers its largest tensor holds: tokens with their padding, or pixels."""
        return max(tensor.numel() for tensor in self.tensors.values())

    def select(self, lo: int, hi: int) -> Batch:
        """The examples lo..hi-1 (views). Whole copies stay copies; any other cut counts as one."""
        if not 0 <= lo < hi <= self.size:
            raise BadInput(f"examples {lo}..{hi} are not inside a batch of {self.size}")
        cut = {n: t[lo * self.width(n) : hi * self.width(n)] for n, t in self.tensors.items()}
        one = self.size // self.copies
        whole = lo % one == 0 and hi % one == 0
        places = self.places if whole else None
        if self.copies == 1:
            places = (self.places or tuple(range(one)))[lo:hi]
        return Batch(cut, hi - lo, (hi - lo) // one if whole else 1, places)

    def cut(self, most: int) -> list[Batch]:
        """In pieces of at most `most` examples each.

        >>> [b.places for b in Batch({"x": torch.zeros(3)}, 3).cut(2)]
        [(0, 1), (2,)]
        """
        if most >= self.size:
            return [self]
        return [self.select(i, min(i + most, self.size)) for i in range(0, self.size, most)]

    def pinned(self) -> Batch:
        """The same batch in page-locked memory, from where copies to a GPU run beside its work."""
        return replace(self, tensors={n: t.pin_memory() for n, t in self.tensors.items()})

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with every tensor on `device`."""
        moved = {name: t.to(device, non_blocking=True) for name, t in self.tensors.items()}
        return replace(self, tensors=moved)


def pad_stack(
    rows: Sequence[Sequence[int]],
    value: int,
    side: str = "right",
    length: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Pad integer rows of unequal length to one (rows, length) tensor, with its 0/1 mask.

    Args:
        rows: sequences of token ids; empty ones become all padding.
        value: the padding id.
        side: "right" or "left": where the padding goes.
        length: width of the result; the longest row when None.

    Raises:
        BadInput: no rows, an unknown side, or a row longer than `length`.

    >>> ids, mask = pad_stack([[5, 6, 7], [8]], value=0, side="left")
    >>> ids.tolist(), mask.tolist()
    ([[5, 6, 7], [0, 0, 8]], [[1, 1, 1], [0, 0, 1]])
    """
    if not rows:
        raise BadInput("cannot pad an empty list of rows; a batch needs at least one example")
    if side not in ("left", "right"):
        raise BadInput(f"side={side!r} is not a padding side; use 'left' or 'right'")
    longest = max(len(row) for row in rows)
    width = longest if length is None else length
    if longest > width:
        raise BadInput(f"a row of {longest} tokens does not fit length={width}")
    fill = [[value] * (width - len(row)) for row in rows]
    right = side == "right"
    padded = [[*row, *gap] if right else [*gap, *row] for row, gap in zip(rows, fill, strict=True)]
    lengths = torch.tensor([len(row) for row in rows]).unsqueeze(1)
    places = torch.arange(width) if right else torch.arange(width - 1, -1, -1)
    ids = torch.tensor(padded, dtype=torch.long).view(len(rows), width)
    return ids, (places < lengths).long()
