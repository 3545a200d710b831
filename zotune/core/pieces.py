"""How much one forward sees at a time: pieces of a batch, and how many probes side by side.

Whatever the cut, each example keeps its number in the whole batch, hence its own direction, and
its share of the batch loss. `room` is the most numbers that the input of a forward may hold, of all
probes together (tokens with their padding, or pixels): first probes run one by one, then the
batch is cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from zotune.core.probe import Probe
from zotune.errors import ZotuneError
from zotune.tasks.batch import Batch


def cut(
    batch: Batch | Sequence[Batch], micro_batch: int | None, room: int | None
) -> Sequence[Batch]:
    """The pieces of a batch, which may come in pieces already; every example has its number.

    >>> [piece.size for piece in cut(Batch({"x": torch.zeros(5, 2)}, 5), None, room=6)]
    [3, 2]
    """
    if isinstance(batch, Batch):
        return batch.cut(_examples(batch, micro_batch, room))
    pieces: list[Batch] = []
    for part in batch:
        first = sum(p.size for p in pieces)
        places = part.places or tuple(range(first, first + part.size))
        part = replace(part, places=places)
        pieces += part.cut(_examples(part, micro_batch, room))
    return pieces


def _examples(batch: Batch, micro_batch: int | None, room: int | None) -> int:
    """Examples per forward, evenly spread over as few forwards as there is room for."""
    size = min(micro_batch or batch.size, batch.size)
    if room is not None:
        fitting = max(1, room * batch.size // batch.numbers)
        size = min(size, -(-batch.size // -(-batch.size // fitting)))
    return size


def groups(
    probes: Sequence[Probe], piece: Batch, stack: int | None, room: int | None
) -> list[Sequence[Probe]]:
    """Probes that run side by side over this piece: at most `stack`, never shared and per-example
    directions together.

    >>> from zotune.core.noise import Key
    >>> two, piece = [Probe(Key(0), 0.1), Probe(Key(0), -0.1)], Batch({"x": torch.zeros(5, 2)}, 5)
    >>> [len(groups(two, piece, None, room)) for room in (None, 20, 19)]
    [1, 1, 2]
    """
    fitting = len(probes) if room is None else max(1, room // piece.numbers)
    most = fitting if stack is None else min(stack, fitting)
    found: list[list[Probe]] = []
    for probe in probes:
        if not found or len(found[-1]) >= most or found[-1][0].per_example != probe.per_example:
            found.append([])
        found[-1].append(probe)
    return list(found)


def in_order(losses: Tensor, weights: Tensor, pieces: Sequence[Batch]) -> tuple[Tensor, Tensor]:
    """(probes, examples) and (examples,) of all pieces in the order of the whole batch."""
    places = [p for piece in pieces for p in (piece.places or range(piece.size))]
    if len(places) != losses.shape[1]:  # one number per piece
        return losses, weights
    order = torch.tensor(places).argsort(stable=True)
    return losses[:, order], weights[order]


def out_of_memory(error: BaseException) -> bool:
    """Whether this says that memory, of a device or of the machine, has run out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    from accelerate.utils.memory import should_reduce_batch_size

    return isinstance(error, Exception) and bool(should_reduce_batch_size(error))


def smaller(running: tuple[int, Batch] | None, per_example: bool, error: Exception) -> int:
    """Half the room that a forward of (probes, piece) took when memory ran out.

    Raises:
        ZotuneError: nothing is left to be cut.
    """
    if running is None:
        raise error
    probes, piece = running
    if probes == 1 and (piece.size == 1 or not per_example):
        what = "one example" if per_example else "a batch that this objective takes as a whole"
        raise ZotuneError(
            f"out of memory with one probe of {what} ({piece.numbers:,} numbers go in): shorten "
            "max_length, lower the batch size of a whole objective, or take a smaller model"
        ) from error
    return max(1, probes * piece.numbers // 2)
