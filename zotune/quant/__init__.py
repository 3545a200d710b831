"""Quantized weights: grids, packing, the linear layer, its kernels and checkpoint formats."""

from __future__ import annotations

from zotune.quant.affine import Scheme, dequantize, quantize
from zotune.quant.linear import QuantLinear
from zotune.quant.model import quantize_model_
from zotune.quant.packing import pack, unpack

__all__ = ["QuantLinear", "Scheme", "dequantize", "pack", "quantize", "quantize_model_", "unpack"]
