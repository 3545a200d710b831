"""From a float model to one that is trained through its rounding, and on to a quantized one."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from zotune.errors import BadInput
from zotune.quant.affine import Scheme
from zotune.quant.linear import QuantLinear, is_conv1d
from zotune.quant.model import DEFAULT_EXCLUDE, excluded, float_linears, replace_, shared_weights
from zotune.quant.qat.layer import FakeQuantLinear, fake_layers

log = logging.getLogger("zotune")
_ATTRIBUTE: Final = "zotune_links"


@dataclass(frozen=True)
class Link:
    """Layers that read one input, and the module that can take up a transform of its channels.

    producer: a norm, or a linear layer whose rows from `first` on are the channels (a value
    projection; the up projection of a gated MLP). places: the channel of each input column where
    columns share channels. shiftable: whether the input may also be shifted, which takes a bias in
    the producer and a bias in each reader.
    """

    producer: str
    readers: tuple[str, ...]
    channels: int
    first: int = 0
    places: tuple[int, ...] | None = None
    shiftable: bool = False


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
    shared = shared_weights(model)
    fresh = {
        name: FakeQuantLinear.from_linear(module, scheme, name)
        for name, module in float_linears(model)
        if id(module.weight) not in shared and not excluded(name, exclude)
    }
    if not fresh:
        raise BadInput(
            f"no layer to quantize in {type(model).__name__}: it has no linear layer outside "
            f"exclude={tuple(exclude)} with a weight of its own"
        )
    for name, layer in fresh.items():
        replace_(model, name, layer)
    return list(fresh)


def attach_(model: nn.Module, links: Iterable[Link]) -> list[Link]:
    """Give the readers of each link a transform of their input that changes nothing yet.

    Links some of whose readers are not fake-quantized, or whose producer has one scale for all of
    its rows, cannot be transformed; they are left out and said.

    Returns:
        the links that were attached.
    """
    layers, modules = fake_layers(model), dict(model.named_modules())
    done = []
    for link in links:
        producer = modules[link.producer]
        whole = isinstance(producer, FakeQuantLinear) and producer.scheme.granularity == "tensor"
        if whole or not all(name in layers for name in link.readers):
            log.warning("%s: its readers are not transformed", link.producer)
            continue
        device = layers[link.readers[0]].weight.device
        places = None if link.places is None else torch.tensor(link.places, device=device)
        log_scale = torch.zeros(link.channels, device=device)
        shift = torch.zeros(link.channels, device=device) if link.shiftable else None
        for name in link.readers:
            layers[name].attach_(log_scale, shift, places)
        done.append(link)
    setattr(model, _ATTRIBUTE, tuple(done))
    return done


def links_on(model: nn.Module) -> tuple[Link, ...]:
    """The links that `attach_` has left on a model."""
    found = getattr(model, _ATTRIBUTE, ())
    assert isinstance(found, tuple)
    return found


@torch.no_grad()
def fold_(model: nn.Module) -> list[str]:
    """Make every fake-quantized layer an ordinary `QuantLinear` of the same numbers, in place.

    Transforms go into the modules that make the layers' inputs: a norm's gain and bias, or the
    scales and bias of a quantized layer, whose codes stay as they are.

    Returns:
        names of the quantized layers.
    """
    layers = fake_layers(model)
    transforms = _transforms(model, layers)
    for name, layer in layers.items():
        replace_(model, name, layer.quantized())
    _absorb_(model, transforms)
    return list(layers)


@torch.no_grad()
def settle_(model: nn.Module) -> None:
    """Put the transforms into the float weights and the modules before them, once and for all."""
    layers = fake_layers(model)
    transforms = _transforms(model, layers)
    for link, _, _ in transforms:
        for name in link.readers:
            layer = layers[name]
            weight, bias = layer.transformed()
            layer.weight.copy_(weight)
            if layer.bias is not None and bias is not None:
                layer.bias.copy_(bias)
            layer.attach_(None, None, None)
    _absorb_(model, transforms)


@torch.no_grad()
def freeze_(model: nn.Module, kept: Iterable[str]) -> list[str]:
    """Quantize all fake-quantized layers for good but those `kept`; their names."""
    kept = set(kept)
    settle_(model)
    frozen = {n: layer for n, layer in fake_layers(model).items() if n not in kept}
    for name, layer in frozen.items():
        replace_(model, name, layer.quantized())
    return list(frozen)


Transform = tuple[Link, Tensor, Tensor | None]


def _transforms(model: nn.Module, layers: dict[str, FakeQuantLinear]) -> list[Transform]:
    """The links with their scales and shifts; the model has none any more."""
    found = []
    for link in links_on(model):
        first = layers[link.readers[0]]
        assert first.log_scale is not None
        found.append((link, first.log_scale.exp(), first.shift))
    setattr(model, _ATTRIBUTE, ())
    return found


def _absorb_(model: nn.Module, transforms: list[Transform]) -> None:
    """Each producer makes (its output - shift) / s from now on."""
    modules = dict(model.named_modules())
    for link, scale, shift in transforms:
        module = modules[link.producer]
        rows = slice(link.first, link.first + link.channels)
        if isinstance(module, QuantLinear):
            module.scale[rows] /= scale.unsqueeze(1)
        else:
            weight = module.get_parameter("weight")
            weight = weight.t() if is_conv1d(module) else weight
            weight[rows] /= (scale.unsqueeze(1) if weight.dim() == 2 else scale).to(weight.dtype)
        bias = getattr(module, "bias", None)
        if bias is not None:
            moved = bias[rows] if shift is None else bias[rows] - shift.to(bias.dtype)
            bias[rows] = moved / scale.to(bias.dtype)
