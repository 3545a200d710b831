"""Freezing while a run goes on: when, what stops moving, and from where the rest goes on.

    decide ─► journal (durable first) ─► blocks below stop ─► features of the whole data set to the
    disk ─► the lower part leaves memory ─► steps start from the features

Everything that the weights depend on is in the journal (steps and depths) and its header (which
blocks lie below which depth), so that a run resumes bit for bit and replays without its data.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor, nn

from zotune.core.backprop import AnyTuner
from zotune.core.block import Block
from zotune.models.cut import Trunk
from zotune.tasks.batch import Batch
from zotune.tasks.task import Task
from zotune.training.batches import Batches, spread
from zotune.training.config import TrainConfig
from zotune.training.freezing.cached import Border, CachedBatches, by_tokens, pack, rms
from zotune.training.freezing.channels import Channels
from zotune.training.freezing.identity import identity_of
from zotune.training.freezing.parked import FILE, Parked, parkable
from zotune.training.freezing.plan import Plan, block_levels, check_blocks, frozen_names
from zotune.training.freezing.schedule import Fixed
from zotune.training.freezing.store import Store, check_room
from zotune.training.freezing.watch import Watch

log = logging.getLogger("zotune")
_CHECKED = 2  # examples that a border is tried on
_PROBED = 16  # examples whose features are compared


class Freezing:
    """The frozen part of one run. `depth` is how many layers are frozen now, 0 for none."""

    def __init__(
        self,
        plan: Plan,
        config: TrainConfig,
        task: Task,
        model: nn.Module,
        tuner: AnyTuner,
        batches: Batches,
    ) -> None:
        self.plan, self.config, self.task, self.model = plan, config, task, model
        self.tuner, self.batches, self.depth = tuner, batches, 0
        few = batches.of(list(spread(range(len(batches.examples)), _CHECKED)))
        self.trunk = Trunk.of(model, lambda: task.losses(model, few.to(config.device)))
        depths = plan.depths(self.trunk.depth)
        self.deepest = max(depths)
        self.levels, straddling = block_levels(self.trunk, tuner.space, self.deepest)
        check_blocks(plan, tuner.space, self.levels, straddling, self.trunk.depth)
        if plan.cache is not None:
            for depth in depths:
                self._border(depth).check(few)
        self.parked: Parked | None = None
        self.cached: CachedBatches | None = None
        self.settled = -1  # the step whose decision is made
        self.watch: Watch | None = None
        if not isinstance(plan.schedule, Fixed):
            shown = list(spread(range(len(batches.examples)), _PROBED))
            self.watch = Watch(plan.schedule, self._border, self._blocks, batches.of(shown))

    def due(self, step: int) -> int | None:
        """The depth to come to before this step, None where nothing changes."""
        if self.settled == step:
            return None
        wanted = self.depth
        if isinstance(self.plan.schedule, Fixed):
            wanted = self.plan.schedule.depth(step, self.trunk.depth)
        elif self.watch is not None and self.watch.due(step):
            with self.whole():
                calm = self.watch.look_(self.depth, self.deepest)
            wanted = calm if self._worth_it(step) else self.depth
        return wanted if wanted > self.depth else None

    def freeze_(self, depth: int) -> None:
        """From now on the blocks of so many layers, and below them, stay as they are."""
        self.depth = depth
        self.tuner.freeze_(frozen_names(self.levels, depth))
        evaluator = self.tuner.evaluator
        evaluator.watch_(self.tuner.active)  # type: ignore[union-attr]

    def replayed_(self, step: int, freezes: Mapping[int, int]) -> None:
        """What was decided before a step that is applied again from the journal."""
        if self.watch is not None and self.watch.due(step):
            self.watch.look_(self.depth, self.deepest)
        if step in freezes:
            self.freeze_(freezes[step])
        self.settled = step

    def cache_(self) -> CachedBatches | None:
        """Features of the present depth on the disk, and the lower part out of memory; None where
        there is nothing to cache. Goes on where an interrupted one stopped.

        Raises:
            CacheFull, ZotuneError: no space; what is there stays, and --resume goes on.
            BadInput: the folder holds other features.
        """
        if self.plan.cache is None or not self.depth:
            return None
        if self.cached is None or self.cached.border.depth != self.depth:
            with self.whole():
                self.cached = self._filled(self.plan.cache)
            self._park(self.cached.store.folder)
            self.tuner.evaluator.objective = self.cached.border.losses  # type: ignore[union-attr]
        return self.cached

    def _filled(self, root: Path) -> CachedBatches:
        border = self._border(self.depth)
        first = self.batches.of(list(spread(range(len(self.batches.examples)), _PROBED)))
        state = border.state(first)
        codec = self.plan.codec.fitted(rms(pack(state, first)), self._stage)
        tokens = by_tokens(state, first)
        channels = self._channels(border, first)
        folder = root / f"depth-{self.depth:02d}"
        identity = identity_of(
            border, self.batches, codec, state.dtype, tokens, channels, self.config
        )
        store = Store(
            folder, identity, len(self.batches.examples), codec, state.dtype, self.plan.limit
        )
        store.claim()
        if self.cached is not None:  # the last freeze point's features have had their day
            shutil.rmtree(self.cached.store.folder, ignore_errors=True)
        cached = CachedBatches(self.batches, store, border, tokens, channels, self.whole)
        made = cached.fill(
            lambda done, of: log.debug("cached chunk %d of %d behind %d layers", done, of,
                                       self.depth)
        )  # fmt: skip
        log.info(
            "%d of %d layers are frozen; their features take %s bytes in %s (%d chunks made now)",
            self.depth, self.trunk.depth, f"{store.size:,}", folder, made,
        )  # fmt: skip
        return cached

    def _channels(self, border: Border, few: Batch) -> Channels | None:
        """Which channels no transform of cached maps can stand for; None without augmentation."""
        augmentation, least = self.batches.augmentation, self.config.cache_similarity
        if augmentation is None:
            return None
        channels = Channels.measured(augmentation, few, border.state, least)
        for transform, copied in zip(augmentation.transforms, channels.copied, strict=True):
            log.info("%s: %d of %d channels are cached transformed", transform, len(copied),
                     channels.count)  # fmt: skip
        return channels

    def _park(self, folder: Path) -> None:
        lower = [unit.module for unit in self.trunk.below(self.depth)]
        tensors = parkable(lower, self.model)
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        check_room(folder.parent, size, self.plan.limit)
        self.parked = Parked(tensors, folder / FILE)
        for block in self.tuner.space:
            block.follow_()

    def close(self) -> None:
        """The features stay for another run; the parked part is this run's."""
        if self.cached is not None:
            (self.cached.store.folder / FILE).unlink(missing_ok=True)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """The whole model where it runs, as evaluations and the final writing want it."""
        if self.parked is None:
            yield
            return
        with self.parked.present():
            yield

    def state_tensors(self) -> dict[str, Tensor]:
        """What a resumed run must know to decide as this one would."""
        held = {} if self.watch is None else self.watch.before
        return {f"freezing/{name}": value for name, value in held.items()}

    def load_(self, tensors: Mapping[str, Tensor]) -> None:
        """Go back to what `state_tensors` gave."""
        if self.watch is not None:
            start = "freezing/"
            held = {k[len(start) :]: v for k, v in tensors.items() if k.startswith(start)}
            self.watch.before = held

    @property
    def _stage(self) -> int:
        """The number of this freeze point, from 0."""
        depths = self.plan.depths(self.trunk.depth)
        return depths.index(self.depth) if isinstance(self.plan.schedule, Fixed) else 0

    def _border(self, depth: int) -> Border:
        return Border(self.trunk, depth, self.task, self.model, self.config.device)

    def _blocks(self, layer: int) -> list[Block]:
        return [b for b in self.tuner.space if self.levels.get(b.name) == layer]

    def _worth_it(self, step: int) -> bool:
        """Whether examples will come again, so that features can be read twice; the same rule
        without a cache, so that the run is the same."""
        left = (self.config.max_steps - step) * self.config.examples
        return left > len(self.batches.examples)
