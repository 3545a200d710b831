"""From a float model to one that is trained through its rounding, and on to a quantized one."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from zotune.errors import BadInput
from zotune.quant.calibrate.folding import Fold, fold_
from zotune.quant.linear import QuantLinear
from zotune.quant.model import DEFAULT_EXCLUDE, choose, replace_
from zotune.quant.qat.layer import FakeQuantLinear, fake_layers
from zotune.quant.scheme import Scheme

log = logging.getLogger("zotune")


def fake_quantize_(
    model: nn.Module, scheme: Scheme | str, exclude: Sequence[str] = DEFAULT_EXCLUDE
) -> list[str]:
    """Replace every linear layer by a `FakeQuantLinear`, in place; layers are chosen as by
    `quantize_model_`, and all are checked before the first is replaced.

    Returns:
        names of the replaced layers.

    Raises:
        BadInput: if a layer cannot take the scheme, or none is left.

    >>> model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> fake_quantize_(model, "int2-g8-asym", exclude=("2",))
    ['0']
    """
    scheme = Scheme.parse(scheme) if isinstance(scheme, str) else scheme
    fresh = {}
    for name, module in choose(model, scheme, exclude).items():
        if isinstance(module, nn.Conv2d):
            raise BadInput(f"{name!r} is a convolution, which is not trained through; exclude it")
        fresh[name] = FakeQuantLinear.from_linear(module, scheme, name)
    for name, layer in fresh.items():
        replace_(model, name, layer)
    return list(fresh)


def attach_(model: nn.Module, folds: Iterable[Fold]) -> tuple[Fold, ...]:
    """Give the layers behind each fold a transform of their input that changes nothing yet.

    The folds are those of the float model (`zotune.quant.calibrate.folding`). One some of whose
    layers are not fake-quantized, or whose source has one scale for all of its rows, cannot be
    taken up; it is left out and said.

    Returns:
        the folds that were attached.
    """
    layers, done = fake_layers(model), []
    for fold in folds:
        source = layers.get(fold.source)
        whole = source is not None and source.scheme.granularity == "tensor"
        if whole or not all(name in layers for name in fold.targets):
            log.warning("%s: its inputs are not transformed", ", ".join(fold.targets))
            continue
        device = layers[fold.targets[0]].weight.device
        log_scale = torch.zeros(fold.channels, device=device)
        shift = torch.zeros(fold.channels, device=device) if fold.shifts else None
        for name in fold.targets:
            layers[name].attach_(fold, log_scale, shift)
        done.append(fold)
    return tuple(done)


def folds_on(model: nn.Module) -> tuple[Fold, ...]:
    """The folds that `attach_` has left on a model."""
    held = (layer.fold for layer in fake_layers(model).values())
    return tuple(dict.fromkeys(fold for fold in held if fold is not None))


@torch.no_grad()
def quantize_(model: nn.Module) -> list[str]:
    """Make every fake-quantized layer an ordinary `QuantLinear` of the same numbers, in place.

    Transforms go into the modules that make the layers' inputs: a norm's gain and bias, or the
    scales and bias of a quantized layer, whose codes stay as they are.

    Returns:
        names of the quantized layers.
    """
    layers, transforms = fake_layers(model), list(_transforms(model))
    for name, layer in layers.items():
        replace_(model, name, layer.quantized())
    for root, fold, scale, shift in transforms:
        _absorb_(root.get_submodule(fold.source), fold, scale, shift)
    return list(layers)


@torch.no_grad()
def freeze_(model: nn.Module, kept: Iterable[str]) -> list[str]:
    """Quantize all fake-quantized layers for good but those `kept`, whose transforms go into their
    float weights.

    Returns:
        names of the quantized layers.
    """
    kept = set(kept)
    for root, fold, scale, shift in list(_transforms(model)):
        for name in fold.targets:
            fake_layers(root)[name].attach_(None, None, None)
        fold_(root, fold, scale, shift)
    frozen = {n: layer for n, layer in fake_layers(model).items() if n not in kept}
    for name, layer in frozen.items():
        replace_(model, name, layer.quantized())
    return list(frozen)


def _transforms(model: nn.Module) -> Iterator[tuple[nn.Module, Fold, Tensor, Tensor | None]]:
    """The folds with the module that their names start from, and their scales and shifts.

    A model that a task has wrapped since (an encoder under a head) is a child of what it is now.
    """
    layers = fake_layers(model)
    for fold in folds_on(model):
        path, first = next((p, layer) for p, layer in layers.items() if layer.fold == fold)
        target = next(name for name in fold.targets if f".{path}".endswith(f".{name}"))
        assert first.log_scale is not None
        root = model.get_submodule(path.removesuffix(target).rstrip("."))
        yield root, fold, first.log_scale.exp(), first.shift


def _absorb_(source: nn.Module, fold: Fold, scale: Tensor, shift: Tensor | None) -> None:
    """The source makes (its output - shift) / scale from now on."""
    rows = slice(*fold.rows)
    values = source.scale if isinstance(source, QuantLinear) else source.get_parameter("weight")
    assert isinstance(values, Tensor)
    values[rows] /= (scale.unsqueeze(1) if values.dim() == 2 else scale).to(values.dtype)
    bias = getattr(source, "bias", None)
    if bias is not None:
        moved = bias[rows] if shift is None else bias[rows] - shift.to(bias.dtype)
        bias[rows] = moved / scale.to(bias.dtype)
