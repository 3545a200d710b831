"""Replace the linear layers and convolutions of a model by quantized ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

import torch
from torch import nn

from zotune.errors import BadInput
from zotune.quant.conv import QuantConv2d
from zotune.quant.layer import QuantLayer
from zotune.quant.linear import QuantLinear, is_conv1d
from zotune.quant.scheme import Scheme

DEFAULT_EXCLUDE = ("lm_head",)
IMAGE_HEADS = ("classifier", "classifier.*", "head", "head.*", "fc")
"""What image classifiers call their output layer."""
CONVOLUTIONS = ("*conv*", "pos_embed*")
"""What denoisers call their convolutions."""


def default_exclude(kind: str) -> tuple[str, ...]:
    """What stays float in a model of this kind unless asked for: its output layer, or
    a denoiser's convolutions."""
    return {"vision": IMAGE_HEADS, "diffusion": CONVOLUTIONS}.get(kind, DEFAULT_EXCLUDE)


def quantize_model_(
    model: nn.Module, scheme: Scheme | str, exclude: Sequence[str] = DEFAULT_EXCLUDE
) -> list[str]:
    """Replace every nn.Linear, nn.Conv2d and transformers' Conv1D by its quantized layer, in place.

    Layers whose weight is shared with another module, such as a head tied to the embedding, stay
    as they are. All layers are checked before the first is replaced.

    Args:
        model: any module.
        scheme: a Scheme or its text, such as "int4-g64".
        exclude: names or patterns ("*.mlp.*") to leave alone; a name matches itself and, as the
            last part of a dotted name, the layers called that anywhere.

    Returns:
        names of the replaced layers, in the model's order.

    Raises:
        BadInput: if the group size does not divide a layer, or no layer is left to quantize.

    >>> model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> quantize_model_(model, "int4-g8", exclude=("2",))
    ['0']
    """
    scheme = Scheme.parse(scheme) if isinstance(scheme, str) else scheme
    chosen = choose(model, scheme, exclude)
    for name, module in chosen.items():
        replace_(model, name, quantized_twin(module, scheme, name))
    return list(chosen)


def choose(
    model: nn.Module, scheme: Scheme, exclude: Sequence[str] = DEFAULT_EXCLUDE
) -> dict[str, nn.Linear | nn.Conv2d]:
    """The layers that `quantize_model_` replaces, by name, all of them checked.

    Raises:
        BadInput: as `quantize_model_`.
    """
    shared = shared_weights(model)
    chosen = {
        name: module
        for name, module in float_layers(model)
        if id(module.weight) not in shared and not excluded(name, exclude)
    }
    if not chosen:
        raise BadInput(
            f"no layer to quantize in {type(model).__name__}: it has no linear layer or "
            f"convolution outside exclude={tuple(exclude)} with a weight of its own"
        )
    for name, module in chosen.items():
        scheme.check_divides(empty_twin(module, scheme).columns, name)
    return chosen


def float_layers(model: nn.Module) -> Iterator[tuple[str, nn.Linear | nn.Conv2d]]:
    """Names and modules of the layers that `quantize_model_` considers.

    Only exact nn.Linear and nn.Conv2d (and Conv1D) count: a subclass may read `weight` in ways of
    its own.
    """
    for name, module in model.named_modules():
        if type(module) in (nn.Linear, nn.Conv2d) or is_conv1d(module):
            yield name, module


def empty_twin(module: nn.Linear | nn.Conv2d, scheme: Scheme) -> QuantLayer:
    """The quantized layer for a float one, its tensors on the meta device."""
    if isinstance(module, nn.Conv2d):
        return QuantConv2d.like(module, scheme)
    return QuantLinear.like(module, scheme)


def quantized_twin(module: nn.Linear | nn.Conv2d, scheme: Scheme, name: str) -> QuantLayer:
    """The quantized layer with the nearest codes of a float one."""
    if isinstance(module, nn.Conv2d):
        return QuantConv2d.from_conv(module, scheme, name)
    return QuantLinear.from_linear(module, scheme, name)


def replace_(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where `name` is."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def excluded(name: str, patterns: Sequence[str]) -> bool:
    """Whether a dotted name is matched by one of the patterns.

    >>> excluded("model.lm_head", ("lm_head",)), excluded("model.lm_head_norm", ("lm_head",))
    (True, False)
    """
    return any(fnmatchcase(name, p) or fnmatchcase(name, "*." + p) for p in patterns)


def shared_weights(model: nn.Module) -> set[int]:
    """Identities of parameters that two or more modules hold."""
    seen: set[int] = set()
    shared: set[int] = set()
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                (shared if id(parameter) in seen else seen).add(id(parameter))
    return shared


def float_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of a model's first float parameter; float32 without one.

    >>> float_dtype(nn.Linear(1, 1).bfloat16())
    torch.bfloat16
    """
    found = (p.dtype for p in model.parameters() if p.is_floating_point())
    return next(found, torch.float32)
