"""What all probes share is computed once.

Until the first site has run, the rows of a stacked batch are copies of one batch. A submodule
without sites that is called that early therefore computes the first copy only and repeats its
output. Where just a head is tuned, a step with any number of probes costs one pass through the
network below it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from zotune.core.sites import Site, View

IMAGES = 4  # dimensions of (batch, channels, height, width), where no other axis is taken for rows


def site_free(model: nn.Module, sites: Sequence[Site]) -> list[nn.Module]:
    """The largest submodules that hold no site, each once.

    >>> model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.Linear(2, 1))
    >>> [type(m).__name__ for m in site_free(model, [Site("1", model[1], {})])]
    ['Sequential']
    """
    owners = {id(site.module) for site in sites}
    holding = {id(m) for m in model.modules() if any(id(c) in owners for c in m.modules())}
    found: dict[int, nn.Module] = {}
    for module in model.modules():
        if id(module) in holding and id(module) not in owners:
            for child in module.children():
                if id(child) not in holding and not isinstance(child, nn.ModuleList):
                    found[id(child)] = child
    return list(found.values())


def saved(model: nn.Module, view: View) -> float:
    """The share of a model's bytes that one evaluation has read once for all probes."""
    return sum(_size(m) for m in view.shared) / max(1, _size(model))


def _size(module: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))


@contextmanager
def sharing(modules: Sequence[nn.Module], view: View) -> Iterator[None]:
    """Let these modules compute one copy of the batch while no site has run."""
    copies = len(view.probes)
    changed = [m for m in modules if copies > 1 and "forward" not in vars(m)]
    try:
        for module in changed:
            module.forward = _once(module, view, copies)  # type: ignore[method-assign]
        yield
    finally:
        for module in changed:
            vars(module).pop("forward", None)


def _once(module: nn.Module, view: View, copies: int) -> Callable[..., Any]:
    own = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if view.visited or not _copied((args, kwargs), view.rows, copies):
            return own(*args, **kwargs)
        first = view.rows // copies

        def cut(value: Any) -> Any:
            return value[:first] if _stacked(value, view.rows) else value

        def again(value: Any) -> Any:
            return torch.cat([value] * copies) if _stacked(value, first) else value

        view.shared.append(module)
        args, kwargs = pytree.tree_map(cut, (args, kwargs))
        return pytree.tree_map(again, own(*args, **kwargs))

    forward.own = own  # type: ignore[attr-defined]  # the layer computes what it always does
    return forward


def _stacked(value: Any, rows: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) == rows


def _copied(inputs: Any, rows: int, copies: int) -> bool:
    """Whether the inputs are `copies` equal parts of a whole stacked batch, and nothing else in
    them could be taken for rows: heads folded into the batch, or as many tokens as examples."""
    first = rows // copies
    tensors = [v for v in pytree.tree_leaves(inputs) if isinstance(v, Tensor) and v.dim()]
    values = [v for v in tensors if len(v) == rows]
    if any(len(v) > rows and len(v) % rows == 0 for v in tensors):
        return False
    if first > 1 and any(first in v.shape[1:] for v in values if v.dim() != IMAGES):
        return False
    parts = [v.reshape(copies, first, *v.shape[1:]) for v in values]
    return bool(parts) and all(bool((p == p[:1]).all()) for p in parts)
