"""On which kernels a model's layers run."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from zotune.errors import BadInput
from zotune.quant import kernels
from zotune.quant.kernels.choice import chosen
from zotune.quant.layer import QuantLayer

log = logging.getLogger("zotune")


def kernels_of(model: nn.Module, gradient: bool = False) -> dict[str, str]:
    """The kernel of each kind of layer, with how many there are; "torch" for float layers.

    Args:
        model: any module.
        gradient: say what runs where a gradient is wanted.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    >>> kernels_of(model)
    {'Linear float32': 'torch (2 layers)'}
    """
    found: dict[tuple[str, str], int] = {}
    for module in model.modules():
        if isinstance(module, QuantLayer):
            kind = (f"{type(module).__name__} {module.scheme}", _chosen(module, gradient))
        elif isinstance(module, nn.Linear | nn.Conv2d):
            dtype = str(module.weight.dtype).removeprefix("torch.")
            kind = (f"{type(module).__name__} {dtype}", "torch")
        else:
            continue
        found[kind] = found.get(kind, 0) + 1
    return {
        layer: f"{name} ({count} layer{'s' * (count > 1)})"
        for (layer, name), count in found.items()
    }


def _chosen(layer: QuantLayer, gradient: bool) -> str:
    """The kernel, and the ways that it has been found to go fastest for layers of this size."""
    x = torch.empty(0, device=layer.scale.device, requires_grad=gradient)
    with torch.set_grad_enabled(gradient):
        name = kernels.chosen(x, layer.scale, layer.zero, layer.bias)
    if name not in kernels.WAYS or not layer.scheme.integer_inputs:
        return name
    size = (layer.rows, layer.columns, layer.scheme.bits)
    found: dict[Any, str] = dict(chosen())
    ways = {way for (key, _), way in found.items() if key[2:] == size}
    if forced := kernels.forced_way():
        ways = {forced}
    return "/".join([name, *filter(None, ["+".join(sorted(ways))])])


@contextmanager
def forced_kernel(name: str | None) -> Iterator[None]:
    """Every quantized layer on the named kernel, loaded before anything is computed with it; None
    lets zotune choose.

    Raises:
        BadInput: there is none of that name, or this machine lacks what it is made with.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(kernels.force(name))
        except ImportError as error:
            raise BadInput(f"kernel {name!r} needs {error.name}, which is not installed") from error
        yield


def say_kernels(found: Mapping[str, str]) -> None:
    """Log a line for each kind of layer."""
    for layer, name in found.items():
        log.info("kernel: %s on %s", layer, name)
