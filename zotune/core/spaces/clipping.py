"""Clipping thresholds of fake-quantized layers: of weights, and of activations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from zotune.core.block import FloatBlock, Owner
from zotune.core.space import Observe, Space, SpaceSpec, matching
from zotune.errors import BadInput
from zotune.quant.qat.layer import only_fake


def thresholds(model: nn.Module, spec: SpaceSpec, sides: Sequence[str], what: str) -> Space:
    """Blocks over these buffers of the fake-quantized layers; their unit is a change by itself."""
    owners = {
        f"{path}.{side}": Owner(path, layer, side)
        for path, layer in only_fake(model).items()
        for side in sides
        if getattr(layer, side) is not None
    }
    if not owners:
        raise BadInput(
            f"this model has no {what} to tune; use a scheme that ends in -a4 or the like"
        )
    wanted = matching(owners, getattr(spec, "pattern", None))
    return Space(
        FloatBlock.of(name, owner.tensor, [owner], **spec.options)
        for name, owner in owners.items()
        if wanted(name)
    )


@dataclass(frozen=True)
class Clipping(SpaceSpec):
    """Where weights are clipped before rounding: the logarithms of alpha and beta, as shares of a
    group's largest and smallest weight (OmniQuant, arXiv 2308.13137; ZeroQAT, 2509.00031).

    Step and zero point follow from them. Unit: a threshold by itself.
    """

    pattern: str | None = None

    def build(self, model: nn.Module, observe: Observe | None = None) -> Space:
        return thresholds(model, self, ("upper", "lower"), "clipping thresholds")


@dataclass(frozen=True)
class Activations(SpaceSpec):
    """Where activations are clipped before rounding: one share of a token's largest per layer.

    Unit: a threshold by itself. Only zotune's own format has a place for it.
    """

    pattern: str | None = None

    def build(self, model: nn.Module, observe: Observe | None = None) -> Space:
        return thresholds(model, self, ("input_clip",), "rounded activations")
