"""Spaces: what is tuned. Named blocks over a model; spaces add up.

`SpaceSpec` is the frozen record that a user writes and a journal header keeps
(`Scales() + Head(lr=1e-2)`); `build` turns it into a live `Space` over one model. One file per
kind of space lies in `spaces/`.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from zotune.core.block import Block, FloatBlock, Owner
from zotune.errors import BadInput


class Observe(Protocol):
    """Runs training batches through the model, without gradient, for hooks to see.

    `after(batch)` is called behind each; `examples` is how many examples at most (None: a few).
    """

    def __call__(
        self,
        model: nn.Module,
        after: Callable[[Any], None] | None = None,
        examples: int | None = None,
    ) -> None: ...


class Space:
    """Blocks with unique names."""

    def __init__(self, blocks: Iterable[Block]) -> None:
        self.blocks = tuple(blocks)
        names = [b.name for b in self.blocks]
        if not names:
            raise BadInput("the space has no blocks: nothing would be trained")
        double = (
            sorted({n for n in names if names.count(n) > 1}) if len(set(names)) < len(names) else []
        )
        if double:
            raise BadInput(f"blocks named twice: {', '.join(double[:5])}; each block is tuned once")

    def __add__(self, other: Space) -> Space:
        return Space((*self.blocks, *other.blocks))

    def __iter__(self) -> Iterator[Block]:
        return iter(self.blocks)

    @property
    def numel(self) -> int:
        return sum(b.numel for b in self.blocks)

    @property
    def probed(self) -> tuple[Block, ...]:
        """The blocks that probes move: all but those whose gradient is exact, or that stay."""
        return tuple(b for b in self.blocks if not b.exact and not b.still)

    def without(self, names: Iterable[str]) -> Space:
        gone = set(names)
        return Space(b for b in self.blocks if b.name not in gone)

    def bind_(self, eps: float, lr: float, units: str) -> None:
        for block in self.blocks:
            block.bind_(eps, lr, units)

    def check_decay(self, weight_decay: float) -> None:
        """A weight decay that would act on no block is an error."""
        if weight_decay and not any(b.decay for b in self.blocks):
            raise BadInput(
                f"weight_decay={weight_decay} acts on no block of this space: only matrices of "
                "layers and LoRA factors decay; use weight_decay=0"
            )

    def state(self) -> dict[str, Tensor]:
        return {b.name: b.state() for b in self.blocks}

    def load_(self, state: Mapping[str, Tensor], start: str = "") -> None:
        """Restore what `state` gave; names in it may have a common `start`."""
        missing = sorted(b.name for b in self.blocks if start + b.name not in state)
        if missing:
            raise BadInput(f"the state lacks blocks {', '.join(missing[:5])}")
        for block in self.blocks:
            block.load_(state[start + block.name])


def tensors(values: Mapping[str, Tensor], **options: Any) -> Space:
    """A space over plain tensors, for objectives that are not models.

    >>> import torch
    >>> tensors({"x": torch.zeros(3)}).numel
    3
    """
    return Space(FloatBlock.of(name, tensor, **options) for name, tensor in values.items())


@dataclass(frozen=True)
class SpaceSpec(ABC):
    """What to tune, as a record. `eps` and `lr` override the method's for these blocks."""

    eps: float | None = None
    lr: float | None = None

    @abstractmethod
    def build(self, model: nn.Module, observe: Observe | None = None) -> Space:
        """The blocks of this kind over `model`; zero blocks are an error."""

    def __add__(self, other: SpaceSpec) -> SpaceSum:
        mine = self.parts if isinstance(self, SpaceSum) else (self,)
        theirs = other.parts if isinstance(other, SpaceSum) else (other,)
        return SpaceSum(parts=(*mine, *theirs))

    @property
    def options(self) -> dict[str, Any]:
        return {"eps": self.eps, "lr": self.lr}


@dataclass(frozen=True)
class SpaceSum(SpaceSpec):
    """Several spaces at once."""

    parts: tuple[SpaceSpec, ...] = ()

    def build(self, model: nn.Module, observe: Observe | None = None) -> Space:
        total = self.parts[0].build(model, observe)
        for spec in self.parts[1:]:
            total = total + spec.build(model, observe)
        return total


def owners_of(model: nn.Module) -> dict[int, list[Owner]]:
    """Every (module, attribute) that holds each parameter or buffer, by id of the tensor."""
    found: dict[int, list[Owner]] = {}
    for path, module in model.named_modules():
        for attribute, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                found.setdefault(id(tensor), []).append(Owner(path, module, attribute))
    return found


def matching(names: Iterable[str], pattern: str | None) -> Callable[[str], bool]:
    """A filter by regular expression, searched in the name; no match at all is an error."""
    if pattern is None:
        return lambda name: True
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise BadInput(f"pattern {pattern!r} is not a regular expression: {error}") from error
    names = list(names)
    if not any(expression.search(n) for n in names):
        raise BadInput(
            f"pattern {pattern!r} matches no block; there are {len(names)}, such as "
            f"{', '.join(names[:5])}"
        )
    return lambda name: expression.search(name) is not None
