"""The tuned blocks of a streamed model: moved when their layer is next in memory.

A step's losses bring every layer into memory once. Its update would bring them all a second time;
instead it waits for the next step's visit: layer arrives ─► last step's update ─► this step's
probes ─► layer leaves. `Tuner.settle_` ends the waiting, wherever somebody looks.
"""

from __future__ import annotations

from collections.abc import Iterator, Set

from torch import Tensor

from zotune.core.block import Block, FloatBlock
from zotune.core.space import Space
from zotune.core.step import Tuner
from zotune.models.streaming import Stream, Unit


class StreamedBlocks:
    """What a tuner must know of a stream (`zotune.core.step.Elsewhere`).

    Blocks of layers wait. Blocks of what lies beside the layers do not: their tensors may be read
    by other modules than their own. Nor do blocks of a layer that the last forward went round.
    """

    def __init__(self, space: Space, stream: Stream) -> None:
        self.stream = stream
        stream.park()
        for each in stream.units:  # adapters have been hung on layers meanwhile
            inside = (*each.module.parameters(), *each.module.buffers())
            for tensor in inside:
                if stream.store.place(tensor) is None and tensor.device.type == "cpu":
                    stream.store.own_(tensor)
            each.add_(inside)
        by_module = {id(m): unit for unit in stream.units for m in unit.module.modules()}
        self.units: dict[str, Unit] = {}
        self.names: dict[Unit, list[str]] = {}
        for block in space:
            found = {by_module.get(id(owner.module)) for owner in block.owners}
            unit = found.pop() if len(found) == 1 else None
            if unit is not None:
                self.units[block.name] = unit
                if unit.layer:
                    self.names.setdefault(unit, []).append(block.name)
                unit.followers.append(block.follow_)
                block.device = stream.device
            for owner in block.owners:
                if owner.tensor.device.type == "cpu":
                    stream.store.own_(owner.tensor)
            block.follow_()

    def serve_(self, tuner: Tuner) -> None:
        """From now on this tuner's layers are moved as they arrive, and what a method keeps of a
        block comes and goes with it."""
        self.stream.park()
        for block in tuner.space:
            unit = self.units.get(block.name)
            for tensor in kept_of(tuner, block) if unit is not None else ():
                if large(tensor) or self.stream.device.type != "cpu":
                    self.stream.store.own_(tensor)
                    unit.add_([tensor])  # type: ignore[union-attr]
        tuner.moves.elsewhere = self
        self.stream.arrived = lambda unit: tuner.moves.arrived_(self.names.get(unit, ()))

    def waiting(self) -> Set[str]:
        visited, self.stream.visited = self.stream.visited, set()
        return {name for unit in visited for name in self.names.get(unit, ())}

    def visit(self, block: Block) -> None:
        unit = self.units.get(block.name)
        if unit is not None:
            self.stream.visit(unit)
            unit.written = True

    def rest(self) -> None:
        self.stream.rest()


def kept_of(tuner: Tuner, block: Block) -> Iterator[Tensor]:
    """The tensors that go with a block: its units, its master, its memory, the rule's state."""
    held = [block.unit, block.reach, block.stride, *block.memory.values()]
    if isinstance(block, FloatBlock) and block.master.dtype != block.tensor.dtype:
        held.append(block.master)
    for state in tuner.state.values():
        held += state.get(block.name, {}).values()
    return (t for t in held if isinstance(t, Tensor))


def large(tensor: Tensor) -> bool:
    """Whether a tensor is worth a page of its own.

    >>> import torch
    >>> large(torch.zeros(3)), large(torch.zeros(3000))
    (False, True)
    """
    return tensor.numel() * tensor.element_size() > 4096
