"""A task from a plain loss function: any module, any data, any scalar."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zotune.errors import BadInput, DataError
from zotune.models import Loaded
from zotune.tasks.batch import Batch
from zotune.tasks.task import Example, Task, chunks, evaluating

Losses = Callable[[nn.Module, Batch], Tensor | tuple[Tensor, Tensor]]
Metric = Callable[[nn.Module, Batch], Tensor]


class Objective(Task):
    """Minimise losses(model, batch): one float per example, or (loss, weight) pairs.

    Args:
        losses: called under no_grad; the batch may hold several stacked copies of the examples.
        train: mappings from names to tensors, equal shapes per name; stacked along a new dim 0.
        test: the same, for the numbers before and after; `train` when empty.
        score: optional, a number per example to report instead of the loss (higher is better).

    >>> rows = [{"x": torch.ones(2), "y": torch.zeros(1)} for _ in range(4)]
    >>> task = Objective(lambda m, b: (m(b["x"]) - b["y"]).square().mean(-1), rows)
    >>> task.losses(nn.Linear(2, 1), task.batch(rows))[0].shape
    torch.Size([4])
    """

    higher_is_better = False
    kinds = ("module", "causal", "encoder", "classifier")

    def __init__(
        self,
        losses: Losses,
        train: Sequence[Example],
        test: Sequence[Example] = (),
        *,
        score: Metric | None = None,
        metric: str = "score",
        name: str = "objective",
    ) -> None:
        if not len(train):
            raise DataError("the training rows are empty; give at least one")
        self.name, self._losses, self._score = name, losses, score
        self._splits = {"train": train, "test": test if len(test) else train}
        self.metric = metric if score is not None else "loss"
        self.higher_is_better = score is not None

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self._splits)

    @property
    def truncated(self) -> int:
        return 0

    def prepare(self, loaded: Loaded) -> nn.Module:
        return loaded.model

    def split(self, name: str) -> Sequence[Example]:
        return self._splits[name]

    def encode(self, example: Example) -> Example:
        return example

    def collate(self, features: Sequence[Any]) -> Batch:
        names = features[0].keys()
        stacked = {n: torch.stack([torch.as_tensor(f[n]) for f in features]) for n in names}
        return Batch(stacked, len(features))

    def losses(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        found = self._losses(model, batch)
        loss, weight = found if isinstance(found, tuple) else (found, torch.ones_like(found))
        if loss.shape != (batch.size,):
            raise BadInput(
                f"the objective gave a loss of shape {tuple(loss.shape)}; want one number per "
                f"example, ({batch.size},)"
            )
        return loss.float(), weight.float()

    def evaluate(
        self, model: nn.Module, examples: Sequence[Example], batch_size: int
    ) -> dict[str, float]:
        total = whole = score = 0.0
        with evaluating(model):
            for part in chunks([1] * len(examples), batch_size):
                batch = self.collate([examples[i] for i in part])
                loss, weight = self.losses(model, batch)
                total += float((loss.double() * weight).sum())
                whole += float(weight.double().sum())
                if self._score is not None:
                    score += float(self._score(model, batch).double().sum())
        found = {"loss": total / max(whole, 1e-30)}
        return found if self._score is None else {**found, self.metric: score / len(examples)}
