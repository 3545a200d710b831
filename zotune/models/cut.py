"""Cutting a model behind a layer: what lies below, what crosses the border, and going on from it.

The layers are the children of the outermost `nn.ModuleList`s and `nn.Sequential`s: a transformer's
blocks, a ResNet's. One forward shows in which order they are called, and what else holds numbers
and comes before them (embeddings, a stem). What crosses the border behind layer `depth` is that
layer's output, one tensor: the *state*. To go on from a known state, every module below answers
with it at once, and the model's own forward does the rest: masks, positions, rotary tables come
from where they always come from. No architecture has a class of its own here.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from zotune.errors import BadInput


class _Reached(Exception):
    """The forward has come to the border; nothing above is wanted."""


@dataclass(frozen=True)
class Unit:
    """A module of the trunk, called once per forward; `layer` is its number from 1, 0 for what is
    no layer (embeddings, norms, heads)."""

    path: str
    module: nn.Module
    layer: int


@dataclass(frozen=True)
class Trunk:
    """A model as a row of units in the order of their calls.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    >>> trunk = Trunk.of(model, lambda: model(torch.ones(4, 2)))
    >>> trunk.depth, [unit.path for unit in trunk.below(2)]
    (3, ['0', '1'])
    >>> state = trunk.state(2, lambda: model(torch.ones(4, 2)))
    >>> with trunk.handing(2, state): out = model(torch.zeros(4, 2))
    >>> bool((out == model(torch.ones(4, 2))).all())
    True
    """

    units: tuple[Unit, ...]

    @classmethod
    def of(cls, model: nn.Module, run: Callable[[], Any]) -> Trunk:
        """Watch one forward, which `run` makes.

        Raises:
            BadInput: the model has no row of layers, or calls one of them other than once.
        """
        layers = layers_of(model)
        if not layers:
            raise BadInput(
                f"{type(model).__name__} holds no row of layers (no nn.ModuleList or nn.Sequential "
                "of them); it cannot be frozen from below: drop freeze"
            )
        calls = _calls(model, run)
        inside = {id(m) for _, layer in layers for m in layer.modules()}
        above = {id(m) for m in model.modules() if any(id(c) in inside for c in m.modules())}
        numbers = {id(layer): 0 for _, layer in layers}
        paths = {id(module): path for path, module in model.named_modules()}
        units, taken = list[Unit](), set[int]()
        for module in calls:
            if id(module) in numbers:
                numbers[id(module)] += 1
                place = sum(u.layer > 0 for u in units) + 1
            elif id(module) in above | taken or not _holds_tensors(module):
                continue
            else:
                place = 0
            if numbers.get(id(module), 1) == 1:
                units.append(Unit(paths[id(module)], module, place))
            taken |= {id(m) for m in module.modules()}
        repeated = [path for path, layer in layers if numbers[id(layer)] > 1]
        if repeated:
            raise BadInput(
                f"layer {repeated[0]!r} runs {numbers[id(dict(layers)[repeated[0]])]} times per "
                "loss; only layers that run once can be frozen: drop freeze"
            )
        return cls(tuple(units))

    @property
    def depth(self) -> int:
        """How many layers there are."""
        return sum(unit.layer > 0 for unit in self.units)

    def below(self, depth: int) -> tuple[Unit, ...]:
        """Layers 1 to `depth`, and what is called before the last of them ends."""
        if not 0 < depth <= self.depth:
            raise BadInput(f"depth={depth}; this model has {self.depth} layers to freeze")
        border = next(i for i, unit in enumerate(self.units) if unit.layer == depth)
        return self.units[: border + 1]

    def levels(self) -> dict[int, int]:
        """By id of a module inside a unit: the least depth that it lies below; the units above the
        last layer are left out."""
        found, level = {}, self.depth
        for unit in reversed(self.units[: self.units.index(self.below(self.depth)[-1]) + 1]):
            level = unit.layer or level
            found.update({id(m): level for m in unit.module.modules()})
        return found

    def state(self, depth: int, run: Callable[[], Any]) -> Tensor:
        """What crosses the border behind layer `depth` in a forward by `run`, which ends there.

        Raises:
            BadInput: the layer's output is not one tensor.
        """
        border, found = self.below(depth)[-1], list[Tensor]()

        def reached(module: nn.Module, inputs: Any, output: Any) -> None:
            found.append(_state_of(output, border.path))
            raise _Reached

        handle = border.module.register_forward_hook(reached)
        try:
            with torch.no_grad():
                run()
        except _Reached:
            return found[0]
        finally:
            handle.remove()
        raise BadInput(f"the forward does not come to layer {border.path!r}; freeze less deep")

    @contextmanager
    def handing(self, depth: int, state: Tensor) -> Iterator[None]:
        """While this is open, the modules below answer with `state` instead of computing: with its
        first rows where they are asked for fewer, by whoever runs one of several equal copies."""
        modules = [unit.module for unit in self.below(depth)]
        own = [(vars(module).get("forward"), module._forward_hooks) for module in modules]

        def forward(*args: Any, **kwargs: Any) -> Tensor:
            asked = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), state)
            return state[: len(asked)] if asked.dim() and len(asked) < len(state) else state

        try:
            for module in modules:
                module.forward = forward  # type: ignore[method-assign]
                module._forward_hooks = OrderedDict()  # adapters are in the state already
            yield
        finally:
            for module, (held, hooks) in zip(modules, own, strict=True):
                module._forward_hooks = hooks
                if held is None:
                    vars(module).pop("forward", None)
                else:
                    module.forward = held  # type: ignore[method-assign]


def layers_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Paths and modules of the layers, as they are registered.

    >>> inner = nn.Sequential(nn.Sequential(nn.Linear(1, 1), nn.ReLU()), nn.Linear(1, 1))
    >>> [path for path, _ in layers_of(inner)]
    ['0', '1']
    """
    found, taken = list[tuple[str, nn.Module]](), set[int]()
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList | nn.Sequential) and id(module) not in taken:
            for name, child in module.named_children():
                found.append((f"{path}.{name}" if path else name, child))
                taken |= {id(m) for m in child.modules()}
    return found


def _calls(model: nn.Module, run: Callable[[], Any]) -> list[nn.Module]:
    """The modules of a forward as they were called, callers before those they call."""
    calls = list[nn.Module]()

    def called(module: nn.Module, inputs: Any) -> None:
        calls.append(module)

    handles = [m.register_forward_pre_hook(called) for m in model.modules()]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _holds_tensors(module: nn.Module) -> bool:
    """Parameters or saved buffers: a rotary table holds neither, and whoever is above needs it."""
    return next(chain(module.parameters(), iter(module.state_dict().values())), None) is not None


def _state_of(output: Any, path: str) -> Tensor:
    leaves = [leaf for leaf in pytree.tree_leaves(output) if leaf is not None]
    if not isinstance(output, Tensor) or not output.is_floating_point():
        raise BadInput(
            f"layer {path!r} gives {len(leaves)} values in a {type(output).__name__}, of which one "
            "state cannot be told; only layers that give one float tensor can be frozen"
        )
    return output
