"""Layers that are trained through their own rounding, without a gradient to pass through it."""

from __future__ import annotations

from zotune.quant.qat.layer import FakeQuantLinear, fake_layers
from zotune.quant.qat.prepare import attach_, fake_quantize_, folds_on, freeze_, quantize_

__all__ = [
    "FakeQuantLinear", "attach_", "fake_layers", "fake_quantize_", "folds_on", "freeze_",
    "quantize_",
]  # fmt: skip
