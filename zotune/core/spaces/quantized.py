"""Spaces over quantized layers: scales, zero points, integer codes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from zotune.core.block import Block, CodeBlock, FloatBlock, Owner
from zotune.core.space import Observe, Space, SpaceSpec, matching
from zotune.errors import BadInput
from zotune.quant.layer import QuantLayer

SMALLEST_SCALE = 1e-8


def quantized(model: nn.Module, attribute: str, pattern: str | None) -> list[Owner]:
    """The quantized layers that have this attribute, as owners; none is an error."""
    found = {
        f"{path}.{attribute}": Owner(path, module, attribute)
        for path, module in model.named_modules()
        if isinstance(module, QuantLayer) and getattr(module, attribute) is not None
    }
    if not found:
        raise BadInput(
            f"this model has no quantized {attribute}: quantize it first (`zotune quantize`, or "
            "--scheme int4-g64), or tune another space"
        )
    wanted = matching(found, pattern)
    return [owner for name, owner in found.items() if wanted(name)]


def _zero_unit(owner: Owner) -> Tensor | float:
    assert isinstance(owner.module, QuantLayer)
    return owner.module.zero_unit


@dataclass(frozen=True)
class Scales(SpaceSpec):
    """Quantization scales, codes frozen: QZO (2025, arXiv 2505.13430). Unit: the scale itself.

    Scales stay positive, but in layers whose format stores negative ones.
    """

    pattern: str | None = None

    def build(self, model: nn.Module, observe: Observe | None = None) -> Space:
        return Space(
            FloatBlock.of(
                f"{o.path}.scale",
                o.tensor,
                [o],
                unit=o.tensor.detach().abs(),
                minimum=SMALLEST_SCALE if bool((o.tensor >= 0).all()) else None,
                **self.options,
            )
            for o in quantized(model, "scale", self.pattern)
        )


@dataclass(frozen=True)
class Zeros(SpaceSpec):
    """Zero points of asymmetric layers. Unit: one code.

    Where a format stores offsets instead (GGUF), those; the unit is what moves weights by a code.
    """

    pattern: str | None = None

    def build(self, model: nn.Module, observe: Observe | None = None) -> Space:
        return Space(
            FloatBlock.of(f"{o.path}.zero", o.tensor, [o], unit=_zero_unit(o), **self.options)
            for o in quantized(model, "zero", self.pattern)
        )


@dataclass(frozen=True)
class Codes(SpaceSpec):
    """The integer codes themselves: ZOQO (arXiv 2501.06736), QuZO (2502.12346). Unit: one code."""

    pattern: str | None = None

    def build(self, model: nn.Module, observe: Observe | None = None) -> Space:
        blocks: list[Block] = [
            CodeBlock.of(f"{o.path}.codes", o, **self.options)
            for o in quantized(model, "codes", self.pattern)
        ]
        return Space(blocks)
