"""Any Python function as the objective, differentiable or not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zotune.errors import BadInput
from zotune.tasks.batch import Batch
from zotune.tasks.labels import pick_split
from zotune.tasks.task import Example, Task, chunks, device_of, evaluating

if TYPE_CHECKING:
    from zotune.models import Loaded

Score = Callable[[nn.Module, list[Any]], Any]


class FunctionTask(Task):
    """Raise score(model, examples): loss = -score.

    The function gets the module and the list of a batch's examples as they were given, and may do
    anything with them: generate, call a judge, count. It runs once per probe, so batches of this
    task are never stacked.

    Args:
        score: returns one float for the batch (higher is better) or, with per_example, one for
            each example.
        train: examples, any objects; `dev` and `test` likewise.
        per_example: whether `score` returns a number per example.
        bind: called with the loaded model and tokenizer, returns the module to run; by default the
            model itself.
        batch_size: examples per call where nobody says otherwise.

    Raises:
        BadInput: no examples at all, or `score` cannot be called.

    >>> task = FunctionTask(lambda model, xs: -abs(model(torch.ones(1)).item() - xs[0]), [3.0])
    >>> model = nn.Identity()
    >>> task.losses(model, task.batch(task.split("train")))[0].tolist()
    [2.0]
    """

    metric = "score"
    stackable = False

    def __init__(
        self,
        score: Score,
        train: Sequence[Any] = (),
        dev: Sequence[Any] = (),
        test: Sequence[Any] = (),
        *,
        name: str = "function",
        per_example: bool = False,
        bind: Callable[[Loaded], nn.Module] | None = None,
        batch_size: int = 16,
    ) -> None:
        if not callable(score):
            raise BadInput(f"score must be a function of (model, examples), got {score!r}")
        if batch_size < 1:
            raise BadInput(f"batch_size={batch_size} is not a number of examples; use 1 or more")
        given = {"train": train, "dev": dev, "test": test}
        self._values: list[Any] = [value for values in given.values() for value in values]
        if not self._values:
            raise BadInput("a task needs examples; give train, dev or test")
        self.name, self.per_example, self.batch_size = name, per_example, batch_size
        self._score, self._bind = score, bind
        self._tables: dict[str, list[Example]] = {}
        start = 0
        for split, values in given.items():
            if len(values):
                rows = range(start, start + len(values))
                self._tables[split] = [{"row": i, "value": self._values[i]} for i in rows]
                start += len(values)

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self._tables)

    @property
    def truncated(self) -> int:
        return 0

    def split(self, name: str) -> Sequence[Example]:
        """Examples {"row", "value"}; "value" is what was given."""
        return pick_split(self._tables, name)

    def prepare(self, loaded: Loaded) -> nn.Module:
        return loaded.model if self._bind is None else self._bind(loaded)

    def encode(self, example: Example) -> int:
        row = example.get("row") if isinstance(example, dict) else None
        if not isinstance(row, int) or not 0 <= row < len(self._values):
            raise BadInput(f"{example!r} is not an example of this task; take it from split()")
        return row

    def collate(self, features: Sequence[int]) -> Batch:
        return Batch({"row": torch.tensor(list(features))}, len(features))

    def losses(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        if batch.copies > 1:
            raise BadInput(
                f"task {self.name!r} calls a function once per probe and cannot run "
                f"{batch.copies} stacked copies; evaluate one probe at a time"
            )
        values = [self._values[i] for i in batch["row"].tolist()]
        loss = -torch.as_tensor(self._score(model, values), dtype=torch.float32).reshape(-1)
        loss = loss.to(batch["row"].device)
        wanted = batch.size if self.per_example else 1
        if loss.shape[0] != wanted:
            raise BadInput(
                f"the score function of {self.name!r} returned {loss.shape[0]} numbers, wanted "
                f"{wanted}; per_example={self.per_example}"
            )
        return loss, torch.ones_like(loss)

    def evaluate(
        self, model: nn.Module, examples: Sequence[Example], batch_size: int
    ) -> dict[str, float]:
        """score: the mean over batches, weighted by their sizes; loss = -score."""
        rows = [self.encode(example) for example in examples]
        total = 0.0
        device = device_of(model)
        with evaluating(model):
            for part in chunks([0] * len(rows), batch_size):
                batch = self.collate([rows[i] for i in part]).to(device)
                total += float(self.losses(model, batch)[0].mean()) * len(part)
        return {"loss": total / len(rows), "score": -total / len(rows)}
