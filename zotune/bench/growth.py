"""How the cost of a step grows with examples, tokens and layers, and how near a line that is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import nn

from zotune.bench.contenders import Contender
from zotune.bench.timing import Work, interleave
from zotune.bench.workload import Prepared
from zotune.errors import BadInput
from zotune.tasks.batch import Batch

SHARES = (0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Line:
    """y = start + slope x by least squares; residual: rms of what is left, over the mean of y.

    >>> line = Line.through([1, 2, 3], [3.0, 5.0, 7.0])
    >>> round(line.start, 6), round(line.slope, 6), round(line.residual, 6)
    (1.0, 2.0, 0.0)
    """

    start: float
    slope: float
    residual: float

    @classmethod
    def through(cls, x: Sequence[float], y: Sequence[float]) -> Line:
        xs, ys = (torch.tensor(v, dtype=torch.float64) for v in (x, y))
        matrix = torch.stack([torch.ones_like(xs), xs], 1)
        start, slope = torch.linalg.lstsq(matrix, ys.unsqueeze(1)).solution.flatten().tolist()
        left = (ys - start - slope * xs).square().mean().sqrt() / ys.mean()
        return cls(start, slope, float(left))


def curves(
    contender: Contender, prepared: Prepared, *, rounds: int, calls: int, warmup: int
) -> dict[str, dict[str, Any]]:
    """Seconds of a step at a few sizes along each axis; all sizes are timed in turn.

    "batch" counts examples, "length" tokens of an example, "layers" the model's lower layers.
    """
    points = {
        "batch": _shares(prepared.batch.size),
        "length": _shares(prepared.batch["input_ids"].shape[1]),
        "layers": _shares(len(layers_of(prepared.model)[1])),
    }
    works: dict[str, Work] = {}
    for size in points["batch"]:
        smaller = replace(prepared, batch=prepared.batch.select(0, size))
        works[f"batch {size}"] = contender.start(smaller)
    for size in points["length"]:
        shorter = replace(prepared, batch=cut(prepared.batch, size))
        works[f"length {size}"] = contender.start(shorter)
    for size in points["layers"]:
        works[f"layers {size}"] = shallow(contender, prepared, size)
    found = interleave(works, rounds=rounds, calls=calls, warmup=warmup)
    made: dict[str, dict[str, Any]] = {}
    for axis, sizes in points.items():
        seconds = [median(found.seconds[f"{axis} {size}"]) for size in sizes]
        made[axis] = {"sizes": sizes, "seconds": seconds, **vars(Line.through(sizes, seconds))}
    return made


def _shares(whole: int) -> list[int]:
    """Up to four sizes from a quarter on.

    >>> _shares(16), _shares(2)
    ([4, 8, 12, 16], [1, 2])
    """
    return sorted({max(1, round(whole * share)) for share in SHARES})


def cut(batch: Batch, length: int) -> Batch:
    """Only the first tokens of every row; rows of targets, one shorter, stay one shorter."""
    lost = batch["input_ids"].shape[1] - length
    tensors = {
        name: t[:, : max(1, t.shape[1] - lost)] if t.dim() == 2 else t
        for name, t in batch.tensors.items()
    }
    return Batch(tensors, batch.size, batch.copies)


def shallow(contender: Contender, prepared: Prepared, layers: int) -> Work:
    """A step of the model's lower layers alone; the others come back after each."""
    with keeping(prepared.model, layers):
        work = contender.start(prepared)

    def step() -> object:
        with keeping(prepared.model, layers):
            return work()

    return step


@contextmanager
def keeping(model: nn.Module, layers: int) -> Iterator[None]:
    """The model with only so many of its lower layers."""
    owner, whole, name = _row(model)
    config = getattr(owner, "config", None)
    setattr(owner, name, whole[:layers])
    if config is not None:
        config.num_hidden_layers = layers
    try:
        yield
    finally:
        setattr(owner, name, whole)
        if config is not None:
            config.num_hidden_layers = len(whole)


def layers_of(model: nn.Module) -> tuple[nn.Module, nn.ModuleList]:
    """The module that holds the row of layers, and the row.

    Raises:
        BadInput: the model has none.
    """
    owner, row, _ = _row(model)
    return owner, row


def _row(model: nn.Module) -> tuple[nn.Module, nn.ModuleList, str]:
    found = [
        (owner, child, name)
        for owner in model.modules()
        for name, child in owner.named_children()
        if isinstance(child, nn.ModuleList)
    ]
    if not found:
        raise BadInput(f"{type(model).__name__} has no row of layers (no nn.ModuleList) to shorten")
    return max(found, key=lambda entry: len(entry[1]))
