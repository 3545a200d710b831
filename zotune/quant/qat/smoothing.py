"""Transforms of the inputs of layers, chosen by the layers' errors and by the model's loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final

import torch
from torch import Tensor, nn

from zotune.quant.calibrate.folding import Fold
from zotune.quant.qat.layer import FakeQuantLinear, fake_layers
from zotune.quant.qat.prepare import folds_on

STRENGTHS: Final = tuple(k / 10 for k in range(11))
Run = Callable[[], float]
"""Runs some batches through the model; their mean loss."""


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
