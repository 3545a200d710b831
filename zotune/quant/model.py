"""Replace the linear layers of a model by quantized ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

from torch import nn

from zotune.errors import BadInput
from zotune.quant.affine import Scheme
from zotune.quant.linear import QuantLinear, is_conv1d, matrix

DEFAULT_EXCLUDE = ("lm_head",)


def quantize_model_(
    model: nn.Module, scheme: Scheme | str, exclude: Sequence[str] = DEFAULT_EXCLUDE
) -> list[str]:
    """Replace every linear layer (nn.Linear, transformers' Conv1D) by a QuantLinear, in place.

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
        replace_(model, name, QuantLinear.from_linear(module, scheme, name))
    return list(chosen)


def choose(
    model: nn.Module, scheme: Scheme, exclude: Sequence[str] = DEFAULT_EXCLUDE
) -> dict[str, nn.Linear]:
    """The layers that `quantize_model_` replaces, by name, all of them checked.

    Raises:
        BadInput: as `quantize_model_`.
    """
    shared = shared_weights(model)
    chosen = {
        name: module
        for name, module in float_linears(model)
        if id(module.weight) not in shared and not excluded(name, exclude)
    }
    if not chosen:
        raise BadInput(
            f"no layer to quantize in {type(model).__name__}: it has no linear layer outside "
            f"exclude={tuple(exclude)} with a weight of its own"
        )
    for name, module in chosen.items():
        scheme.check_divides(matrix(module).shape[1], name)
    return chosen


def float_linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Names and modules of the layers that `quantize_model_` considers.

    Only exact nn.Linear (and Conv1D) count: a subclass may read `weight` in ways of its own.
    """
    for name, module in model.named_modules():
        if type(module) is nn.Linear or is_conv1d(module):
            yield name, module


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
