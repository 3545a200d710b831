"""Forwards recorded once per shape and replayed: a step of many small kernels at a GPU's own pace.

A recorded forward (a CUDA graph) runs the same kernels on the same memory again. So what changes
from step to step lies in memory that is written before a replay: the batch, and the table of the
probes' keys and steps (`View.streams`), from which kernels draw their directions. The first batch
of a shape runs as ever; the second is recorded; that one and the next are compared with a plain
forward, which finds whatever a recording has frozen. What cannot be recorded runs plainly, which is
said once.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from zotune.core.block import FloatBlock
from zotune.core.prefix import saved
from zotune.core.sites import Site, View, streams
from zotune.tasks.batch import Batch

Out = tuple[Tensor, Tensor]
Run = Callable[[View, Batch], Out]
"""A stacked forward: loss and weight of every row."""
Record = Callable[[Callable[[], Out]], tuple[Callable[[], None], Out]]
"""Record work without running it: how to run it again, and where its results will lie."""

SHAPES = 4  # recordings kept at a time
TRIES = 8  # recordings after which they must have been replayed TRIES times each, or there are none
MOSTLY = 0.5  # of a network in the shared prefix, which a recording computes for each probe
CHECKS = 2  # replays compared with a plain forward

log = logging.getLogger("zotune")


class Cuda:
    """Records CUDA graphs that share their memory, since only one runs at a time."""

    def __init__(self) -> None:
        self.pool: Any = None

    def __call__(self, work: Callable[[], Out]) -> tuple[Callable[[], None], Out]:
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            out = work()
        return graph.replay, out


@dataclass
class Recording:
    """One recorded forward, the memory it reads, and the tensors it was recorded over."""

    batch: Batch
    table: Tensor
    places: list[tuple[MutableMapping[str, Any], str, Tensor, int]]
    blocks: list[tuple[FloatBlock, Tensor, Tensor | float]]
    replay: Callable[[], None] = lambda: None
    out: Out | None = None
    unchecked: int = CHECKS

    @property
    def valid(self) -> bool:
        """Whether model and blocks still lie where they lay."""
        return all(b.master is m and b.reach is r for b, m, r in self.blocks) and all(
            table.get(name) is tensor and tensor.data_ptr() == place
            for table, name, tensor, place in self.places
        )

    def fill_(self, view: View, batch: Batch) -> None:
        """Put this step's batch and probes where the recording reads them."""
        for name, tensor in self.batch.tensors.items():
            tensor.copy_(batch[name], non_blocking=True)
        self.table.copy_(streams(view, "cpu"), non_blocking=True)


@dataclass
class Graphs:
    """Runs stacked forwards, recorded where a shape comes again.

    `run` is the forward as it always is, `bare` the one that is recorded: nothing in it may wait
    for a number from the GPU. `off` says why nothing is recorded.
    """

    model: nn.Module
    sites: Sequence[Site]
    run: Run
    bare: Run
    record: Record
    off: str | None = None
    recorded: int = field(default=0, init=False)
    replayed: int = field(default=0, init=False)
    _seen: set[Hashable] = field(default_factory=set, init=False)
    _found: OrderedDict[Hashable, Recording] = field(default_factory=OrderedDict, init=False)

    def __call__(self, view: View, batch: Batch) -> Out:
        """Loss and weight of every row of this stacked forward."""
        if self.off is None:
            try:
                recording = self._recording(view, batch)
                if recording is not None:
                    return self._replayed(recording, view, batch)
            except Exception as error:  # whatever a recording raises, the plain forward remains
                why = f"{type(error).__name__}: {error}".split("\n")[0]
                self._switch_off(why, logging.WARNING)
        out = self.run(view, batch)
        if self.off is None and saved(self.model, view) > MOSTLY:
            self._switch_off("most of the network is computed once for all probes")
        return out

    def _recording(self, view: View, batch: Batch) -> Recording | None:
        key = _shape(view, batch)
        found = self._found.get(key)
        if found is not None and found.valid:
            self._found.move_to_end(key)
            return found
        if key not in self._seen:
            self._seen.add(key)
            return None
        if self.recorded >= TRIES and self.replayed < TRIES * self.recorded:
            self._switch_off("no shape of batch comes often enough")
            return None
        self._found.pop(key, None)
        found = self._made(view, batch)
        if found is not None:
            self._found[key] = found
            if len(self._found) > SHAPES:
                self._found.popitem(last=False)
        return found

    def _made(self, view: View, batch: Batch) -> Recording | None:
        blocks = _drawable(self.sites, view)
        if blocks is None:
            self._switch_off("these directions are not drawn inside kernels")
            return None
        still = Batch({n: t.clone() for n, t in batch.tensors.items()}, batch.size, batch.copies)
        device = blocks[0][0].device
        table = streams(view, device)
        found = Recording(still, table, list(_places(self.model)), blocks)
        self.bare(replace(view, table=table, visited=set()), still)  # compiles what is not yet
        found.replay, found.out = self.record(
            lambda: self.bare(replace(view, table=table, visited=set()), still)
        )
        self.recorded += 1
        return found

    def _replayed(self, found: Recording, view: View, batch: Batch) -> Out:
        found.fill_(view, batch)
        found.replay()
        assert found.out is not None
        loss, weight = found.out
        self.replayed += 1
        if found.unchecked:
            found.unchecked -= 1
            loss, weight = loss.clone(), weight.clone()
            truth = self.run(view, batch)
            if not _same(truth[0], loss) or not _same(truth[1], weight):
                why = "a replay gave other losses than the forward that was recorded"
                self._switch_off(why, logging.WARNING)
            return truth
        return loss, weight

    def _switch_off(self, why: str, level: int = logging.INFO) -> None:
        self.off = why
        self._found.clear()
        log.log(level, "forwards are not recorded as CUDA graphs but run as they are: %s", why)


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a.float(), b.float(), rtol=1e-5, atol=1e-6, equal_nan=True)


def _shape(view: View, batch: Batch) -> Hashable:
    """What a recording depends on beyond the numbers in its memory."""
    keys = [probe.key for probe in view.probes]
    tensors = tuple((n, tuple(t.shape), t.dtype, t.device) for n, t in batch.tensors.items())
    probes = tuple((keys.index(p.key), p.step == 0, p.per_example) for p in view.probes)
    return tensors, batch.size, batch.copies, probes, keys[0].seed, view.perturbation


def _drawable(
    sites: Sequence[Site], view: View
) -> list[tuple[FloatBlock, Tensor, Tensor | float]] | None:
    """The blocks, if kernels draw the directions of all of them."""
    from zotune.core import forwards_triton

    found = []
    for site in sites:
        for block in site.blocks.values():
            if forwards_triton.drawn(view, block) is None:
                return None
            assert isinstance(block, FloatBlock)
            found.append((block, block.master, block.reach))
    return found


def _places(model: nn.Module) -> Iterator[tuple[MutableMapping[str, Any], str, Tensor, int]]:
    """Every tensor of the model: whose, its name, itself, where it lies."""
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is not None:
                    yield table, name, tensor, tensor.data_ptr()
