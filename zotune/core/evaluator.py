"""Evaluators: probes and a batch in, losses out. No parameter is ever written."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from zotune.allocator import keep_freed
from zotune.core import forwards as _forwards  # registers the fast probed forwards
from zotune.core import image_forwards as _image_forwards
from zotune.core import pieces
from zotune.core.exact import LastLayers
from zotune.core.graphs import Cuda, Graphs, Record
from zotune.core.perturbation import Perturbation
from zotune.core.prefix import Prefix
from zotune.core.probe import Losses, Probe
from zotune.core.sites import StackingError, View, observing, probing, sites_of
from zotune.core.space import Space
from zotune.errors import BadInput
from zotune.quant.kernels import has_triton
from zotune.quant.layer import QuantLayer
from zotune.tasks.batch import Batch, Narrow

log = logging.getLogger("zotune")
assert _forwards
assert _image_forwards

CHECKED = 4  # examples that `check` looks at, with one pair of probes

Objective = Callable[[nn.Module, Batch], tuple[Tensor, Tensor]]


class Evaluator(ABC):
    """Turns probes and a batch into losses."""

    space: Space
    forwards: int = 0
    """Forward passes over a batch so far, one per probe."""

    @abstractmethod
    def losses(self, probes: Sequence[Probe], batch: Any, perturbation: Perturbation) -> Losses:
        """The loss of each probe on this batch, as theta stands now."""


class TorchEvaluator(Evaluator):
    """Stacks probes along the batch axis of a torch model.

    objective(model, batch) gives (loss, weight) per example, both (rows,); `stack` probes run in
    one forward (None: all of a step; 1: one at a time, least memory), `micro_batch` examples at a
    time (None: all), and no more numbers go into a forward than there is `room` for (`pieces`).
    Where memory runs out, the step is measured again with half the room. Dropout is off. A batch
    may also come in pieces, none or more, each of which is then run by itself. `narrow`: an
    objective may run what rows share, such as a prompt, by itself. On a GPU forwards of shapes
    that come again are recorded and replayed, by `record` if it is given.
    """

    def __init__(
        self,
        model: nn.Module,
        space: Space,
        objective: Objective,
        *,
        stack: int | None = None,
        micro_batch: int | None = None,
        per_example: bool = True,
        fast: bool = True,
        room: int | None = None,
        narrow: bool = True,
        record: Record | None = None,
    ) -> None:
        for name, value in (("stack", stack), ("micro_batch", micro_batch), ("room", room)):
            if value is not None and value < 1:
                raise BadInput(f"{name}={value}; want at least 1, or None for all")
        if not per_example and micro_batch is not None:
            raise BadInput(
                "this objective gives one number per batch (F1, a Python score), which micro-"
                "batches would change; drop micro_batch or lower the batch size"
            )
        keep_freed()
        self.model = model.eval()
        self.objective = objective
        self.stack = stack if per_example else 1
        self.micro_batch = micro_batch
        self.per_example = per_example
        self.fast = fast
        self.room, self.narrow = room, narrow
        self.running: tuple[int, Batch] | None = None
        self.record = record
        self.visited: set[str] = set()
        self.watch_(space)

    def watch_(self, space: Space) -> None:
        """From now on probes move these blocks."""
        self.space = space
        self.sites = sites_of(space.probed)
        self.last = LastLayers(self.model, [b for b in space if b.exact])
        self.prefix = Prefix.of(self.model, [*self.sites, *self.last.sites])
        self.graphs = self._graphs()

    def _graphs(self) -> Graphs | None:
        """Recorded forwards, on a GPU whose kernels draw directions by themselves."""
        blocks = self.space.probed
        on_gpu = bool(blocks) and has_triton(blocks[0].device.type)
        if not (self.fast and (self.record or on_gpu)) or self.last.blocks:
            return None
        bare = partial(self._forward, sharing_prefix=False)
        record = self.record or Cuda()
        return Graphs(self.model, self.sites, self._forward, bare, record)

    @torch.no_grad()
    def losses(
        self, probes: Sequence[Probe], batch: Batch | Sequence[Batch], perturbation: Perturbation
    ) -> Losses:
        forwards = self.forwards
        while True:
            try:
                return self._measured(probes, batch, perturbation)
            except Exception as error:
                if not pieces.out_of_memory(error):
                    raise
                room = pieces.smaller(self.running, self.per_example, error)
            if self.room is None or room < self.room:
                log.warning("out of memory; from here on %d numbers go into a forward", room)
            self.room, self.forwards = room, forwards
            self.last.sums.clear()
            if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
                torch.cuda.empty_cache()

    def _measured(
        self, probes: Sequence[Probe], batch: Batch | Sequence[Batch], perturbation: Perturbation
    ) -> Losses:
        if not perturbation.observes:
            return self._losses(probes, batch, perturbation)
        base = [p for p in probes if p.step == 0] or [Probe(probes[0].key, 0.0)]
        with observing(self.sites, perturbation):
            seen = self._losses(base, batch, perturbation)
        others = [p for p in probes if p.step != 0]
        found = self._losses(others, batch, perturbation) if others else seen
        return found.put_among(seen, [p.step == 0 for p in probes])

    def _losses(
        self, probes: Sequence[Probe], batch: Batch | Sequence[Batch], perturbation: Perturbation
    ) -> Losses:
        if any(p.per_example for p in probes) and not self.per_example:
            raise BadInput(
                "directions per example need a loss per example; this objective gives one number "
                "per batch: use directions='batch'"
            )
        self.forwards += len(probes)
        found = self.pieces(batch)
        if not found:
            return Losses.none(len(probes))
        losses, weights = [], []
        for piece in found:
            groups = pieces.groups(probes, piece, self.stack, self.room)
            rows = [self._stacked(group, piece, perturbation) for group in groups]
            losses.append(torch.cat([loss for loss, _ in rows]))
            weights.append(rows[0][1])
        loss, weight = pieces.in_order(torch.cat(losses, dim=1), torch.cat(weights), found)
        total = weight.sum().clamp_min(1e-300)
        exact = self.last.gradients(len(probes) * float(total))
        return Losses(loss, weight / total, exact)

    def pieces(self, batch: Batch | Sequence[Batch]) -> Sequence[Batch]:
        """What one forward sees of a batch at a time."""
        if not self.per_example:
            return [batch] if isinstance(batch, Batch) else batch
        return pieces.cut(batch, self.micro_batch, self.room)

    def _stacked(
        self, probes: Sequence[Probe], batch: Batch, perturbation: Perturbation
    ) -> tuple[Tensor, Tensor]:
        """Losses (probes, examples) and weights (examples,) of one forward."""
        self.running = len(probes), batch
        rows = len(probes) * max(len(t) for t in batch.tensors.values())
        view = View(probes, batch.size, perturbation, rows=rows, places=batch.places)
        loss, weight = (self.graphs or self._forward)(view, batch)
        self.visited |= view.visited
        loss = loss.detach().double().view(len(probes), -1).cpu()
        return loss, weight.detach().double().view(len(probes), -1)[0].cpu()

    def _forward(
        self, view: View, batch: Batch, sharing_prefix: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Loss and weight of every row."""
        shared = self.prefix.shared(view) if self.fast and sharing_prefix else nullcontext()
        stacked = batch.repeat(len(view.probes))
        # How long a shared prompt is differs from batch to batch, which no recording can follow.
        recording = self.graphs is not None and self.graphs.off is None
        if self.narrow and not recording and not view.perturbation.observes:
            least = batch.size if view.lanes else 1
            stacked = replace(stacked, narrow=Narrow(view.narrowed, least))
        with probing(self.sites, view, self.fast), shared, self.last.held():
            loss, weight = self.objective(self.model, stacked)
            self.last.add_(loss, weight)
        return loss.detach(), weight.detach()

    def check(
        self,
        batch: Batch,
        probes: Sequence[Probe],
        perturbation: Perturbation,
        apart: bool = False,
    ) -> list[str]:
        """Compare stacked with one-at-a-time evaluation once; stacking is switched off if it is
        wrong for this model. Returns the names of blocks that no forward used.

        `apart`: an example's loss must not depend on the others of its batch either.

        Raises:
            StackingError: if directions per example, or examples apart, are wrong for this model
                however it is run.
        """
        lanes = apart or any(p.per_example for p in probes)
        probes, batch = probes[:2], batch.select(0, min(batch.size, CHECKED))
        wanted, micro_batch, narrow = self.stack, self.micro_batch, self.narrow
        self.stack, self.micro_batch, self.narrow = 1, 1 if lanes else micro_batch, False
        probes, truth = self._apart(batch, probes, perturbation)
        self.stack, self.micro_batch, self.narrow = wanted, micro_batch, narrow
        if narrow and not self._agrees(truth, batch, probes, perturbation):
            self.narrow = False
        if wanted != 1 and not self.narrow and not self._agrees(truth, batch, probes, perturbation):
            self.stack = 1
        if lanes and self.stack == 1 and not self._agrees(truth, batch, probes, perturbation):
            raise StackingError(
                "this model gives an example another loss in a batch than alone: it mixes the rows "
                "of a batch, so it can have no direction per example and no private training; use "
                "directions='batch', or another model"
            )
        self.forwards = 0
        seen = {
            id(b) for site in self.sites if site.path in self.visited for b in site.blocks.values()
        }
        return [b.name for b in self.space.probed if id(b) not in seen]

    def _apart(
        self, batch: Batch, probes: Sequence[Probe], perturbation: Perturbation
    ) -> tuple[Sequence[Probe], Tensor]:
        """These probes, moved out until their losses differ by far more than rounding does.

        Near the base point every probe has nearly the same loss, and so would a model that mixes
        the rows of different probes.
        """
        found = None
        for factor in (1.0, 8.0, 64.0, 512.0):
            far = [replace(p, step=factor * p.step) for p in probes]
            truth = self.losses(far, batch, perturbation).per_example
            if found is not None and not truth.isfinite().all():
                break
            found = far, truth
            if _spread(truth) > 0.2:
                break
        assert found is not None
        return found

    def _agrees(
        self, truth: Tensor, batch: Batch, probes: Sequence[Probe], perturbation: Perturbation
    ) -> bool:
        try:
            stacked = self.losses(probes, batch, perturbation).per_example
        except Exception:  # the truth has just been measured: whatever it is, it is the stack
            return False
        known = truth.isfinite() & stacked.isfinite()  # a loss that is NaN says nothing of rows
        if not known.any():
            return True
        error = float((stacked - truth)[known].square().mean().sqrt())
        return error <= _rounding(self.model) * _spread(truth) + 1e-6


def _spread(losses: Tensor) -> float:
    """How far the losses of (probes, examples) lie from the mean over probes, rms."""
    away = losses - losses.mean(0)
    return float(away[away.isfinite()].square().mean().sqrt()) if away.isfinite().any() else 0.0


def _rounding(model: nn.Module) -> float:
    """How far two ways to compute the same differences of losses may lie apart, as a share."""
    exact = all(p.dtype in (torch.float32, torch.float64) for p in model.parameters())
    return 2e-3 if exact and not any(isinstance(m, QuantLayer) for m in model.modules()) else 0.1


class PointObjective(Protocol):
    """A loss at a point: block values by name, and the batch."""

    def __call__(self, values: dict[str, Tensor], batch: Any) -> float: ...


class FunctionEvaluator(Evaluator):
    """Any Python function f(values, batch) -> loss, called once per probe.

    >>> import torch
    >>> from zotune.core.space import tensors
    >>> from zotune.core.perturbation import Gaussian
    >>> from zotune.core.noise import Key
    >>> space = tensors({"x": torch.ones(3)})
    >>> f = FunctionEvaluator(space, lambda values, batch: float(values["x"].sum()))
    >>> f.losses([Probe(Key(0), 0.0)], None, Gaussian()).mean.tolist()
    [3.0]
    """

    def __init__(self, space: Space, function: PointObjective) -> None:
        self.space = space
        self.function = function

    def losses(self, probes: Sequence[Probe], batch: Any, perturbation: Perturbation) -> Losses:
        if any(p.per_example for p in probes):
            raise BadInput("a plain function has no examples; use directions='batch'")
        values = []
        for probe in probes:
            view = View([probe], 1, perturbation)
            point = {
                b.name: b.value() if b.still else view.value(b, view.parts[0]) for b in self.space
            }
            values.append(float(self.function(point, batch)))
        self.forwards += len(probes)
        return Losses.of(values)
