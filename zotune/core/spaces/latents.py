"""Weights before rounding: the loss is that of the rounded ones."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from zotune.core.block import FloatBlock, Owner
from zotune.core.space import Observe, Space, SpaceSpec, matching
from zotune.quant.qat.layer import only_fake

QUERY_VALUE = r"(^|\.)(q_proj|v_proj|query|value|c_attn|q_lin|v_lin)\.weight$"
"""The projections that ZeroQAT's light variant tunes; GPT-2 keeps its keys in the same layer."""


@dataclass(frozen=True)
class Latents(SpaceSpec):
    """The float weights behind fake-quantized layers: ZeroQAT (2025, arXiv 2509.00031).

    A probe sees L(Q(W +- eps u)), the loss after rounding, so there is no gradient to be passed
    through a rounding. Unit: the mean distance between grid points of a row.
    """

    pattern: str | None = None

    def build(self, model: nn.Module, observe: Observe | None = None) -> Space:
        layers = only_fake(model)
        wanted = matching([f"{path}.weight" for path in layers], self.pattern)
        return Space(
            FloatBlock.of(
                f"{path}.weight", layer.weight, [Owner(path, layer, "weight")],
                unit=layer.steps().mean(1, keepdim=True), keep_master=False, decay=True,
                **self.options,
            )
            for path, layer in layers.items()
            if wanted(f"{path}.weight")
        )  # fmt: skip
