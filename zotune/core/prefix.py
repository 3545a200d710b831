"""What all probes share is computed once.

Until the first site has run, the rows of a stacked batch are copies of one batch. Where all sites
lie in one child of the model (a head), the model runs on the first copy as a whole, and what
enters that child is repeated: a step with any number of probes costs one pass through the network
below. Elsewhere a submodule without sites that is called that early computes the first copy only
and repeats its output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from zotune.core.sites import Site, View

IMAGES = 4  # dimensions of (batch, channels, height, width), where no other axis is taken for rows


class _Mixed(Exception):
    """The model does not treat rows below and above the border as one copy and as several."""


@dataclass
class Prefix:
    """What of a model lies below its sites.

    `top` is the child of the model that holds all sites, None where no single one does, or where a
    first try has shown that the model cannot run below it on fewer rows than above.
    """

    model: nn.Module
    free: list[nn.Module]
    top: nn.Module | None = field(default=None)

    @classmethod
    def of(cls, model: nn.Module, sites: Sequence[Site]) -> Prefix:
        owners = {id(site.module) for site in sites}
        holding = [
            child for child in model.children() if any(id(m) in owners for m in child.modules())
        ]
        single = len(holding) == 1 and id(model) not in owners
        called = single and not isinstance(holding[0], nn.ModuleList | nn.ModuleDict)
        return cls(model, site_free(model, sites), holding[0] if called else None)

    @contextmanager
    def shared(self, view: View) -> Iterator[None]:
        """Let the model compute one copy of the batch while no site has run."""
        changed = self.free if len(view.probes) > 1 else []
        given = {m: f for m in changed if "forward" not in vars(m) for f in [_once(m, view)]}
        if self.top is not None and len(view.probes) > 1 and "forward" not in vars(self.model):
            given[self.model] = self._whole(view)
        try:
            for module, forward in given.items():
                module.forward = forward  # type: ignore[method-assign]
            yield
        finally:
            for module in given:
                vars(module).pop("forward", None)

    def _whole(self, view: View) -> Callable[..., Any]:
        """The model's forward on the first copy, up to what enters `top`."""
        own = self.model.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self.top is None or view.visited or not _copied((args, kwargs), view):
                return own(*args, **kwargs)
            try:
                with _repeating(self.top, view):
                    out = own(*_first(args, view), **_first(kwargs, view))
                if not all(_stacked(v, view.rows) for v in _tensors(out)):
                    raise _Mixed
                view.shared += [m for m in self.model.children() if m is not self.top]
                return out
            except (_Mixed, RuntimeError, IndexError, ValueError):
                self.top = None  # rows of one copy met rows of all: not this model
                view.visited.clear()
                return own(*args, **kwargs)

        return forward


@contextmanager
def _repeating(top: nn.Module, view: View) -> Iterator[None]:
    """What enters `top` in one copy is repeated for all probes."""
    entered = list[nn.Module]()

    def enter(module: nn.Module, args: Any, kwargs: Any) -> Any:
        if entered:
            raise _Mixed
        entered.append(module)
        rows = view.rows // len(view.probes)
        if not any(_stacked(v, rows) for v in _tensors((args, kwargs))):
            raise _Mixed
        return _all((args, kwargs), view)

    handle = top.register_forward_pre_hook(enter, with_kwargs=True, prepend=True)
    try:
        yield
    finally:
        handle.remove()
    if not entered:
        raise _Mixed


def site_free(model: nn.Module, sites: Sequence[Site]) -> list[nn.Module]:
    """The largest submodules that hold no site, each once, and those inside of an nn.Sequential,
    which a model may call one by one.

    >>> model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.Linear(2, 1))
    >>> [type(m).__name__ for m in site_free(model, [Site("1", model[1], {})])]
    ['Sequential', 'Linear', 'ReLU']
    """
    owners = {id(site.module) for site in sites}
    holding = {id(m) for m in model.modules() if any(id(c) in owners for c in m.modules())}
    found: dict[int, nn.Module] = {}
    for module in model.modules():
        if id(module) in holding and id(module) not in owners:
            for child in module.children():
                if id(child) not in holding:
                    found.update({id(m): m for m in _callable(child)})
    return list(found.values())


def saved(model: nn.Module, view: View) -> float:
    """The share of a model's bytes that one evaluation has read once for all probes."""
    return sum(_size(m) for m in view.shared) / max(1, _size(model))


def _size(module: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))


def _callable(module: nn.Module) -> Iterator[nn.Module]:
    """The module, and what is called in its place where it is a list of others."""
    if not isinstance(module, nn.ModuleList):
        yield module
    if isinstance(module, nn.ModuleList | nn.Sequential):
        for child in module:
            yield from _callable(child)


def _once(module: nn.Module, view: View) -> Callable[..., Any]:
    own = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if view.visited or not _copied((args, kwargs), view):
            return own(*args, **kwargs)
        view.shared.append(module)
        return _all(own(*_first(args, view), **_first(kwargs, view)), view)

    forward.own = own  # type: ignore[attr-defined]  # the layer computes what it always does
    return forward


def _first(inputs: Any, view: View) -> Any:
    """The first of several equal copies."""
    rows = view.rows // len(view.probes)
    return pytree.tree_map(lambda v: v[:rows] if _stacked(v, view.rows) else v, inputs)


def _all(values: Any, view: View) -> Any:
    """One copy for each probe."""
    copies = len(view.probes)
    rows = view.rows // copies
    return pytree.tree_map(lambda v: torch.cat([v] * copies) if _stacked(v, rows) else v, values)


def _tensors(values: Any) -> list[Tensor]:
    return [v for v in pytree.tree_leaves(values) if isinstance(v, Tensor) and v.dim()]


def _stacked(value: Any, rows: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) == rows


def _copied(inputs: Any, view: View) -> bool:
    """Whether the inputs are equal parts of a whole stacked batch, one per probe, and nothing else
    in them could be taken for rows: heads folded into the batch, or as many tokens as examples."""
    copies, rows = len(view.probes), view.rows
    first, tensors = rows // copies, _tensors(inputs)
    values = [v for v in tensors if len(v) == rows]
    if any(len(v) > rows and len(v) % rows == 0 for v in tensors):
        return False
    if first > 1 and any(first in v.shape[1:] for v in values if v.dim() != IMAGES):
        return False
    parts = [v.reshape(copies, first, *v.shape[1:]) for v in values]
    return bool(parts) and all(bool((p == p[:1]).all()) for p in parts)
