"""Where training starts: transforms and thresholds that a search by forward passes finds.

Both look at one layer at a time and at the inputs that it gets in the float model; the error is
that of the layer's output, so no backward pass is needed anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn

from zotune.errors import BadInput
from zotune.quant import affine
from zotune.quant.calibrate.folding import Fold
from zotune.quant.calibrate.gptq import inverse_factor
from zotune.quant.qat.layer import FakeQuantLinear, fake_layers
from zotune.quant.qat.prepare import folds_on

STRENGTHS: Final = tuple(k / 10 for k in range(11))
DAMPING: Final = 0.01  # GPTQ's
SHARES: Final = tuple(1.0 - k / 20 for k in range(15))
TOKENS: Final = 8192
"""Tokens of a batch that a layer is searched on, at most."""


Run = Callable[[], float]


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
                compensate_(layers[name], seen[name], name)
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
def smooth_(model: nn.Module, inputs: dict[str, Tensor], run: Run) -> None:
    """Choose each fold's transform: s_c = max|x_c|^a / max|w_c|^(1-a) with the strength a, and the
    shift, if any, of the least error at the outputs of the fold's layers (SmoothQuant 2022, arXiv
    2211.10438; searched as AWQ does, 2306.00978). It stays where it lowers the model's loss."""
    layers, best = fake_layers(model), run()
    for fold in folds_on(model):
        x = inputs.get(fold.targets[0])
        if x is None:
            continue  # never called by this text
        readers = [layers[name] for name in fold.targets]
        _set_(readers[0], *_least(fold, readers, x))
        loss = run()
        if loss < best:
            best = loss
        else:
            _set_(readers[0], torch.zeros(fold.channels, device=x.device), None)


def _least(
    fold: Fold, readers: Sequence[FakeQuantLinear], x: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The transform of the least error at the readers' outputs."""
    wanted = [layer_output(layer, x, False) for layer in readers]
    errors, tried = [], list(_transforms(fold, readers, x))
    for transform in tried:
        _set_(readers[0], *transform)
        pairs = zip(readers, wanted, strict=True)
        errors.append(sum(float((layer_output(r, x) - y).square().sum()) for r, y in pairs))
    return tried[errors.index(min(errors))]


def _set_(layer: FakeQuantLinear, log_scale: Tensor, shift: Tensor | None) -> None:
    """Write a transform, which all layers with this input share; None shifts nothing."""
    assert layer.log_scale is not None
    layer.log_scale.copy_(log_scale)
    if layer.shift is not None:
        layer.shift.copy_(torch.zeros_like(layer.shift) if shift is None else shift)


def _transforms(
    fold: Fold, readers: Sequence[FakeQuantLinear], x: Tensor
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Candidates: no transform first, then every strength, without a shift and with one."""
    nothing = torch.zeros(fold.channels, device=x.device)
    middle = (fold.reduced(x.amax(0)) - fold.reduced(-x.amin(0))) / 2
    weight = torch.stack([layer.weight.float().abs().amax(0) for layer in readers]).amax(0)
    columns = fold.reduced(weight)
    for shift in (None, middle) if fold.shifts else (None,):
        yield nothing, shift
        moved = x if shift is None else x - shift[readers[0].places]
        largest = fold.reduced(moved.abs().amax(0))
        empty = (largest == 0) | (columns == 0)  # nothing to balance: the channel is left alone
        for strength in STRENGTHS:
            log = strength * largest.log() - (1 - strength) * columns.log()
            log = log - log[~empty].mean() if not empty.all() else log
            yield torch.where(empty, 0.0, log), shift


def layer_output(layer: FakeQuantLinear, x: Tensor, rounding: bool = True) -> Tensor:
    """The layer's output without its bias's effect on errors: as it is, rounded or not."""
    layer.rounding = rounding
    try:
        return layer(x)  # type: ignore[no-any-return]
    finally:
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
def compensate_(layer: FakeQuantLinear, x: Tensor, name: str = "layer") -> None:
    """Let the weights behind each column make up for its rounding, as GPTQ does (2022, arXiv
    2210.17323), on the layer's grid as it is; what is rounded later is what GPTQ would round.

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
    for k in range(columns):
        nearest = rest[:, k] / steps[:, k] + (0 if zeros is None else zeros[:, k])
        code = nearest.round().clamp(layer.scheme.lowest, layer.scheme.highest)
        rounded = (code - (0 if zeros is None else zeros[:, k])) * steps[:, k]
        error = (rest[:, k] - rounded) / upper[k, k]
        rest[:, k + 1 :] -= error.unsqueeze(1) * upper[k, k + 1 :]
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
