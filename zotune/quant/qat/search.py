"""Where training starts: transforms and thresholds that a search by forward passes finds.

Both look at one layer at a time and at the inputs that it gets in the float model; the error is
that of the layer's output, so no backward pass is needed anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn

from zotune.errors import BadInput
from zotune.quant import affine
from zotune.quant.calibrate.gptq import compensated, inverse_factor
from zotune.quant.qat.layer import FakeQuantLinear, fake_layers
from zotune.quant.qat.smoothing import Run, layer_output, smooth_

DAMPING: Final = 0.01  # GPTQ's
MADE_UP: Final = 0.5
"""Of what rounding takes from activations; all of it would fit the examples too well."""
SHARES: Final = tuple(1.0 - k / 20 for k in range(15))
TOKENS: Final = 8192
"""Tokens of a batch that a layer is searched on, at most."""


def search_(
    model: nn.Module,
    run: Run,
    *,
    smooth: bool = True,
    clip: bool = True,
    compensate: bool = True,
    clip_inputs: bool = False,
) -> list[str]:
    """Choose where training starts: transforms first, as the float model sees its inputs; then the
    layers in the order in which they run, each behind the rounded ones before it.

    Args:
        model: with fake-quantized layers.
        run: runs some batches through it; their mean loss.

    Returns:
        names of the layers that were never run, which start at rounding to nearest.

    Raises:
        BadInput: for activations that are not finite.
    """
    with recording(model) as inputs, exact(model), torch.no_grad():
        run()
    if smooth:
        smooth_(model, inputs, run)
    groups: dict[int, list[str]] = {}
    for name, x in inputs.items():
        _check(name, x)
        groups.setdefault(id(x), []).append(name)
    layers = fake_layers(model)
    for names in groups.values():
        with recording(model, names) as seen, torch.no_grad():
            run()
        for name in names:
            if clip:
                clip_(layers[name], seen[name])
            if compensate:
                compensate_(layers[name], seen[name], name, inputs[name])
            if clip_inputs:
                clip_inputs_(layers[name], seen[name])
    return [name for name in layers if name not in inputs]


@contextmanager
def recording(
    model: nn.Module, names: Collection[str] | None = None, tokens: int = TOKENS
) -> Iterator[dict[str, Tensor]]:
    """Inputs (tokens, in) of the fake-quantized layers, or of those named, in the order in which
    they run; there when the block has ended. Layers that read one tensor share one record.

    tokens: the most that one batch gives.
    """
    layers, found = fake_layers(model), dict[str, Tensor]()
    rows: dict[str, list[Tensor]] = {}
    same: dict[str, str] = {}
    last: list[Any] = [None, ""]

    def watch(name: str) -> Any:
        def seen(module: nn.Module, args: tuple[Any, ...]) -> None:
            if args[0] is not last[0]:
                last[:] = args[0], name
                x = args[0].detach().flatten(0, -2)
                rows.setdefault(name, []).append(x[:: math.ceil(len(x) / tokens) or 1].float())
            same[name] = last[1]

        return seen

    handles = [
        layer.register_forward_pre_hook(watch(name))
        for name, layer in layers.items()
        if names is None or name in names
    ]
    try:
        yield found
    finally:
        last.clear()
        for handle in handles:
            handle.remove()
    whole = {name: torch.cat(parts) for name, parts in rows.items()}
    found.update({name: whole[first] for name, first in same.items()})


@contextmanager
def exact(model: nn.Module) -> Iterator[None]:
    """The model with its transforms but without any rounding."""
    layers = fake_layers(model).values()
    for layer in layers:
        layer.rounding = False
    try:
        yield
    finally:
        for layer in layers:
            layer.rounding = True


@torch.no_grad()
def clip_(layer: FakeQuantLinear, x: Tensor) -> None:
    """Choose alpha and beta of every group by the error of the layer's output, both alike first
    and then each by itself. Groups of a row are searched as if the others were exact."""
    seen, groups = layer.inputs(x), layer.upper.shape[1]
    width = layer.scheme.group_size or layer.in_features
    columns = affine.in_groups(seen, groups, layer.scheme.group_size)  # (tokens, groups, width)
    gram = torch.einsum("tgi,tgj->gij", columns, columns)
    target = affine.in_groups(layer.transformed()[0].float(), groups, width)
    best = torch.full_like(layer.upper, math.inf)
    kept = layer.upper.clone(), layer.lower.clone()
    for sides in (("upper", "lower"), ("upper",), ("lower",)):
        for share in SHARES:
            for side in sides:
                getattr(layer, side).fill_(math.log(share))
            weight = affine.in_groups(layer.weight_seen()[0], groups, width)
            away = (weight - target).transpose(0, 1)  # (groups, out, width)
            error = ((away @ gram) * away).sum(-1).t()
            error = error if layer.upper.shape[0] > 1 else error.sum().reshape(1, 1)
            better = error < best
            best = torch.where(better, error, best)
            for values, place in zip((layer.upper, layer.lower), kept, strict=True):
                place[better] = values[better]
        layer.upper.copy_(kept[0])
        layer.lower.copy_(kept[1])


@torch.no_grad()
def compensate_(
    layer: FakeQuantLinear,
    x: Tensor,
    name: str = "layer",
    exact_x: Tensor | None = None,
) -> None:
    """Let the weights behind each column make up for its rounding, as GPTQ does (2022, arXiv
    2210.17323), on the layer's grid as it is; what is rounded later is what GPTQ would round.

    With the inputs that the layer has in the exact model, weights also make up for half of what
    rounding takes from them, here and in the layers before: W' is between W and the least squares
    of W x_exact by W' A(x), which GPTAQ takes whole (2025, arXiv 2504.02692).

    The thresholds, shares of the weights' new extremes, are set so that the grid stays.
    """
    seen, (weight, _), point = layer.inputs(x).double(), layer.transformed(), layer.point()
    low, high = layer.ends()
    scale, zero = affine.grid(low, high, layer.scheme)
    columns, size = layer.in_features, layer.scheme.group_size
    steps = affine.per_weight(scale, columns, size).expand(-1, columns).double()
    zeros = None if zero is None else affine.per_weight(zero, columns, size).expand(-1, columns)
    upper = inverse_factor(seen.mT @ seen, DAMPING, name)
    rest = weight.double().clone()
    if exact_x is not None:
        lost = layer.inputs(exact_x, rounding=False).double() - seen
        rest += MADE_UP * (rest @ (lost.mT @ seen) @ (upper.mT @ upper))  # (seen^T seen)^-1

    def rounded(k: int, part: Tensor) -> Tensor:
        shift = 0 if zeros is None else zeros[:, k]
        nearest = (part[0] / steps[:, k] + shift).round()
        code = nearest.clamp(layer.scheme.lowest, layer.scheme.highest)
        return (code - shift) * steps[:, k]

    rest = compensated(rest, upper, rounded)
    if point.log_scale is not None:
        rest /= point.log_scale.exp()[layer.places].double()
    layer.weight.copy_(rest)
    layer.pin_(low, high)


@torch.no_grad()
def clip_inputs_(layer: FakeQuantLinear, x: Tensor) -> None:
    """Choose the share beyond which the layer's activations are clipped."""
    if layer.input_clip is None:
        return
    wanted = layer_output(layer, x, False)
    errors = {}
    for share in SHARES:
        layer.input_clip.fill_(math.log(share))
        errors[share] = float((layer_output(layer, x) - wanted).square().sum())
    layer.input_clip.fill_(math.log(min(errors, key=errors.__getitem__)))


def _check(name: str, x: Tensor) -> None:
    if not bool(x.isfinite().all()):
        channels = (~x.isfinite()).any(0).nonzero().flatten().tolist()
        raise BadInput(
            f"activations of layer {name!r} are not finite in channels {channels[:5]}; repair the "
            "checkpoint, or exclude the layer"
        )
