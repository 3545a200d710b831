"""What a task is (examples, encoding, losses, metric) and the list of the known ones."""

from __future__ import annotations

import difflib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from zotune.errors import BadInput
from zotune.tasks.batch import Batch

if TYPE_CHECKING:
    from zotune.models import Loaded


class Draw(Protocol):
    """Numbers for a step: `count` of a name, float32, uniform in [0, 1) or normal, the same
    whenever they are drawn."""

    def __call__(self, name: str, count: int, normal: bool = False) -> Tensor: ...


Example = dict[str, Any]
"""One row of data, fields already checked; classification rows hold `label` as an int."""


class Task(ABC):
    """Examples, how they become tensors, and what they cost.

    `losses` returns (loss, weight), both float32 of shape (batch.size,); the batch loss is
    sum(w * l) / sum(w). Tasks with `per_example = False` score a batch as a whole and return one
    entry per stacked copy, shape (batch.copies,). Where `stackable` is False the batch must be
    run one probe at a time (copies = 1).
    """

    name: str
    metric: str
    higher_is_better: bool = True
    kinds: tuple[str, ...] = ("causal", "encoder", "classifier")
    per_example: bool = True
    stackable: bool = True

    @property
    @abstractmethod
    def splits(self) -> tuple[str, ...]:
        """The splits that exist, a subset of ("train", "dev", "test")."""

    @property
    @abstractmethod
    def truncated(self) -> int:
        """How many examples were cut to max_length so far."""

    @abstractmethod
    def prepare(self, loaded: Loaded) -> nn.Module:
        """Bind the tokenizer and return the module to run (the model, or a head on top of it)."""

    @abstractmethod
    def split(self, name: str) -> Sequence[Example]:
        """The examples of one split. Raises DataError naming the splits there are."""

    @abstractmethod
    def encode(self, example: Example) -> Any:
        """Tokenize one example."""

    @abstractmethod
    def collate(self, features: Sequence[Any]) -> Batch:
        """Pad encoded examples into one batch."""

    def extent(self, features: Any) -> tuple[int, int]:
        """(rows, tokens of the longest) of one encoded example; no tokens where rows of all
        examples are as long."""
        return 1, 0

    def varied(self, batch: Batch, draw: Draw) -> Batch:
        """A training batch as one step sees it: with noise or augmented, where a task does so."""
        return batch

    @abstractmethod
    def losses(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """(loss, weight) per example, float32; differentiable unless the objective is not."""

    @abstractmethod
    def evaluate(
        self, model: nn.Module, examples: Sequence[Example], batch_size: int
    ) -> dict[str, float]:
        """Numbers over `examples`; always has "loss" and `self.metric`."""

    def batch(self, examples: Sequence[Example]) -> Batch:
        """Encode and collate in one go."""
        return self.collate([self.encode(example) for example in examples])

    def picture(self) -> Any:
        """What the model made in the last evaluation, as a PIL image; None if nothing to see."""
        return None


def batch_loss(loss: Tensor, weight: Tensor) -> Tensor:
    """sum(w * l) / sum(w), a float32 scalar.

    >>> batch_loss(torch.tensor([1.0, 4.0]), torch.tensor([2.0, 1.0])).item()
    2.0
    """
    return (loss * weight).sum() / weight.sum()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No gradients and no dropout; the modules' train flags come back afterwards.

    Not torch.inference_mode: tensors that a module keeps from it could not be trained with later.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def chunks(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Indices in groups of `size`, longest first, so that like lengths share a batch.

    Raises:
        BadInput: size < 1, or nothing to evaluate.

    >>> list(chunks([3, 9, 4], 2))
    [[1, 2], [0]]
    """
    if size < 1:
        raise BadInput(f"batch_size={size} is not a number of examples; use 1 or more")
    if not lengths:
        raise BadInput("there are no examples to evaluate; give at least one")
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for start in range(0, len(order), size):
        yield order[start : start + size]


def device_of(model: nn.Module) -> torch.device:
    """The device of the first parameter or buffer; cpu for a module without any."""
    tensor = next(chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if tensor is None else tensor.device


@dataclass(frozen=True)
class Entry:
    """One line of the task list."""

    name: str
    factory: Callable[..., Task]
    summary: str

    @property
    def options(self) -> tuple[str, ...]:
        """The keyword options the factory takes."""
        return tuple(inspect.signature(self.factory).parameters)


_ENTRIES: dict[str, Entry] = {}


def register(name: str, factory: Callable[..., Task], summary: str) -> None:
    """Add a task to the list. Raises BadInput when the name is taken."""
    if name in _ENTRIES:
        raise BadInput(f"there is already a task called {name!r}; choose a unique name")
    _ENTRIES[name] = Entry(name, factory, summary)


def names() -> tuple[str, ...]:
    """All task names, sorted."""
    return tuple(sorted(_ENTRIES))


def entry(name: str) -> Entry:
    """The registered line of a task. Raises BadInput that offers the nearest name."""
    if name not in _ENTRIES:
        near = _nearest(name, names())
        raise BadInput(f"unknown task {name!r}{near}; known: {', '.join(names())}")
    return _ENTRIES[name]


def get(name: str, **options: Any) -> Task:
    """Build a task by name.

    Raises:
        BadInput: unknown name or option (the nearest is offered), or a bad option value.
        DataError: the data is missing or malformed.
    """
    found = entry(name)
    for option in options:
        if option not in found.options:
            raise BadInput(
                f"task {name!r} has no option {option!r}{_nearest(option, found.options)}; "
                f"it takes {', '.join(found.options)}"
            )
    return found.factory(**options)


def _nearest(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else ""
