"""Calibration: choosing codes and scales by what the layers get to see.

One file per method, found by a scan of this folder: a module holds `METHOD`, a frozen record that
is an `AbstractRounder` (which codes: rtn, gptq), an `AbstractSmoother` (scales of channels, folded
into neighbours: awq, smoothquant) or an `AbstractRotation` (hidden states turned before all else:
rotate). One of each sort go together, "rotate + awq + gptq"; without a rounder, to nearest.

Blocks are taken in a row (chain.py). In each, smoothers fold first (folding.py); then layers are
quantized in the order in which they run, those with the same input together, each on what comes
through the quantized ones before it. In memory are the model, the batches at one block, and the
second moments of one input.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from zotune.errors import BadInput
from zotune.quant.calibrate.chain import stages
from zotune.quant.calibrate.folding import Folding, fold_, folding
from zotune.quant.calibrate.method import (
    AbstractRotation,
    AbstractRounder,
    AbstractSmoother,
    Grid,
    Moments,
)
from zotune.quant.calibrate.rtn import RoundToNearest
from zotune.quant.calibrate.stage import Stage
from zotune.quant.linear import QuantLinear, matrix
from zotune.quant.model import DEFAULT_EXCLUDE, choose, quantized_twin, replace_
from zotune.quant.scheme import Scheme

__all__ = ["Recipe", "Report", "calibrate_", "methods", "recipe"]


Kind = type[AbstractRounder] | type[AbstractSmoother] | type[AbstractRotation]
_SORTS: dict[str, type] = {
    "rounder": AbstractRounder, "smoother": AbstractSmoother, "rotation": AbstractRotation
}  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """What is done to every layer.

    >>> recipe([("awq", {}), ("gptq", {"act_order": True})]).needs_data
    True
    """

    rounder: AbstractRounder = field(default_factory=RoundToNearest)
    smoother: AbstractSmoother | None = None
    rotation: AbstractRotation | None = None

    @property
    def needs_data(self) -> bool:
        """Whether anything looks at the layers' inputs."""
        return self.rounder.gram or self.smoother is not None


@dataclass(frozen=True)
class Report:
    """What was done, and what was not.

    layers: names of the quantized ones. unfolded: layers that a smoother found no neighbour for,
    with the reason. unrotated: those whose inputs no rotation reaches. silent: how many channels of
    a layer's input were zero for all the text. nearest: layers rounded to nearest though the method
    looks at inputs, with the reason.
    """

    layers: tuple[str, ...]
    unfolded: dict[str, str] = field(default_factory=dict)
    unrotated: dict[str, str] = field(default_factory=dict)
    silent: dict[str, int] = field(default_factory=dict)
    nearest: dict[str, str] = field(default_factory=dict)


@cache
def methods() -> dict[str, Kind]:
    """Every method by name.

    >>> sorted(methods())
    ['awq', 'gptq', 'rotate', 'rtn', 'smoothquant']
    """
    found = {}
    for info in pkgutil.iter_modules(__path__):
        method = getattr(import_module(f"{__name__}.{info.name}"), "METHOD", None)
        if method is not None:
            found[method.name] = method
    return found


def recipe(terms: Sequence[tuple[str, Mapping[str, Any]]]) -> Recipe:
    """A recipe of methods by name with their options.

    Raises:
        BadInput: for an unknown name or option, or two methods of one sort.

    >>> recipe([("gptq", {"damping": 0.1})]).rounder
    Gptq(damping=0.1, block=128, act_order=False, static_groups=True)
    """
    chosen: dict[str, Any] = {}
    for name, options in terms:
        method = methods().get(name)
        if method is None:
            raise BadInput(
                f"calibration method {name!r} is unknown; use one of {sorted(methods())}"
            )
        sort = next(sort for sort, kind in _SORTS.items() if issubclass(method, kind))
        if sort in chosen:
            raise BadInput(f"{name!r} is a second {sort} beside {chosen[sort].name!r}; keep one")
        try:
            chosen[sort] = method(**options)
        except TypeError as error:
            known = list(getattr(method, "__dataclass_fields__", ()))
            raise BadInput(f"{name!r} takes the options {known}; got {dict(options)}") from error
    return Recipe(**chosen)


@torch.no_grad()
def calibrate_(
    model: nn.Module,
    scheme: Scheme | str,
    how: Recipe,
    inputs: Sequence[Tensor] = (),
    exclude: Sequence[str] = DEFAULT_EXCLUDE,
    stored: torch.dtype = torch.float32,
) -> Report:
    """Replace every linear layer and convolution by a quantized one, as `quantize_model_` does.

    Methods look at the inputs of linear layers; convolutions are rounded to nearest.

    Args:
        model: called with one of `inputs` at a time.
        scheme: a Scheme or its text.
        how: the recipe.
        inputs: batches of one shape, such as token ids (rows, length); none if nothing looks.
        exclude: names or patterns to leave alone.
        stored: dtype of the scales in the file the model goes to.

    Raises:
        BadInput: as `quantize_model_`, if there are no inputs, or they lead to NaN.

    >>> model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> x = torch.rand(4, 16, generator=torch.Generator().manual_seed(0))
    >>> calibrate_(model, "int4-g8", recipe([("gptq", {})]), [x]).layers
    ('0', '2')
    """
    scheme = Scheme.parse(scheme) if isinstance(scheme, str) else scheme
    if how.needs_data and not inputs:
        raise BadInput("calibration looks at the layers' inputs, but there is no text; give --data")
    layers, grid = choose(model, scheme, exclude), Grid(scheme, stored)
    unturned = how.rotation.rotate_(model) if how.rotation else {}
    unrotated = {name: why for name, why in unturned.items() if name in layers}
    found = folding(model) if how.smoother else Folding((), {})
    silent: dict[str, int] = {}
    linear = {n: m for n, m in layers.items() if not isinstance(m, nn.Conv2d)}
    if how.needs_data:
        with _without_cache(model):
            for stage in stages(model, linear, inputs):
                _smooth_(model, stage, how.smoother, found, grid)
                _round_(model, stage, how.rounder, grid, silent)
    rest = {n: m for n, m in layers.items() if model.get_submodule(n) is m}
    for name, module in rest.items():
        if name in linear:
            _replace_(model, name, RoundToNearest(), grid, None)
        else:
            replace_(model, name, quantized_twin(module, scheme, name))
    unfolded = {name: why for name, why in found.refused.items() if name in layers}
    why = {n: "the model does not run it" if n in linear else "a convolution" for n in rest}
    return Report(tuple(layers), unfolded, unrotated, silent, why if how.needs_data else {})


def _smooth_(
    model: nn.Module, stage: Stage, smoother: AbstractSmoother | None, found: Folding, grid: Grid
) -> None:
    """Fold a scale into every input of the stage that a neighbour can give by itself."""
    for fold in found.folds:
        targets = [name for name in fold.targets if name in stage.layers]
        if smoother is None or not targets:
            continue
        weights = [matrix(stage.layers[name]) for name in targets]  # type: ignore[arg-type]
        moments = stage.moments(targets[0], smoother.gram)
        for part in ("highest", "mean"):  # one number for all inputs that a channel serves
            setattr(moments, part, fold.expand(fold.reduced(getattr(moments, part))))
        scale = fold.reduced(smoother.scale(weights, grid, moments))
        fold_(model, fold, scale)


def _round_(
    model: nn.Module,
    stage: Stage,
    rounder: AbstractRounder,
    grid: Grid,
    silent: dict[str, int],
) -> None:
    """Quantize the layers of a stage, each behind the quantized ones that run before it."""
    for names in stage.groups():
        moments = stage.moments(names[0], gram=rounder.gram)
        for name in names:
            if moments.silent:
                silent[name] = moments.silent
            _replace_(model, name, rounder, grid, moments)


def _replace_(
    model: nn.Module, name: str, rounder: AbstractRounder, grid: Grid, moments: Moments | None
) -> None:
    old: Any = model.get_submodule(name)
    gram = None if moments is None else moments.gram
    values = rounder.round(matrix(old), grid, gram, name)
    layer = QuantLinear.from_codes(old, grid.scheme, *values)
    layer.scale_dtype = grid.stored
    replace_(model, name, layer)


@contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """Decoders would otherwise collect keys and values of every batch."""
    config: Any = getattr(model, "config", None)
    before = getattr(config, "use_cache", None)
    if before is not None:
        config.use_cache = False
    try:
        yield
    finally:
        if before is not None:
            config.use_cache = before
