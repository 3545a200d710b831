"""Batches that bring the features of their examples along, and a loss that starts from them."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zotune.core.evaluator import Objective
from zotune.errors import BadInput
from zotune.models.cut import Trunk
from zotune.tasks.batch import Batch
from zotune.tasks.task import Task
from zotune.training.batches import AbstractBatches, Batches
from zotune.training.freezing.channels import Channels
from zotune.training.freezing.store import Missing, Store

log = logging.getLogger("zotune")
STATE = "frozen_state"
MASK = "attention_mask"


@dataclass(frozen=True)
class Border:
    """The cut of one model behind `depth` layers, as one task crosses it."""

    trunk: Trunk
    depth: int
    task: Task
    model: nn.Module
    device: str = "cpu"

    def state(self, batch: Batch) -> Tensor:
        """What crosses: one float tensor, its rows the batch's; the model above does not run."""
        here = batch.to(self.device)
        state = self.trunk.state(self.depth, lambda: self.task.losses(self.model, here))
        if state.shape[0] % batch.size:
            raise BadInput(
                f"the state behind layer {self.depth} has {state.shape[0]} rows for {batch.size} "
                "examples; features of single examples cannot be told: drop cache_dir"
            )
        return state

    def losses(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """The task's losses of a batch that brings its state along."""
        here = batch.to(self.device)
        rest = {name: t for name, t in here.tensors.items() if name != STATE}
        with self.trunk.handing(self.depth, here[STATE]):
            return self.task.losses(model, Batch(rest, here.size, here.copies))

    @property
    def objective(self) -> Objective:
        return self.losses

    def check(self, batch: Batch) -> None:
        """Refuse a model of which more crosses than the state: skip connections, side inputs.

        Raises:
            BadInput: the losses from the state are not those of the whole model.
        """
        with torch.no_grad():
            wanted, _ = self.task.losses(self.model, batch.to(self.device))
            held = {**batch.tensors, STATE: self.state(batch)}
            try:
                found, _ = self.losses(self.model, Batch(held, batch.size))
                same = torch.allclose(found, wanted, rtol=1e-4, atol=1e-6, equal_nan=True)
            except Exception as error:  # whatever stumbles over the state in the place of its own
                log.debug("the model does not go on from a state", exc_info=error)
                same = False
        if not same:
            path = self.trunk.below(self.depth)[-1].path
            raise BadInput(
                f"more than the output of {path!r} crosses this freeze point (a skip connection, "
                "or a shape that the model fixes below): choose another share, or drop cache_dir"
            )


def pack(state: Tensor, batch: Batch) -> list[Tensor]:
    """The state of each example by itself: (tokens, ...) without padding where the batch has an
    attention mask that fits, else (k, ...) rows."""
    k = state.shape[0] // batch.size
    parts = list(torch.split(state.detach().cpu(), k))
    if not by_tokens(state, batch):
        return parts
    masks = torch.split(batch[MASK].bool().cpu(), k)
    return [part[mask] for part, mask in zip(parts, masks, strict=True)]


def unpack(features: Sequence[Tensor], batch: Batch, tokens: bool) -> Tensor:
    """The state of a batch from its examples'; padding is zero, which no masked model sees."""
    joined = torch.cat(list(features))
    if not tokens:
        return joined
    mask = batch[MASK].bool()
    if int(mask.sum()) != len(joined):
        raise BadInput(
            f"the cache holds {len(joined)} tokens of a batch that has {int(mask.sum())}: it was "
            "made with other texts; give another cache_dir"
        )
    state = joined.new_zeros(*mask.shape, *joined.shape[1:])
    state[mask] = joined
    return state


def by_tokens(state: Tensor, batch: Batch) -> bool:
    """Whether the state has one vector per token of the batch's mask."""
    return MASK in batch and state.dim() > 2 and state.shape[:2] == batch[MASK].shape


class CachedBatches(AbstractBatches):
    """The same examples in the same order, with their features from a store.

    A chunk that is missing or damaged is computed (again) by `border`, with the `whole` model in
    its place; its batches are always cut in the same way, so that it comes out the same.
    """

    def __init__(
        self,
        batches: Batches,
        store: Store,
        border: Border,
        tokens: bool,
        channels: Channels | None,
        whole: Callable[[], AbstractContextManager[None]],
    ) -> None:
        super().__init__(batches.task, batches.examples, batches.size)
        self.inner, self.store, self.border = batches, store, border
        self.tokens, self.channels, self.whole = tokens, channels, whole

    def __getitem__(self, step: int) -> Batch:
        chosen = self.inner.chosen(step)
        batch = self.inner.of(chosen)
        features = [self._features_of(i) for i in chosen]
        if self.channels is not None:
            transforms = self.inner.transforms(step)
            pairs = zip(features, transforms, strict=True)
            features = [self.channels.made(record, t).unsqueeze(0) for record, t in pairs]
        state = unpack(features, batch, self.tokens)
        return Batch({**batch.tensors, STATE: state}, batch.size)

    def _features_of(self, index: int) -> Tensor:
        try:
            return self.store.get(index)
        except Missing as missing:
            log.warning("%s in %s; computing it again", missing, self.store.folder)
            self._compute(missing.number)
            return self.store.get(index)

    def fill(self, tell: Callable[[int, int], None]) -> int:
        """Compute the chunks that are not there; how many. `tell(done, of)` after each."""
        wanted = [n for n in range(self.store.chunks) if not self.store.holds(n)]
        for done, number in enumerate(wanted, start=1):
            self._compute(number)
            tell(done, len(wanted))
        return len(wanted)

    def _compute(self, number: int) -> None:
        members, features = self.store.members(number), list[Tensor]()
        for start in range(0, len(members), self.size):
            part = members[start : start + self.size]  # filled up: as many rows as a step has, so
            batch = self.inner.of((part * self.size)[: self.size])  # that products round alike
            with self.whole():
                if self.channels is None:
                    features += pack(self.border.state(batch), batch)
                else:
                    features += self.channels.records(batch, self.border.state)
        self.store.put(number, features[: len(members)])


def digest_of_inputs(batches: Batches) -> str:
    """What tokenizer, template and length of the task make of every example."""
    total = hashlib.sha256()
    for index in range(len(batches.examples)):
        for name, tensor in sorted(batches.of([index]).tensors.items()):
            total.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
            total.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def rms(features: Sequence[Tensor]) -> float:
    """Root mean square over all numbers of some features."""
    values: Any = torch.cat([f.flatten() for f in features]).double()
    return float(values.square().mean().sqrt())
