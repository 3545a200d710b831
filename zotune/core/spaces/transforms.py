"""Equivalent transforms: what changes the rounding and nothing else."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from zotune.core.block import Block, FloatBlock, Owner
from zotune.core.space import Observe, Space, SpaceSpec, matching
from zotune.core.spaces.parameters import rms
from zotune.errors import BadInput
from zotune.quant.qat.layer import only_fake
from zotune.quant.qat.prepare import folds_on


@dataclass(frozen=True)
class Transforms(SpaceSpec):
    """Scale s and shift of the channels that layers read, Y = A((X - shift) / s) Q(s W) + W shift,
    after SmoothQuant (2022, arXiv 2211.10438), OmniQuant (2308.13137), ZeroQAT (2509.00031).

    All readers of an input share them, and the module before takes them up in the end. log s is
    tuned, in the unit of s itself; a shift's unit is what a norm's output varies by, its gain, and
    1 behind other modules.
    """

    pattern: str | None = None

    def build(self, model: nn.Module, observe: Observe | None = None) -> Space:
        layers, folds = only_fake(model), folds_on(model)
        if not folds:
            raise BadInput("no layer of this model shares a transform with the module before it")
        found: dict[str, Block] = {}
        for fold in folds:
            gain = model.get_submodule(fold.source).get_parameter("weight")
            units = {"log_scale": 1.0, "shift": rms(gain) if gain.dim() == 1 else 1.0}
            for attribute, unit in units.items():
                owners = [Owner(n, layers[n], attribute) for n in fold.targets]
                if getattr(owners[0].module, attribute) is not None:
                    name = f"{fold.targets[0]}.{attribute}"
                    found[name] = FloatBlock.of(
                        name, owners[0].tensor, owners, unit=unit, **self.options
                    )
        wanted = matching(found, self.pattern)
        return Space(block for name, block in found.items() if wanted(name))
