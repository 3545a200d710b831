"""Layers that are trained through their own rounding, without a gradient to pass through it."""

from __future__ import annotations

from zotune.quant.qat.layer import FakeQuantLinear, fake_layers
from zotune.quant.qat.prepare import Link, attach_, fake_quantize_, fold_, freeze_, settle_

__all__ = [
    "FakeQuantLinear", "Link", "attach_", "fake_layers", "fake_quantize_", "fold_", "freeze_",
    "settle_",
]  # fmt: skip
