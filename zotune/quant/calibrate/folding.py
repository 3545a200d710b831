"""Which layers can absorb a per-channel transform of which inputs, and the transform itself.

Quantizers may replace the input x of a linear layer by (x - shift) / scale, channel by channel, if
the layer makes up for it and the module that x comes from, its *source*, gives the new x by itself:

    source norm or linear      weight' = weight / scale          bias' = (bias - shift) / scale
    target y = W x + b         W' = W diag(scale)                b' = b + W shift

so that the model computes the same function, with no layer more. What lies between source and
target must let a factor pass (a gate's product, ReLU for scale > 0, attention, which is linear in
its values) and, for a shift, a summand too (attention: its weights add up to 1).

    found = folding(model)                      a `Folding`: its `folds`, and `refused`, the linear
                                                layers without one, each with the reason
    fold.expand(values)                         per channel of the source -> per input of the target
    fold.reduced(values)                        the way back, by the largest
    new = folded(model, fold, scale, shift)     new parameters by name; nothing is written
    fold_(model, fold, scale, shift)            writes them

`scale` is (channels,), positive and finite; `shift` is (channels,) or None, allowed where
`fold.shifts`. Everything is exact but for rounding to the parameters' own dtype. Folds of a model
are independent and can be applied in any order; layers must not be quantized yet. An architecture
that is not in families.py gets no folds, and every layer of it is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zotune.errors import BadInput
from zotune.quant.calibrate.families import FAMILIES, Blocked, Row, rows
from zotune.quant.linear import is_conv1d, matrix
from zotune.quant.model import float_layers


@dataclass(frozen=True)
class Fold:
    """Linear layers that share an input, and the module whose outputs `rows` that input is.

    repeats, width: heads of `width` channels that each serve `repeats` heads of the input
    (grouped-query attention). shifts: whether a shift can be absorbed as well as a scale.

    >>> Fold("v", ("o",), (0, 4), repeats=2, width=2).expand(torch.arange(4)).tolist()
    [0, 1, 0, 1, 2, 3, 2, 3]
    """

    source: str
    targets: tuple[str, ...]
    rows: tuple[int, int]
    repeats: int = 1
    width: int = 1
    shifts: bool = False

    @property
    def channels(self) -> int:
        """How many numbers a scale has."""
        return self.rows[1] - self.rows[0]

    def expand(self, values: Tensor) -> Tensor:
        """(channels,) -> (inputs of a target,)."""
        return values.reshape(-1, self.width).repeat_interleave(self.repeats, 0).flatten()

    def reduced(self, values: Tensor) -> Tensor:
        """(inputs of a target,) -> (channels,): the largest of the inputs a channel serves."""
        return values.reshape(-1, self.repeats, self.width).amax(1).flatten()


@dataclass(frozen=True)
class Folding:
    """All folds of a model in its order, and the linear layers without one with the reason."""

    folds: tuple[Fold, ...]
    refused: dict[str, str]


def folding(model: nn.Module) -> Folding:
    """Which transforms the neighbours of a model's linear layers can absorb.

    >>> folding(nn.Sequential(nn.Linear(2, 2))).refused
    {'0': 'no neighbours are known in models of type None; known: ...'}
    """
    config = config_of(model)
    table = rows(config)
    modules = dict(model.named_modules())
    folds: list[Fold] = []
    reasons: dict[str, str] = {}
    for row in table:
        for prefix in prefixes(modules, row.targets):
            targets = tuple(prefix + target for target in row.targets)
            why = row.why if isinstance(row, Blocked) else _obstacle(modules, prefix + row.source)
            if why is None and isinstance(row, Row):
                folds.append(_fold(modules, config, prefix + row.source, targets, row))
            else:
                reasons |= dict.fromkeys(targets, str(why))
    absorbed = {target for fold in folds for target in fold.targets}
    order = {name: k for k, name in enumerate(modules)}
    unknown = "nothing before it absorbs a factor" if table else _unknown(config)
    return Folding(
        tuple(sorted(folds, key=lambda fold: order[fold.targets[0]])),
        {n: reasons.get(n, unknown) for n, _ in float_layers(model) if n not in absorbed},
    )


def folded(
    model: nn.Module, fold: Fold, scale: Tensor, shift: Tensor | None = None
) -> dict[str, Tensor]:
    """The parameters of source and targets after the transform, by name, in their own dtypes.

    Raises:
        BadInput: for a scale that is not positive and finite, another shape, or a shift where
            there is no bias to take it.
    """
    _check(fold, scale, shift)
    found: dict[str, Tensor] = {}
    source = model.get_submodule(fold.source)
    start, stop = fold.rows
    for part in ("weight", "bias"):
        old = getattr(source, part, None)
        if old is None:
            continue
        turned = part == "weight" and is_conv1d(source)
        outputs = (old.t() if turned else old).detach().clone()
        own = outputs[start:stop].to(torch.promote_types(old.dtype, scale.dtype))
        if part == "bias" and shift is not None:
            own = own - shift
        outputs[start:stop] = (own.t() / scale).t().to(old.dtype)
        found[f"{fold.source}.{part}"] = outputs.t() if turned else outputs
    factor = fold.expand(scale)
    for name in fold.targets:
        # A layer that is a target of its own source's rows does not exist: names stay apart.
        layer: Any = model.get_submodule(name)
        columns = matrix(layer)
        weight = (columns * factor).to(columns.dtype)
        found[f"{name}.weight"] = weight.t() if is_conv1d(layer) else weight
        if shift is not None:
            summand = columns.to(factor.dtype) @ fold.expand(shift).to(factor.dtype)
            found[f"{name}.bias"] = (layer.bias.detach() + summand).to(layer.bias.dtype)
    return found


@torch.no_grad()
def fold_(model: nn.Module, fold: Fold, scale: Tensor, shift: Tensor | None = None) -> None:
    """Apply a transform in place; the model computes the same function.

    Raises:
        BadInput: as `folded`.
    """
    for name, value in folded(model, fold, scale, shift).items():
        model.get_parameter(name).copy_(value)


def _unknown(config: Any) -> str:
    known = getattr(config, "model_type", None)
    return f"no neighbours are known in models of type {known!r}; known: {', '.join(FAMILIES)}"


def config_of(model: nn.Module) -> Any:
    """The configuration of the model, or of the transformers model inside a wrapper."""
    configs = (getattr(module, "config", None) for module in model.modules())
    return next((c for c in configs if hasattr(c, "model_type")), None)


def prefixes(modules: dict[str, nn.Module], targets: tuple[str, ...]) -> Iterator[str]:
    """What stands before the targets' names, once for every block that has them all."""
    for name in modules:
        if name.endswith("." + targets[0]):
            prefix = name.removesuffix(targets[0])
            if all(prefix + target in modules for target in targets):
                yield prefix


def _obstacle(modules: dict[str, nn.Module], source: str) -> str | None:
    """Why a source cannot absorb anything; None if it can."""
    module = modules.get(source)
    if module is None:
        return f"it has no {source!r} before it"
    if not isinstance(getattr(module, "weight", None), nn.Parameter):
        return f"{source!r} before it has no weight, or a quantized one"
    return None


def _fold(
    modules: dict[str, nn.Module], config: Any, source: str, targets: tuple[str, ...], row: Row
) -> Fold:
    module: Any = modules[source]
    outputs = module.weight.shape[1 if is_conv1d(module) else 0]  # a norm's weight is a vector
    k, n = row.part
    start, stop = k * outputs // n, (k + 1) * outputs // n
    first: Any = modules[targets[0]]
    repeats = matrix(first).shape[1] // (stop - start)
    heads = getattr(config, "num_key_value_heads", 1) if repeats > 1 else 1
    biases = [getattr(modules[name], "bias", None) is not None for name in (source, *targets)]
    width = (stop - start) // heads if repeats > 1 else 1
    return Fold(source, targets, (start, stop), repeats, width, row.shifts and all(biases))


def _check(fold: Fold, scale: Tensor, shift: Tensor | None) -> None:
    for name, values in (("scale", scale), ("shift", shift)):
        if values is not None and (
            values.shape != (fold.channels,) or not torch.isfinite(values).all()
        ):
            raise BadInput(
                f"{name} of the outputs of {fold.source!r} is {tuple(values.shape)}; wanted "
                f"({fold.channels},) finite numbers"
            )
    if not (scale > 0).all():
        raise BadInput(f"scale of {fold.source!r} has numbers <= 0; only positive ones fold")
    if shift is not None and not fold.shifts:
        raise BadInput(
            f"{fold.source!r} or a layer behind it has no bias for a shift, or an activation "
            "stands between; leave shift out"
        )
